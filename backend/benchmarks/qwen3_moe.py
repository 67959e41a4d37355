"""A Qwen3-MoE checkpoint of random weights, 1.3 GB: what decoding on a CPU is measured with.

python backend/benchmarks/qwen3_moe.py FOLDER

Hidden 2,048, 8 layers of 64 experts with 768 columns, 8 experts a token, 4 bits: 170 MB of experts
for a token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer
from flash_moe.upstream import model_classes

CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 2048,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
BITS, GROUP_SIZE = 4, 64


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    mx.random.seed(1)
    model_class, args_class = model_classes(CONFIG)
    model = model_class(args_class.from_dict(CONFIG))  # type: ignore[attr-defined]
    # A layer at a time: all of it in float32 would take 10 GB.
    for layer in model.model.layers:
        nn.quantize(layer, GROUP_SIZE, BITS)
        layer.set_dtype(mx.bfloat16)
        mx.eval(layer.parameters())
    nn.quantize(model, GROUP_SIZE, BITS)
    model.set_dtype(mx.bfloat16)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    quantization = {"group_size": GROUP_SIZE, "bits": BITS}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization": quantization}))
    tokenizer = make_tokenizer()
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.stop_tokens})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer.config))
    (folder / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    main()
