"""A checkpoint of every family whose block we compute, small and of random weights."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
import pytest

from tests.architecture_configs import WIDE
from tests.architectures import random_model, write_checkpoint

# "raw": the weights of a token's experts do not sum to one.
FAMILIES = ("qwen3_next", "qwen3_moe", "qwen3_moe raw")


@pytest.fixture(scope="session")
def families(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Qwen3.5-MoE has Qwen3-Next's block. Read them, never change them."""
    folders = {"qwen3_next": demo_folder}
    for name in FAMILIES[1:]:
        folders[name] = tmp_path_factory.mktemp("families") / "model"
        _qwen3_moe(folders[name], norm_topk_prob="raw" not in name)
    return folders


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest, families: dict[str, Path]) -> Path:
    return families[request.param]


def _qwen3_moe(folder: Path, norm_topk_prob: bool) -> None:
    """Quantized as a published checkpoint is, and with a head as decided as a trained one."""
    model, config = random_model("qwen3_moe", **WIDE, norm_topk_prob=norm_topk_prob)
    model.lm_head.weight = 4 * model.lm_head.weight
    nn.quantize(model, 64, 4)
    config["quantization"] = {"group_size": 64, "bits": 4}
    write_checkpoint(model, config, folder)
