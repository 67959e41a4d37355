"""Figures over documents, against NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.evaluation.figures import Estimate, mean, quantile

values = st.floats(-1e6, 1e6, allow_subnormal=False)
several_documents = st.lists(
    st.lists(values, min_size=1, max_size=6).map(np.array), min_size=1, max_size=8
)


@given(several_documents, st.floats(0.01, 0.99))
def test_figures_of_all_tokens(documents: list[np.ndarray], share: float) -> None:
    tokens = np.concatenate(documents)
    assert mean(documents).value == pytest.approx(tokens.mean(), abs=1e-6)
    low, high = np.quantile(tokens, [share - 1e-9, share + 1e-9], method="inverted_cdf")
    assert low <= quantile(documents, share).value <= high


@given(several_documents)
def test_errors_are_over_documents(documents: list[np.ndarray]) -> None:
    """One document says nothing about how documents differ; equal ones do not differ."""
    for figure in (mean, lambda several: quantile(several, 0.9)):
        assert figure(documents[:1]).standard_error is None
        assert figure([documents[0]] * 4).standard_error == pytest.approx(0, abs=1e-6)
    once = [np.array([document.mean()]) for document in documents]
    if len(once) > 1:
        spread = np.std(once, ddof=1) / np.sqrt(len(once))
        assert mean(once).standard_error == pytest.approx(spread, rel=1e-6, abs=1e-9)


def test_the_error_of_a_median() -> None:
    """For 400 documents of one normal number each it is 1.2533 / sqrt(400)."""
    numbers = np.random.default_rng(3).normal(size=(400, 1))
    assert quantile(list(numbers), 0.5).standard_error == pytest.approx(0.0627, rel=0.3)


def test_nan_becomes_null_in_json() -> None:
    assert Estimate(float("nan"), None).to_json() == {"value": None, "standard_error": None}
    assert Estimate(1.5, float("inf")).to_json("share") == {"share": 1.5, "standard_error": None}
