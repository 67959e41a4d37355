"""The findings of an evaluation that is not over, so that the same one can go on later.

A file each, which takes its name when it is whole, in a folder that is named after all that the
findings depend on. When the evaluation is over the folder goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from flash_moe.engine import Engine
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.evaluation.arrays import Array, open_arrays, write_arrays
from flash_moe.evaluation.findings import Finding
from flash_moe.evaluation.held_out import HeldOut
from flash_moe.evaluation.reference import KEPT
from flash_moe.format.sealed import Damaged
from flash_moe.prefix.fingerprint import fingerprint

# Nobody goes on after a month, and one of the 397B takes 50 MB, or 150 with what it foresaw.
FORGOTTEN_SECONDS = 30 * 24 * 3600


class Unfinished:
    """Use it in a `with`: without an error the findings are removed at its end."""

    def __init__(self, parent: Path, key: str) -> None:
        self.folder = parent / key
        self._open = ExitStack()

    def __enter__(self) -> Unfinished:
        _forget(self.folder.parent)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._open.enter_context((self.folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._open.close()
            raise OptionError("Another process measures just this: wait for its end.") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._open.close()

    @property
    def done(self) -> int:
        return len(list(self.folder.glob("[0-9]*.finding")))

    def get(self, number: int) -> Finding | None:
        """What was found of an item; None if it was not, or not to its end."""
        try:
            about, arrays = open_arrays(self._file(number))
            return Finding.from_json(about, arrays)
        except (Damaged, CheckpointError, FileNotFoundError, LookupError, TypeError):
            return None

    def put(self, number: int, finding: Finding) -> None:
        write_arrays(self._file(number), finding.to_json(), finding.arrays)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.finding"


class Foreseen(Mapping[str, Array]):
    """What was kept for a reference, from the findings' files, of which one at a time is open."""

    def __init__(self, unfinished: Unfinished, items: int) -> None:
        self._get = lru_cache(1)(unfinished.get)
        self._places: dict[str, tuple[int, str]] = {}
        for number in range(items):
            finding = unfinished.get(number)
            if finding is not None and finding.arrays.keys() >= set(KEPT):
                self._places.update({f"{finding.key}.{name}": (number, name) for name in KEPT})

    def __getitem__(self, place: str) -> Array:
        number, name = self._places[place]
        finding = self._get(number)
        if finding is None:
            raise CheckpointError("What was found is gone. Give the same command again.")
        return finding.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def key_of_run(engine: Engine, held_out: HeldOut, *more: Any) -> str:
    """All that findings depend on: the model and how it is run, its words, the data, and `more`."""
    template = engine.tokenizer.template
    items = [asdict(item) for item in held_out.items]
    words = engine.tokenizer.tokenizer.to_str(), None if template is None else template.source
    whole = json.dumps([fingerprint(engine.model), words, items, more])
    return hashlib.sha256(whole.encode()).hexdigest()[:40]


def _forget(parent: Path) -> None:
    with suppress(FileNotFoundError):
        for folder in parent.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > FORGOTTEN_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
