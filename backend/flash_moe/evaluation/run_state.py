"""The results of an evaluation that is not over, so that the same one can be resumed later.

One file an item, which takes its name when it is complete, in a folder that is named after all
that the results depend on. It is removed when the evaluation is over.
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
from flash_moe.evaluation.held_out import HeldOut
from flash_moe.evaluation.predictions import RECORDED
from flash_moe.evaluation.results import ItemResult
from flash_moe.format.sealed import Damaged
from flash_moe.prefix.fingerprint import fingerprint

# An evaluation of the 397B takes 50 MB, or 150 with its predictions; after a month it is stale.
STALE_SECONDS = 30 * 24 * 3600
SUFFIX = ".finding"


class RunState:
    """Use it in a `with`: the folder is locked inside, and removed at the end if it has no
    results."""

    def __init__(self, parent: Path, key: str) -> None:
        self.folder = parent / key
        self._open = ExitStack()

    def __enter__(self) -> RunState:
        _remove_stale(self.folder.parent)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = self._open.enter_context((self.folder / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._open.close()
            raise OptionError(
                "Another process is running this same evaluation: wait until it ends."
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._open.close()

    @property
    def done(self) -> int:
        """How many items have results."""
        return len(self._files())

    def get(self, number: int) -> ItemResult | None:
        """The results of an item; None if there are none, or they are damaged."""
        try:
            about, arrays = open_arrays(self._file(number))
            return ItemResult.from_json(about, arrays)
        except (Damaged, CheckpointError, FileNotFoundError, LookupError, TypeError):
            return None

    def put(self, number: int, result: ItemResult) -> None:
        write_arrays(self._file(number), result.to_json(), result.arrays)

    def clear(self) -> None:
        """Forget all results: the evaluation is over."""
        for file in self._files():
            file.unlink()

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}{SUFFIX}"

    def _files(self) -> list[Path]:
        return list(self.folder.glob(f"[0-9]*{SUFFIX}"))


class SavedPredictions(Mapping[str, Array]):
    """The predictions recorded in a run's files, as write_reference takes them. One file at a time
    is open."""

    def __init__(self, state: RunState, items: int) -> None:
        self._get = lru_cache(1)(state.get)
        self._places: dict[str, tuple[int, str]] = {}
        for number in range(items):
            result = state.get(number)
            if result is not None and result.arrays.keys() >= set(RECORDED):
                columns = {f"{result.key}.{name}": (number, name) for name in RECORDED}
                self._places.update(columns)

    def __getitem__(self, place: str) -> Array:
        number, name = self._places[place]
        result = self._get(number)
        if result is None:
            raise CheckpointError("Results of this evaluation have disappeared: run it again.")
        return result.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def key_of_run(engine: Engine, held_out: HeldOut, *more: Any) -> str:
    """All that results depend on: the model and how it is run, its tokenizer, the data, and `more`,
    which is JSON."""
    template = engine.tokenizer.template
    items = [asdict(item) for item in held_out.items]
    source = None if template is None else template.source
    tokenizer = engine.tokenizer.tokenizer.to_str(), source
    text = json.dumps([fingerprint(engine.model), tokenizer, items, more])
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _remove_stale(parent: Path) -> None:
    with suppress(FileNotFoundError):
        for folder in parent.iterdir():
            with suppress(FileNotFoundError):
                if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
