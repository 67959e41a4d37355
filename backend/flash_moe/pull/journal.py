"""How far a pull is, in a file that is replaced as a whole: what it says is on the disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from flash_moe.errors import CheckpointError
from flash_moe.format.atomic import write_json
from flash_moe.format.json_files import read_json

# The repository that a pull began with. Without it, nothing in a workspace counts.
PULL = "pull.json"
PROGRESS = "progress.json"


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
        write_json(workspace / PROGRESS, asdict(self))

    @classmethod
    def read(cls, workspace: Path) -> Journal:
        path = workspace / PROGRESS
        if not path.exists():
            return cls()
        value = read_json(path)
        try:
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
