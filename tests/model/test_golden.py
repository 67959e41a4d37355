"""qwen3_5_moe against logits that transformers computed in float64 (see tests/golden)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.model.load import load
from flash_moe.options import Settings
from flash_moe.pack.job import PackJob

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_5_moe"
# float32 against float64: 1.6e-4 for a larger model of this kind.
TOLERANCE = 1e-3


@pytest.fixture(params=["in place", "pack"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "in place":
        return GOLDEN
    PackJob.plan(GOLDEN, tmp_path / "packed").write()
    return tmp_path / "packed"


def test_logits_are_those_of_transformers(folder: Path) -> None:
    reference = np.load(GOLDEN / "reference.npz")
    ids, expected = reference["ids"].reshape(1, -1), reference["logits"]
    streamed = load(folder, Settings(bank_bytes=1))
    prefill = np.array(streamed(mx.array(ids)), dtype=np.float64)
    check(prefill.reshape(expected.shape), expected)
    cache = streamed.make_cache()
    steps = [streamed(mx.array(ids[:, i : i + 1]), cache=cache) for i in range(ids.shape[1])]
    decoded = np.array(mx.concatenate(steps, axis=1), dtype=np.float64)
    check(decoded.reshape(expected.shape), expected)
    streamed.close()


def check(got: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(got - expected).max()
    assert difference <= TOLERANCE, f"differs by {difference:.2e}"
    assert (got.argmax(-1) == expected.argmax(-1)).all()
