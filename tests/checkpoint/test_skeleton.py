"""Experts are found in place only where mlx-lm's `sanitize` can be followed."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models import qwen3_moe

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import NotContiguous, Remedy
from tests.architectures import random_model, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(*random_model("qwen3_moe"), tmp_path / "model")
    return tmp_path / "model"


def test_every_layer_has_a_place(folder: Path) -> None:
    skeleton = open_skeleton(open_folder(folder))
    layers = skeleton.layers()
    assert [layer.path for layer in layers] == list(skeleton.switches)
    assert len(layers) == 2


def test_a_sanitize_that_looks_at_values_leaves_no_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It must not pass for an architecture without `sanitize`, whose tensors lie as named."""
    own = qwen3_moe.Model.sanitize

    def sanitize(self: qwen3_moe.Model, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        assert mx.isfinite(next(iter(weights.values()))).all().item()
        sanitized: dict[str, mx.array] = own(self, weights)
        return sanitized

    monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
    skeleton = open_skeleton(open_folder(folder))
    with pytest.raises(NotContiguous, match="cannot be streamed in place") as failure:
        skeleton.layers()
    assert failure.value.remedy is Remedy.PACK
    assert failure.value.path == folder
