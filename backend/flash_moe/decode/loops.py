"""Notices a reply that goes round in circles, as models do at 2 bits or without sampling."""

from __future__ import annotations

import numpy as np

# The longest span of tokens whose repetition is noticed.
LONGEST = 128
# So often, and so many tokens in all: a table or a list of zeros may go on for a while.
TIMES, TOKENS = 8, 256


class Loops:
    """4 µs a token."""

    def __init__(self) -> None:
        periods = np.arange(1, LONGEST + 1)
        # The last tokens, the latest first; and of each period, how many tokens in a row are equal
        # to the one that was a period before.
        self._last = np.full(LONGEST, -1)
        self._equal = np.zeros(LONGEST, np.int64)
        self._enough = np.maximum(TOKENS, TIMES * periods) - periods

    def closed_by(self, token: int) -> bool:
        """Whether the reply has said the same too often, with this token."""
        self._equal = np.where(self._last == token, self._equal + 1, 0)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        return bool((self._equal >= self._enough).any())
