"""What a run foresaw, kept so that later runs can be compared with it, token by token.

Of every token that was given: the likeliest words with their log-probabilities, the probability of
all others together, and that of the word that came. 2 KB a token, in safetensors. Documents are
known by their token ids, so runs on other sections or limits share those that both have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.evaluation.arrays import Array, Arrays, open_arrays, write_arrays
from flash_moe.format.sealed import Damaged

# Of a trained model they have all but 1e-3 of the probability; the rest is one more word.
TOP = 256
FORMAT = 1
KEPT = ("ids", "values", "rest", "best", "chosen")
COMPARED = ("kl", "same", "more")


class Foresight:
    """Keeps what is said about the tokens of one document."""

    def __init__(self) -> None:
        self._parts: list[tuple[Array, ...]] = []

    def __call__(self, log_probabilities: mx.array, targets: Sequence[int]) -> None:
        ids = likeliest(log_probabilities)
        values, rest = divided(log_probabilities, ids)
        choices = best(log_probabilities), chosen(log_probabilities, targets)
        self._parts.append((ids, values, rest, *choices))

    def arrays(self) -> dict[str, Array]:
        return _columns(KEPT, self._parts)


class Comparison:
    """Compares what is said about the tokens of one document with what a reference has."""

    def __init__(self, kept: Arrays) -> None:
        self._kept = kept
        self._at = 0
        self._parts: list[tuple[Array, ...]] = []

    def __call__(self, log_probabilities: mx.array, targets: Sequence[int]) -> None:
        rows = slice(self._at, self._at + len(targets))
        self._at = rows.stop
        ids, values, rest, first, before = (np.asarray(self._kept[name][rows]) for name in KEPT)
        if len(ids) < len(targets) or ids.max() >= log_probabilities.shape[-1]:
            raise OptionError("The reference is of a model with other words: give another one.")
        own, own_rest = divided(log_probabilities, ids)
        divergence = kl(_whole(values, rest), _whole(own, own_rest))
        same = (best(log_probabilities) == first).astype(np.float64)
        more = before.astype(np.float64) - chosen(log_probabilities, targets)
        self._parts.append((divergence, same, more))

    def arrays(self) -> dict[str, Array]:
        """In nats: the divergence from the reference, and what the word that came was less likely
        than there. And whether both find the same word the likeliest."""
        return _columns(COMPARED, self._parts)


class Reference:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            about, arrays = open_arrays(path)
            if about["format"] != FORMAT:
                raise Damaged(f"its format is {about['format']}")
            self.model: dict[str, Any] = dict(about["model"])
            self._vocabulary = str(about["vocabulary"])
        except (Damaged, CheckpointError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no reference, or is damaged ({error}). Write one with: "
                "llm flash-moe eval NAME --save FILE"
            ) from error
        self._documents: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            key, _, column = name.partition(".")
            self._documents.setdefault(key, {})[column] = array
        written = path.stat()
        self.digest = _digest([about, written.st_size, written.st_mtime_ns])

    def require(self, tokenizer: ChatTokenizer) -> None:
        if vocabulary(tokenizer) != self._vocabulary:
            raise OptionError(
                f"{self.path} is of {self.model.get('model')}, which has another tokenizer: "
                "probabilities of other words cannot be compared. Perplexities of texts can, in "
                "bits a byte."
            )

    def find(self, key: str) -> Arrays | None:
        return self._documents.get(key)


def write_reference(
    path: Path,
    model: dict[str, Any],
    tokenizer: ChatTokenizer,
    documents: Arrays,
) -> None:
    """`model` says what foresaw it, for people; `documents` has KEY.NAME for each of KEPT."""
    about = {"format": FORMAT, "model": model, "vocabulary": vocabulary(tokenizer)}
    write_arrays(path, about, documents)


def key_of(ids: Sequence[int], first: int, window: int | None = None) -> str:
    """A document by its ids; those from `first` on are foreseen, and each from its window."""
    return _digest([list(ids), first, window])


def vocabulary(tokenizer: ChatTokenizer) -> str:
    return _digest(sorted(tokenizer.tokenizer.get_vocab().items()))


def likeliest(log_probabilities: mx.array) -> Array:
    """The ids of the TOP likeliest words, in no order."""
    rows = np.array(log_probabilities, copy=False)
    ids = np.broadcast_to(np.arange(rows.shape[-1]), rows.shape)
    if rows.shape[-1] > TOP:
        # 0.7 ms for 248,000 words, where MLX takes 5 on the same CPU.
        ids = np.argpartition(rows, -TOP, axis=-1)[:, -TOP:]
    return ids.astype(np.uint16 if rows.shape[-1] <= 1 << 16 else np.uint32)


def divided(log_probabilities: mx.array, ids: Array) -> tuple[Array, Array]:
    """The log-probabilities of some words, and that of all others together."""
    rows, places = np.array(log_probabilities), ids.astype(np.intp)
    values = np.take_along_axis(rows, places, -1)
    np.put_along_axis(rows, places, -np.inf, -1)
    # Something finite, also where there are no others.
    top = np.maximum(rows.max(-1), np.float32(-1e30))
    with np.errstate(divide="ignore"):
        rest = np.log(np.exp(rows - top[:, None]).sum(-1)) + top
    return values, rest


def best(log_probabilities: mx.array) -> Array:
    """As a greedy choice has it: of equal ones, of which 16 bits have many, the first."""
    return np.array(mx.argmax(log_probabilities, axis=-1))


def chosen(log_probabilities: mx.array, targets: Sequence[int]) -> Array:
    places = mx.array(list(targets))[:, None]
    return np.array(mx.take_along_axis(log_probabilities, places, axis=-1)[:, 0])


def kl(reference: Array, other: Array) -> Array:
    """Of rows of log-probabilities, in nats. With words put together it is never more than with
    all of them apart."""
    p, q = _normalised(reference), _normalised(other)
    with np.errstate(invalid="ignore"):
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
    found: Array = np.maximum(terms.sum(-1), 0.0)
    return found


def _whole(values: Array, rest: Array) -> Array:
    return np.concatenate([values, rest[:, None]], -1)


def _columns(names: Sequence[str], rows: Sequence[tuple[Array, ...]]) -> dict[str, Array]:
    """Nothing, if there were no tokens."""
    columns = [np.concatenate(column) for column in zip(*rows, strict=True)]
    return dict(zip(names, columns, strict=False))


def _normalised(rows: Array) -> Array:
    """float32 is off by 1e-7, which would be a divergence, and a negative one as often as not."""
    wide = rows.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
