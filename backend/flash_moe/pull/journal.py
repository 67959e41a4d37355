"""How far a pull is, in a file that is replaced as a whole: what it says is on the disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flash_moe.errors import CheckpointError
from flash_moe.format.atomic import write_json
from flash_moe.format.json_files import read_json

# The repository that a pull began with. Without it, nothing in a workspace counts.
PULL = "pull.json"
PROGRESS = "progress.json"
# Of all the rest: a number that is not what was written would seal layers that are not whole, and
# a hash's state is given to a library in C as it is.
DIGEST = "sha256"


@dataclass(slots=True)
class Journal:
    """All shards before number `shard` agree with their hashes. Of that one, everything before
    `offset` is where it belongs, and `hash` is the state of a hash of so much. `ahead` names
    tensors that were fetched before their turn."""

    shard: int = 0
    offset: int = 0
    hash: str | None = None
    ahead: list[str] = field(default_factory=list)

    def write(self, workspace: Path) -> None:
        value = asdict(self)
        write_json(workspace / PROGRESS, {**value, DIGEST: _digest(value)})

    @classmethod
    def read(cls, workspace: Path) -> Journal:
        path = workspace / PROGRESS
        if not path.exists():
            return cls()
        value = read_json(path)
        try:
            if value.pop(DIGEST, None) != _digest(value):
                raise TypeError("its checksum differs")
            journal = cls(**value)
            numbers = (journal.shard, journal.offset)
            if any(type(number) is not int or number < 0 for number in numbers):
                raise TypeError("a number that is none")
            if not isinstance(journal.hash, str | None):
                raise TypeError("a hash that is none")
            if not all(isinstance(name, str) for name in journal.ahead):
                raise TypeError("a name that is none")
            return journal
        except TypeError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}). Remove {workspace}, and pull again."
            ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
