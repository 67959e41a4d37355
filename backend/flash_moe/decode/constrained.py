"""Steps a reply through its constraint: masks the logits, and counts what that did.

The mask is computed on the CPU after the last of the forward pass was handed to MLX and before
anything of it is read, so that the two run at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import mlx.core as mx
import numpy as np

from flash_moe.decode.constraint import Constraint, Mask
from flash_moe.decode.statistics import Stats


class ConstraintStepper:
    """One reply's constraint, or None, which then costs nothing and changes nothing."""

    def __init__(self, constraint: Constraint | None, stats: Stats) -> None:
        self._constraint = constraint
        self._stats = stats
        # For every token chosen under a mask: how much of the probability the mask allowed.
        self.allowed_masses: list[float] = []
        self._total_mass = 0.0
        # The mass of the token being chosen, until its mask is known to have served.
        self._pending: mx.array | None = None

    @property
    def finished(self) -> bool:
        return self._constraint is not None and self._constraint.finished

    @property
    def holds(self) -> bool:
        """Whether the next token has a mask."""
        return self._constraint is not None and self._constraint.holds

    def forced(self, room: int) -> list[int]:
        """All tokens that have no alternative now, at most `room`, accepted."""
        tokens: list[int] = []
        if self._constraint is None:
            return tokens
        with self._timed():
            while len(tokens) < room and (more := self._constraint.forced()):
                for token in more[: room - len(tokens)]:
                    self._constraint.accept(token)
                    tokens.append(token)
        self._stats.forced_tokens += len(tokens)
        self._stats.constrained_tokens += len(tokens)
        return tokens

    def restrict(self, logits: mx.array) -> mx.array:
        """Logits [1, vocabulary] with minus infinity for every token that may not be said."""
        self._pending = None
        if self._constraint is None:
            return logits
        mx.async_eval(logits)
        with self._timed():
            mask = self._constraint.mask()
        if mask is None:
            return logits
        may = _of_width(mask, logits.shape[-1])
        allowed = mx.where(may, logits, mx.array(-float("inf"), dtype=logits.dtype))
        own = mx.softmax(logits.astype(mx.float32), axis=-1)
        self._pending = mx.where(may, own, 0.0).sum()
        mx.async_eval(allowed, self._pending)
        return allowed

    def accept(self, token: int) -> bool:
        """Whether a chosen token is said."""
        if self._constraint is None:
            return True
        if self._pending is not None:
            self.allowed_masses.append(cast(float, self._pending.item()))
            self._total_mass += self.allowed_masses[-1]
            self._stats.constrained_tokens += 1
            self._stats.allowed_mass = self._total_mass / len(self.allowed_masses)
        with self._timed():
            return self._constraint.accept(token)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._stats.mask_seconds += time.perf_counter() - start


def _of_width(mask: Mask, width: int) -> mx.array:
    """A head is often wider than its tokenizer's vocabulary: what has no text may not be said."""
    fitted = np.zeros(width, np.bool_)
    fitted[: len(mask)] = mask[:width]
    return mx.array(fitted)
