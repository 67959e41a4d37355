"""The constraints that grammars give to replies: state machines over tokens."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from flash_moe.chat.thought import Thought
from flash_moe.decode.constraint import Constraint, Mask
from flash_moe.errors import FlashMoeError

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Matching:
    """Follows a grammar from the first token to the last."""

    holds = True

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        # A matcher in error also counts itself as stopped.
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_accepting())

    def mask(self) -> Mask:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> bool:
        # The token that ends the turn, after a finished value, is not part of the grammar.
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
            lines = self._matcher.get_error().strip().splitlines()
            raise FlashMoeError(
                f"The reply cannot follow its grammar any further ({lines[0] if lines else '?'}). "
                "A schema with shorter limits, or none, would work."
            )


class Calling:
    """Free text with tool calls: each follows its grammar, from the token that starts it to its
    end."""

    finished = False

    def __init__(self, start: int, call: LLMatcher, *, inside: bool, at_once: bool) -> None:
        self._start = start
        # Every call takes a copy of it.
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
    """A value, or tool calls with free text after them: the first token decides."""

    def __init__(self, start: int, call: LLMatcher, value: Matching) -> None:
        self._start = start
        self._template = call
        self._value = value
        # The one of the two that the first token stands for.
        self._branch: Matching | Calling | None = None

    @property
    def finished(self) -> bool:
        return self._branch is not None and self._branch.finished

    @property
    def complete(self) -> bool:
        return self._branch is not None and self._branch.complete

    @property
    def holds(self) -> bool:
        return self._branch is None or self._branch.holds

    def mask(self) -> Mask | None:
        if self._branch is not None:
            return self._branch.mask()
        mask = self._value.mask()
        mask[self._start] = True
        return mask

    def accept(self, token: int) -> bool:
        if self._branch is not None:
            return self._branch.accept(token)
        if token == self._start:
            self._branch = Calling(token, self._template, inside=True, at_once=False)
            return True
        self._branch = self._value
        return self._branch.accept(token)

    def forced(self) -> list[int]:
        return [] if self._branch is None else self._branch.forced()


class Thinking:
    """Free while the model thinks, for at most `budget` tokens; then the answer's constraint.

    With `answer_needed`, a turn that ends inside a thought closes the thought instead, the text
    that the template writes after a thought is forced, and no second thought can begin.
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
        self._budget = budget
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
        if self._budget is not None:
            self._budget -= 1
            self._close_if_spent()
        return True

    def _close_if_spent(self) -> None:
        if self._inside and self._budget is not None and self._budget <= 0:
            self._close()

    def _close(self) -> None:
        self._inside = False
        self._queue.extend(self._thought.closing)
