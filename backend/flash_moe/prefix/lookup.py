"""Keys of states: a hash of the token ids and the cuts between them, for all cuts at once.

Finding the longest saved prefix takes one pass over the ids and one lookup for each cut; no large
file is opened. A state that matches by key is still compared by its ids before it is used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_LETTERS = 40


def state_keys(ids: Sequence[int], ends: Sequence[int], scope: str) -> dict[int, str]:
    """The key of the state at every end of a chunk. `scope` says whose states these are."""
    digest = hashlib.sha256(scope.encode() + b"\0")
    keys, start = {}, 0
    for end in ends:
        digest.update((end - start).to_bytes(8, "little"))
        digest.update(array("Q", ids[start:end]).tobytes())
        keys[end] = digest.copy().hexdigest()[:KEY_LETTERS]
        start = end
    return keys
