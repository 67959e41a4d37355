"""Make the golden reference for qwen3_5_moe: logits by transformers in float64, no MLX anywhere.

Run once, by hand, where torch 2.13 and transformers 5.23 are installed (the tests need neither):

    python tests/golden/make_qwen3_5_moe.py

writes tests/golden/qwen3_5_moe: a random checkpoint in the layout that the vendor publishes
(`model.language_model.*`, gate above up in one tensor), the ids of a prompt, and its logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

SEED = 20261120
TOKENS = 48
TARGET = Path(__file__).parent / "qwen3_5_moe"
# Three linear layers and one of full attention; small enough to keep 1 MB in the repository.
CONFIG = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}


def draw(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random parameters, norms and decays near where training leaves them."""
    noise = torch.randn(like.shape)
    if name.endswith("A_log"):
        return torch.log(1 + 7 * torch.rand(like.shape))
    if like.ndim == 1:
        return like.detach() + 0.2 * noise
    if name.endswith("conv1d.weight"):
        return 0.5 * noise
    # Two times what keeps variance: logits of about one, routers that decide.
    return 2 * noise / like.shape[-1] ** 0.5


def main() -> None:
    torch.manual_seed(SEED)
    settings = {key: value for key, value in CONFIG.items() if key != "model_type"}
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**settings)).eval()
    weights = {name: draw(name, p) for name, p in model.state_dict().items()}
    model.load_state_dict(weights)
    TARGET.mkdir(exist_ok=True)
    vendor = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: p
        for name, p in weights.items()
    }
    save_file({n: p.contiguous() for n, p in vendor.items()}, TARGET / "model.safetensors")
    config = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": CONFIG,
    }
    (TARGET / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    ids = torch.randint(0, CONFIG["vocab_size"], (1, TOKENS))
    model = model.double()
    # The grouped matrix product of transformers does not take doubles.
    model.set_experts_implementation("eager")
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.float64
    print(f"logits: standard deviation {logits.std():.2f}, largest {logits.abs().max():.2f}")
    np.savez(TARGET / "reference.npz", ids=ids.numpy(), logits=logits[0].numpy())


if __name__ == "__main__":
    main()
