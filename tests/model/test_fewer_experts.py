"""Fewer experts than a model was trained with, and the weights that they have."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.errors import OptionError
from flash_moe.model.load import Settings, StreamedModel, Weights, load
from flash_moe.prefix.fingerprint import fingerprint
from tests.architectures import random_model, write_checkpoint

PROMPT = mx.array([[5, 9, 2, 77, 30, 8]])


def logits(folder: Path, **settings: object) -> np.ndarray:
    model = load(folder, Settings(**settings))  # type: ignore[arg-type]
    try:
        return np.array(model(PROMPT, cache=model.make_cache()).astype(mx.float32))
    finally:
        model.close()


def test_without_a_cut_there_is_nothing_to_keep(demo_folder: Path) -> None:
    for runtime in ("native", "mlx"):
        own = logits(demo_folder, runtime=runtime)
        assert (logits(demo_folder, runtime=runtime, weights="keep") == own).all()
        assert (logits(demo_folder, runtime=runtime, weights="keep", experts=4) == own).all()


def test_kept_weights_are_those_among_all(demo_folder: Path) -> None:
    """The experts beyond the cut are taken out of the full mixture by setting their weights to
    nothing; all others stay as they are."""
    model = load(demo_folder, Settings(runtime="mlx"))
    wanted = np.array(_cut_by_hand(model, keep=2).astype(mx.float32))
    model.close()
    for runtime in ("mlx", "native"):
        kept = logits(demo_folder, runtime=runtime, experts=2)
        np.testing.assert_allclose(kept, wanted, rtol=1e-4, atol=1e-4)
        assert (kept == logits(demo_folder, runtime=runtime, experts=2, weights="keep")).all()
        other = logits(demo_folder, runtime=runtime, experts=2, weights="renormalise")
        assert abs(other - wanted).max() > 1e-2


def _cut_by_hand(model: StreamedModel, keep: int) -> mx.array:
    from mlx_lm.models import qwen3_next

    block = qwen3_next.Qwen3NextSparseMoeBlock

    def cut(self: object, x: mx.array) -> mx.array:
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)  # type: ignore[attr-defined]
        ids = mx.argsort(-odds, axis=-1)[..., : self.top_k]  # type: ignore[attr-defined]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        weights = mx.where(mx.arange(weights.shape[-1]) < keep, weights, 0)
        y = (self.switch_mlp(x, ids) * weights[..., None]).sum(axis=-2)  # type: ignore[attr-defined]
        gate, shared = self.shared_expert_gate, self.shared_expert  # type: ignore[attr-defined]
        return y + mx.sigmoid(gate(x)) * shared(x)

    own, block.__call__ = block.__call__, cut
    try:
        found = model(PROMPT, cache=model.make_cache())
        mx.eval(found)
        return found
    finally:
        block.__call__ = own


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("auto", "2 experts of 4 a token, with the weights they have among all"),
        ("keep", "2 experts of 4 a token, with the weights they have among all"),
        ("renormalise", "2 experts of 4 a token"),
    ],
)
def test_the_choice_is_named(demo_folder: Path, weights: Weights, words: str) -> None:
    model = load(demo_folder, Settings(experts=2, weights=weights))
    assert model.plan.lossy == [words]
    model.close()


def test_a_kept_state_is_of_one_choice_alone(demo_folder: Path) -> None:
    def identity(weights: Weights) -> str:
        model = load(demo_folder, Settings(experts=2, weights=weights))
        model.close()
        return fingerprint(model)

    assert identity("auto") == identity("keep") != identity("renormalise")


def test_where_the_formula_is_not_known(tmp_path: Path) -> None:
    write_checkpoint(*random_model("qwen3_moe"), tmp_path / "m")
    with pytest.raises(OptionError, match="weights=keep: not known how for qwen3_moe"):
        load(tmp_path / "m", Settings(experts=1, weights="keep"))
    model = load(tmp_path / "m", Settings(experts=1))
    assert not model.plan.keeps_weights
    model.close()
