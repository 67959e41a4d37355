"""Figures over documents, against NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.evaluation.figures import figure, mean, quantile

values = st.floats(-1e6, 1e6, allow_subnormal=False)
documents = st.lists(st.lists(values, min_size=1, max_size=6).map(np.array), min_size=1, max_size=8)


@given(documents, st.floats(0.01, 0.99))
def test_of_all_tokens(found: list[np.ndarray], share: float) -> None:
    tokens = np.concatenate(found)
    assert mean(found)[0] == pytest.approx(tokens.mean(), abs=1e-6)
    low, high = np.quantile(tokens, [share - 1e-9, share + 1e-9], method="inverted_cdf")
    assert low <= quantile(found, share)[0] <= high


@given(documents)
def test_errors_are_over_documents(found: list[np.ndarray]) -> None:
    """One document says nothing of how documents differ; equal ones do not differ."""
    for of in (mean, lambda documents: quantile(documents, 0.9)):
        assert of(found[:1])[1] is None
        assert of([found[0]] * 4)[1] == pytest.approx(0, abs=1e-6)
    once = [np.array([document.mean()]) for document in found]
    if len(once) > 1:
        spread = np.std(once, ddof=1) / np.sqrt(len(once))
        assert mean(once)[1] == pytest.approx(spread, rel=1e-6, abs=1e-9)


def test_the_error_of_a_median() -> None:
    """Of 400 documents of one normal number it is 1.2533 / sqrt(400)."""
    drawn = np.random.default_rng(3).normal(size=(400, 1))
    assert quantile(list(drawn), 0.5)[1] == pytest.approx(0.0627, rel=0.3)


def test_what_is_no_number_is_no_json() -> None:
    assert figure("value", (float("nan"), None)) == {"value": None, "standard_error": None}
