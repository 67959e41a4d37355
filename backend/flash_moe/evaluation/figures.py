"""Figures of tokens that come in documents, with their standard errors.

The tokens of one document are not independent of each other, so a standard error is always over
documents, each weighted by its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
# The error of a quantile has no formula, so documents are resampled. 200 draws estimate it within
# 5 %, and take 0.1 s for 50,000 tokens.
DRAWS = 200


class Estimate(NamedTuple):
    """`standard_error` is None where there are fewer than two documents."""

    value: float
    standard_error: float | None

    def to_json(self, name: str = "value") -> dict[str, float | None]:
        return {name: finite(self.value), "standard_error": finite(self.standard_error)}


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """The sum of `sums` over the sum of `counts`; each document has one of both."""
    documents, total = len(sums), sum(counts)
    mean = sum(sums) / max(total, 1)
    if documents < 2 or not total:
        return Estimate(mean, None)
    pairs = zip(sums, counts, strict=True)
    squares = sum((value - mean * count) ** 2 for value, count in pairs)
    error = math.sqrt(squares / (documents * (documents - 1))) / (total / documents)
    return Estimate(mean, error)


def mean(documents: Sequence[Values]) -> Estimate:
    return ratio([float(values.sum()) for values in documents], [len(v) for v in documents])


def quantile(documents: Sequence[Values], share: float) -> Estimate:
    """The smallest value that at least this share of all tokens does not exceed."""
    values = np.concatenate(documents)
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    order = np.argsort(values, kind="stable")
    values, owners = values[order], owners[order]

    def weighted(weights: NDArray[np.int64]) -> float:
        below = np.cumsum(weights[owners])
        return float(values[np.searchsorted(below, share * below[-1])])

    count = len(documents)
    value = weighted(np.ones(count, np.int64))
    if count < 2:
        return Estimate(value, None)
    # The same seed every time: equal runs have equal figures.
    generator = np.random.default_rng(0)
    draws = (generator.integers(count, size=count) for _ in range(DRAWS))
    resampled = [weighted(np.bincount(draw, minlength=count)) for draw in draws]
    return Estimate(value, float(np.std(resampled)))


def finite(value: float | None) -> float | None:
    """None for infinity and NaN, which JSON cannot write and a broken model produces."""
    return value if value is not None and math.isfinite(value) else None
