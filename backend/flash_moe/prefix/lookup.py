"""Names for states: a hash of the token ids and of the cuts between them, for every cut at once.

Finding the longest kept prefix costs one pass over the ids and a look at one name a cut; nothing
large is opened. Whoever finds a state compares the ids themselves as well.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_LETTERS = 40


def keys(ids: Sequence[int], ends: Sequence[int], scope: str) -> dict[int, str]:
    """For every end of a chunk, the key of the state there. `scope` says whose states these are."""
    digest = hashlib.sha256(scope.encode() + b"\0")
    found, start = {}, 0
    for end in ends:
        digest.update((end - start).to_bytes(8, "little"))
        digest.update(array("Q", ids[start:end]).tobytes())
        found[end] = digest.copy().hexdigest()[:KEY_LETTERS]
        start = end
    return found
