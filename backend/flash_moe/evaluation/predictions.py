"""What a model predicts at every token of a document, recorded, or compared with a record.

Recorded are the likeliest tokens with their log-probabilities, the probability of all others
together, and that of the token that came: 2 KB a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from flash_moe.errors import OptionError
from flash_moe.evaluation.arrays import Array, Arrays

# Of a trained model they have all but 1e-3 of the probability; the rest counts as one more token.
TOP = 256
# The columns of a record, in files, too: the likeliest ids, their log-probabilities, that of all
# others together, the id that greedy decoding takes, the log-probability of the token that came.
RECORDED = ("ids", "values", "rest", "best", "chosen")
# The columns of a comparison, in nats; except `same`, which is 1 where both models take the same
# token greedily. `more` is by how much the token that came is less likely than in the record.
COMPARED = ("kl", "same", "more")


class PredictionRecorder:
    """An observer of one document that records its predictions."""

    def __init__(self) -> None:
        self._parts: list[tuple[Array, ...]] = []

    def __call__(self, log_probabilities: mx.array, targets: Sequence[int]) -> None:
        ids = likeliest(log_probabilities)
        values, rest = logprobs_of(log_probabilities, ids)
        best, targeted = greedy(log_probabilities), target_logprobs(log_probabilities, targets)
        self._parts.append((ids, values, rest, best, targeted))

    def arrays(self) -> dict[str, Array]:
        return _columns(RECORDED, self._parts)


class Comparison:
    """An observer of one document that compares its predictions with a record."""

    def __init__(self, record: Arrays) -> None:
        self._record = record
        self._at = 0
        self._parts: list[tuple[Array, ...]] = []

    def __call__(self, log_probabilities: mx.array, targets: Sequence[int]) -> None:
        rows = slice(self._at, self._at + len(targets))
        self._at = rows.stop
        ids, values, rest, best, before = (
            np.asarray(self._record[name][rows]) for name in RECORDED
        )
        if len(ids) < len(targets) or ids.max() >= log_probabilities.shape[-1]:
            raise OptionError("The reference is of a model with another vocabulary.")
        own, own_rest = logprobs_of(log_probabilities, ids)
        divergence = kl(_joined(values, rest), _joined(own, own_rest))
        same = (greedy(log_probabilities) == best).astype(np.float64)
        more = before.astype(np.float64) - target_logprobs(log_probabilities, targets)
        self._parts.append((divergence, same, more))

    def arrays(self) -> dict[str, Array]:
        return _columns(COMPARED, self._parts)


def likeliest(log_probabilities: mx.array) -> Array:
    """The ids of the TOP likeliest tokens, in no particular order."""
    rows = np.array(log_probabilities, copy=False)
    ids = np.broadcast_to(np.arange(rows.shape[-1]), rows.shape)
    if rows.shape[-1] > TOP:
        # 0.7 ms for a vocabulary of 248,000, where MLX takes 5 on the same CPU.
        ids = np.argpartition(rows, -TOP, axis=-1)[:, -TOP:]
    return ids.astype(np.uint16 if rows.shape[-1] <= 1 << 16 else np.uint32)


def logprobs_of(log_probabilities: mx.array, ids: Array) -> tuple[Array, Array]:
    """The log-probabilities of these tokens, and that of all others together."""
    rows, places = np.array(log_probabilities), ids.astype(np.intp)
    values = np.take_along_axis(rows, places, -1)
    np.put_along_axis(rows, places, -np.inf, -1)
    # Something finite, also where there are no others.
    top = np.maximum(rows.max(-1), np.float32(-1e30))
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(rows - top[:, None]).sum(-1)) + top
    return values, rest


def greedy(log_probabilities: mx.array) -> Array:
    """The likeliest token; of equal ones, which are frequent in 16 bits, the first."""
    return np.array(mx.argmax(log_probabilities, axis=-1))


def target_logprobs(log_probabilities: mx.array, targets: Sequence[int]) -> Array:
    places = mx.array(list(targets))[:, None]
    return np.array(mx.take_along_axis(log_probabilities, places, axis=-1)[:, 0])


def kl(reference: Array, other: Array) -> Array:
    """Between rows of log-probabilities, in nats. With some tokens joined into one it is never more
    than with all of them apart."""
    p, q = _normalised(reference), _normalised(other)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    divergence: Array = np.maximum(terms.sum(-1), 0.0)
    return divergence


def _joined(values: Array, rest: Array) -> Array:
    return np.concatenate([values, rest[:, None]], -1)


def _columns(names: Sequence[str], rows: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
    """Empty, if there were no tokens."""
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=False))


def _normalised(rows: Array) -> Array:
    """float32 is off by 1e-7, which would be a divergence, and a negative one as often as not."""
    wide = rows.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)
