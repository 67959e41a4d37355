"""Checkpoints of random weights: the true Qwen3.5-MoE architecture at any size.

For tests of arithmetic, memory and bandwidth, never of quality: the replies are noise. Weights
are quantized as mlx-lm's converter does it (experts and most matrices at `bits`, routers at 8).
Names, shapes and types come from mlx-lm's own model, so the checkpoint is one that it loads.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.callbacks import Advance, no_advance
from flash_moe.errors import CheckpointError, NoSpace, OptionError, Remedy
from flash_moe.format.atomic import locked_folder, sync, write_json
from flash_moe.format.dtypes import FLOATS
from flash_moe.synth.tokenizer import TEMPLATE, make_tokenizer, require_vocabulary
from flash_moe.synth.weights import Weight, make_weights, router_quantization, write_weights

# In the folder while it is made.
MARK = "random-weights"


@dataclass(frozen=True, slots=True)
class Shape:
    """`small` is for demos and tests; `397b` has the true widths of Qwen3.5-397B-A17B."""

    layers: int = 8
    experts: int = 64
    experts_per_token: int = 4
    hidden: int = 256
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    linear_heads: int = 4
    linear_key_heads: int = 2
    linear_dim: int = 64
    vocabulary: int = 2048

    def config(self) -> dict[str, Any]:
        """config.json as the vendor nests it."""
        text = {
            "model_type": "qwen3_5_moe_text",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocabulary,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "linear_num_value_heads": self.linear_heads,
            "linear_num_key_heads": self.linear_key_heads,
            "linear_key_head_dim": self.linear_dim,
            "linear_value_head_dim": self.linear_dim,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "full_attention_interval": 4,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "moe_intermediate_size": self.intermediate,
            "shared_expert_intermediate_size": self.intermediate,
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000000.0,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10] if self.head_dim == 256 else [3, 3, 2],
            },
        }
        return {
            "model_type": "qwen3_5_moe",
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "text_config": text,
        }


SHAPES = {
    "small": Shape(),
    "397b": Shape(
        layers=60,
        experts=512,
        experts_per_token=10,
        hidden=4096,
        intermediate=1024,
        heads=32,
        kv_heads=2,
        head_dim=256,
        linear_heads=64,
        linear_key_heads=16,
        linear_dim=128,
        vocabulary=248320,
    ),
}


def synthesize(
    target: Path,
    shape: Shape = SHAPES["small"],
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: str = "float32",
    seed: int = 0,
    sparse: bool = False,
    progress: Advance = no_advance,
) -> None:
    """Write a checkpoint folder. `sparse` leaves the weights out: true headers, and zeros."""
    if target.exists():
        raise CheckpointError(f"{target} exists. Remove it first, or choose another target.")
    weights = _weights(shape, bits, group_size, dtype, seed)
    if not sparse:
        _require_space(target, weights)
    with _workspace(target) as work:
        write_weights(work, weights, seed, sparse, progress)
        _write_small_files(work, shape, bits, group_size)
        (work / MARK).unlink()
        work.rename(target)
        sync(target.parent)


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """An empty folder, to be renamed. Nothing is left of it after a failure: making it again
    is as quick as going on. One that was not begun here is left alone, it may be a pack's."""
    work = target.with_name(target.name + ".partial")
    if work.exists() and not (work / MARK).exists():
        raise CheckpointError(
            f"{work} exists, and no model of random weights was begun there. Move it away, or "
            "choose another target."
        )
    with locked_folder(work, f"Another model is being written to {work}."):
        try:
            (work / MARK).touch()
            for path in work.iterdir():
                if path.name != MARK:
                    path.unlink()
            yield work
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


def nbytes(shape: Shape, *, bits: int = 4, group_size: int = 64, dtype: str = "float32") -> int:
    """The bytes of weights that `synthesize` would write."""
    return _total(_weights(shape, bits, group_size, dtype, seed=0))


def _weights(shape: Shape, bits: int, group_size: int, dtype: str, seed: int) -> list[Weight]:
    require_vocabulary(shape.vocabulary)
    if dtype not in FLOATS:
        raise OptionError(f"dtype={dtype}: choose {' or '.join(FLOATS)}.")
    return make_weights(shape.config(), bits, group_size, dtype, seed)


def _total(weights: list[Weight]) -> int:
    return sum(weight.array.nbytes for weight in weights)


def _require_space(target: Path, weights: list[Weight]) -> None:
    needed = _total(weights)
    disk = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise NoSpace(
            f"The model needs {needed / 1e9:.1f} GB, and {disk} has {free / 1e9:.1f} GB free. "
            "Free some space, or choose another target.",
            Remedy.PACK_ELSEWHERE,
        )


def _write_small_files(work: Path, shape: Shape, bits: int, group_size: int) -> None:
    """The config, the tokenizer and its template."""
    quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
    routers = router_quantization("language_model.model.layers", shape.layers)
    tokenizer = make_tokenizer()
    write_json(work / "config.json", shape.config() | {"quantization": quantization | routers})
    write_json(work / "generation_config.json", {"eos_token_id": tokenizer.stop_tokens})
    write_json(work / "tokenizer_config.json", tokenizer.config)
    (work / "tokenizer.json").write_text(tokenizer.json, "utf-8")
    (work / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
