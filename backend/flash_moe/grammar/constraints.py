"""What may be said next, while a reply is made: the states that a grammar puts a reply through.

A constraint serves one reply. It knows tokens alone, neither logits nor the model.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from flash_moe.chat.thought import Thought
from flash_moe.errors import FlashMoeError

if TYPE_CHECKING:
    from llguidance import LLMatcher

# One bool a token of the vocabulary; what a model's head has beyond it may not be said.
Mask = NDArray[np.bool_]


class Constraint(Protocol):
    @property
    def finished(self) -> bool:
        """All is said: nothing but the end of the turn could follow."""

    @property
    def complete(self) -> bool:
        """Whether what was said so far is whole: it could end here."""

    @property
    def holds(self) -> bool:
        """Whether not every token may come next."""

    def mask(self) -> Mask | None:
        """The tokens that may come next; None where every token may. Changes nothing."""

    def accept(self, token: int) -> bool:
        """Go on by a token. False: it is not said, and `forced` has what is said instead."""

    def forced(self) -> list[int]:
        """The next tokens as far as there is no choice; each still has to be accepted."""


class Free:
    """No constraint, in the place of one."""

    finished = False
    complete = True
    holds = False

    def mask(self) -> Mask | None:
        return None

    def accept(self, token: int) -> bool:
        return True

    def forced(self) -> list[int]:
        return []


class Matching:
    """Held to a grammar from the first token to the last."""

    holds = True

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        # A matcher in error calls itself stopped, too.
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def mask(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> bool:
        # Where nothing can follow, the end of the turn is no longer the grammar's.
        if not self.finished:
            self._matcher.consume_token(token)
            self._check()
        return True

    def forced(self) -> list[int]:
        tokens: list[int] = [] if self.finished else self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().strip().splitlines()
            raise FlashMoeError(
                f"The reply cannot be held to its grammar any longer ({said[0] if said else '?'}). "
                "A schema with shorter limits, or none, would work."
            )


class Calling:
    """Free text, and from each token that starts a call to that call's end, its grammar."""

    finished = False

    def __init__(self, start: int, call: LLMatcher, *, inside: bool, at_once: bool) -> None:
        self._start = start
        # Not used itself: every call takes a copy.
        self._template = call
        self._call: Matching | None = self._new() if inside else None
        self._at_once = at_once and not inside

    @property
    def complete(self) -> bool:
        return self._call is None and not self._at_once

    @property
    def holds(self) -> bool:
        return self._call is not None

    def mask(self) -> Mask | None:
        return None if self._call is None else self._call.mask()

    def accept(self, token: int) -> bool:
        self._at_once = False
        if self._call is None:
            self._call = self._new() if token == self._start else None
            return True
        self._call.accept(token)
        if self._call.finished:
            self._call = None
        return True

    def forced(self) -> list[int]:
        if self._at_once:
            return [self._start]
        return [] if self._call is None else self._call.forced()

    def _new(self) -> Matching:
        return Matching(self._template.deep_copy())


class Either:
    """A value or calls: the first token decides. After a call all is free, as with tools alone."""

    def __init__(self, start: int, call: LLMatcher, value: Matching) -> None:
        self._start = start
        self._template = call
        self._value = value
        # What was decided for.
        self._taken: Matching | Calling | None = None

    @property
    def finished(self) -> bool:
        return self._taken is not None and self._taken.finished

    @property
    def complete(self) -> bool:
        return self._taken is not None and self._taken.complete

    @property
    def holds(self) -> bool:
        return self._taken is None or self._taken.holds

    def mask(self) -> Mask | None:
        if self._taken is not None:
            return self._taken.mask()
        mask = self._value.mask()
        mask[self._start] = True
        return mask

    def accept(self, token: int) -> bool:
        if self._taken is not None:
            return self._taken.accept(token)
        if token == self._start:
            self._taken = Calling(token, self._template, inside=True, at_once=False)
            return True
        self._taken = self._value
        return self._taken.accept(token)

    def forced(self) -> list[int]:
        return [] if self._taken is None else self._taken.forced()


class Thinking:
    """Free while the model thinks, at most `budget` tokens; then what the answer is held to.

    `answer_needed`: the answer is one value, so a turn that ends inside of the thought closes the
    thought instead, what the template writes after a thought is forced, and no second thought
    begins.
    """

    def __init__(
        self,
        thought: Thought,
        answer: Constraint,
        *,
        inside: bool,
        budget: int | None,
        answer_needed: bool,
        stop_tokens: frozenset[int],
    ) -> None:
        self._thought = thought
        self._answer = answer
        self._inside = inside
        self._left = budget
        self._answer_needed = answer_needed
        self._stop_tokens = stop_tokens
        self._queue: deque[int] = deque()
        self._close_if_spent()

    @property
    def finished(self) -> bool:
        return not self._inside and not self._queue and self._answer.finished

    @property
    def complete(self) -> bool:
        return not self._inside and not self._queue and self._answer.complete

    @property
    def holds(self) -> bool:
        return not self._inside and not self._queue and self._answer.holds

    def mask(self) -> Mask | None:
        return None if self._inside or self._queue else self._answer.mask()

    def forced(self) -> list[int]:
        if self._queue:
            return list(self._queue)
        return [] if self._inside else self._answer.forced()

    def accept(self, token: int) -> bool:
        if self._queue:
            self._queue.popleft()
            return True
        if self._inside:
            return self._think(token)
        if token == self._thought.opens and not self._answer_needed:
            self._inside = True
            self._close_if_spent()
            return True
        return self._answer.accept(token)

    def _think(self, token: int) -> bool:
        if token in self._stop_tokens and self._answer_needed:
            self._close()
            return False
        if token == self._thought.closes:
            self._inside = False
            if self._answer_needed:
                self._queue.extend(self._thought.after)
            return True
        if self._left is not None:
            self._left -= 1
            self._close_if_spent()
        return True

    def _close_if_spent(self) -> None:
        if self._inside and self._left is not None and self._left <= 0:
            self._close()

    def _close(self) -> None:
        self._inside = False
        self._queue.extend(self._thought.closing)
