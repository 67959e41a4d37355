"""Predictions, recorded and compared: against the whole softmax in float64."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.errors import OptionError
from flash_moe.evaluation.predictions import (
    TOP,
    Comparison,
    PredictionRecorder,
    kl,
    likeliest,
    logprobs_of,
)

Rows = np.ndarray[Any, np.dtype[Any]]
# About as many as are recorded, and far more.
widths = st.sampled_from([2, TOP - 1, TOP, TOP + 1, TOP + 2, 900])
seeds, scales = st.integers(0, 2**32), st.floats(0.1, 20)
steps = st.sampled_from([0, 0.5, 4])


def softmax(rows: Rows) -> Rows:
    wide = rows.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    shares: Rows = powers / powers.sum(-1, keepdims=True)
    return shares


def observed(
    rows: Rows, observer: PredictionRecorder | Comparison, cuts: list[int]
) -> dict[str, Rows]:
    """Hand logits to an observer as evaluation does: as log-probabilities, some rows at a time."""
    log = mx.array(rows) - mx.logsumexp(mx.array(rows), axis=-1, keepdims=True)
    for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        if start < end:
            observer(log[start:end], [0] * (end - start))
    return observer.arrays()


def random_logits(seed: int, width: int, scale: float, step: float) -> tuple[Rows, Rows]:
    """Of two models, one a little like the other; with a step many logits are equal."""
    generator = np.random.default_rng(seed)
    first = scale * generator.normal(size=(7, width))
    second = first + generator.normal(size=first.shape)
    if step:
        first, second = (step * np.round(rows / step) for rows in (first, second))
    return first.astype(np.float32), second.astype(np.float32)


@settings(max_examples=60)
@given(seeds, widths, scales, steps)
def test_divergence_lacks_only_that_among_the_rest(
    seed: int, width: int, scale: float, step: float
) -> None:
    """The chain rule, token by token in float64: joining tokens loses what they differ in among
    themselves, and nothing else."""
    first, second = random_logits(seed, width, scale, step)
    record = observed(first, PredictionRecorder(), [])
    compared = observed(second, Comparison(record), [])
    p, q = softmax(first), softmax(second)
    everything = (p * np.log(p / q)).sum(-1)
    lost = np.zeros(len(p))
    for row in range(len(p)):
        rest = np.setdiff1d(np.arange(width), record["ids"][row])
        if len(rest):
            a, b = p[row][rest], q[row][rest]
            lost[row] = (a * np.log((a / a.sum()) / (b / b.sum()))).sum()
    assert (compared["kl"] >= 0).all()
    assert compared["kl"] == pytest.approx(everything - lost, rel=1e-4, abs=5e-5)
    assert compared["same"].tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()
    assert compared["more"] == pytest.approx(np.log(p[:, 0] / q[:, 0]), rel=1e-4, abs=1e-4)


@given(seeds, widths, scales, steps, st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_a_run_does_not_diverge_from_itself(
    seed: int, width: int, scale: float, step: float, cuts: set[int], others: set[int]
) -> None:
    rows, _ = random_logits(seed, width, scale, step)
    record = observed(rows, PredictionRecorder(), sorted(cuts))
    compared = observed(rows, Comparison(record), sorted(others))
    assert (compared["kl"] == 0).all()
    assert (compared["more"] == 0).all()
    assert (compared["same"] == 1).all()


@given(seeds, widths, st.floats(-1e-3, 1e-3))
def test_rounding_is_not_divergence(seed: int, width: int, off: float) -> None:
    """Probabilities that do not quite sum to one are normalised."""
    first, second = (rows.astype(np.float64) for rows in random_logits(seed, width, 3, 0))
    assert kl(first + off, second) == pytest.approx(kl(first, second), rel=1e-9, abs=1e-12)
    assert kl(first, first + off) == pytest.approx(0, abs=1e-12)


@given(seeds, widths, scales, steps)
def test_the_likeliest_are_recorded(seed: int, width: int, scale: float, step: float) -> None:
    rows, _ = random_logits(seed, width, scale, step)
    log = mx.array(rows) - mx.logsumexp(mx.array(rows), axis=-1, keepdims=True)
    ids = likeliest(log)
    values, rest = logprobs_of(log, ids)
    ordered = -np.sort(-np.array(log), -1)
    assert (-np.sort(-values, -1) == ordered[:, :TOP]).all()
    others = np.exp(ordered[:, TOP:].astype(np.float64)).sum(-1)
    assert np.exp(rest.astype(np.float64)) == pytest.approx(others, rel=1e-4, abs=1e-30)


def test_tokens_that_another_model_does_not_have() -> None:
    record = observed(random_logits(1, 300, 3, 0)[0], PredictionRecorder(), [])
    with pytest.raises(OptionError, match="another vocabulary"):
        observed(np.zeros((7, 20), np.float32), Comparison(record), [])
