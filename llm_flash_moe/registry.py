"""Which models the user has: a name, a folder, a default K. One small JSON file."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flash_moe import BUILT_IN, write_json
from llm_flash_moe import paths
from llm_flash_moe.errors import PluginError
from llm_flash_moe.known import KNOWN

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")


@dataclass(frozen=True, slots=True)
class Entry:
    """`managed` folders were made by us and are deleted with their entry; others never are."""

    path: str
    experts: int | None = None
    managed: bool = False


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A pull or a pack that was begun: what it will be, and the command that goes on with it."""

    target: Path
    command: str

    @property
    def folder(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")


class _Saved(NamedTuple):
    """What the file holds."""

    models: dict[str, Entry]
    unfinished: dict[str, dict[str, str]]


BUILT_IN_ENTRIES = {name: Entry(str(path)) for name, path in BUILT_IN.items()}


class Registry:
    """`built_in` models are always there, cannot be removed, and are not written to the file."""

    def __init__(self, file: Path, built_in: Mapping[str, Entry] | None = None) -> None:
        self.file = file
        self.built_in = dict(built_in or {})

    @classmethod
    def of_user(cls) -> Registry:
        return cls(paths.home() / "models.json", BUILT_IN_ENTRIES)

    def entries(self) -> dict[str, Entry]:
        """All models; PluginError if the file is damaged (it is left as it is)."""
        added = self._added()
        return self.built_in | {name: added[name] for name in added if name not in self.built_in}

    def get(self, name: str) -> Entry:
        entries = self.entries()
        if name not in entries:
            if (work := self.unfinished().get(name)) is not None:
                raise PluginError(f"{name} is not finished. Go on with: {work.command}")
            if name in KNOWN:
                raise PluginError(
                    f"{name} has no weights on this machine yet. Get them with: "
                    f"llm flash-moe pull {name}"
                )
            known = ", ".join(sorted(entries)) or "none yet"
            raise PluginError(f"There is no model {name!r}. Known: {known}.")
        return entries[name]

    def find(self, name: str) -> tuple[Path, int | None]:
        """The folder and K of a known model, or of a checkpoint named by its folder."""
        path = Path(name).expanduser()
        if name not in self.entries() and path.is_dir():
            return path.resolve(), None
        entry = self.get(name)
        return folder_of(name, entry), entry.experts

    def add(self, name: str, entry: Entry) -> None:
        self.require_free(name)
        with self._changing() as saved:
            if name in saved.models:
                raise _taken(name)
            saved.models[name] = entry
            saved.unfinished.pop(name, None)

    def begin(self, name: str, target: Path, command: str) -> None:
        """Note where something is being written for hours, and the command that goes on with it."""
        with self._changing() as saved:
            work = self.unfinished().get(name)
            if work is not None and work.target != target:
                # Whoever forgets where it is never frees its disk.
                raise PluginError(
                    f"{name} is not finished in {work.folder}. Go on with: {work.command}, or "
                    f"delete it: llm flash-moe remove {name}, or choose another --name."
                )
            saved.unfinished[name] = {"path": str(target), "command": command}

    def unfinished(self) -> dict[str, Unfinished]:
        """What was begun, and is neither a model yet nor gone."""
        saved = self._saved()
        begun = {
            name: Unfinished(Path(value["path"]), value["command"])
            for name, value in saved.unfinished.items()
            if name not in saved.models
        }
        return {name: work for name, work in begun.items() if work.folder.is_dir()}

    def forget(self, name: str) -> None:
        """What was unfinished is gone."""
        with self._changing() as saved:
            saved.unfinished.pop(name, None)

    def remove(self, name: str) -> Entry:
        if name in self.built_in:
            raise PluginError(f"{name} comes with the package and goes only with it.")
        entry = self.get(name)
        with self._changing() as saved:
            saved.models.pop(name, None)
        return entry

    def require_free(self, name: str) -> None:
        """PluginError, before any work, for a name that cannot be used."""
        # Unfinished packs and synthetic models are written to NAME.partial.
        if not _NAME.fullmatch(name) or ".." in name or name.endswith(".partial"):
            raise PluginError(
                f"{name!r} cannot be a model's name: use letters, digits, '.', '_', '-' and '/', "
                "without '.partial' at the end. Choose one with --name."
            )
        if name in self.built_in:
            raise PluginError(
                f"{name} is the model that comes with the package. Choose another --name."
            )
        if name in self._added():
            raise _taken(name)

    def _added(self) -> dict[str, Entry]:
        return self._saved().models

    def _saved(self) -> _Saved:
        try:
            raw = self.file.read_bytes()
        except FileNotFoundError:
            return _Saved({}, {})
        except OSError as error:
            raise PluginError(f"Cannot read {self.file}: {error.strerror}.") from error
        try:
            value = json.loads(raw)
            models = {str(name): _entry(entry) for name, entry in value["models"].items()}
            # Files of older versions have none.
            unfinished = {
                str(name): {"path": str(work["path"]), "command": str(work["command"])}
                for name, work in value.get("unfinished", {}).items()
            }
            return _Saved(models, unfinished)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PluginError(
                f"{self.file} is damaged ({error}). Correct it, or move it away and add your "
                "models again: llm flash-moe add PATH"
            ) from error

    @contextmanager
    def _changing(self) -> Iterator[_Saved]:
        """Read, change, write, with other processes locked out in between."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                saved = self._saved()
                yield saved
                models = {name: asdict(entry) for name, entry in sorted(saved.models.items())}
                begun = {"unfinished": saved.unfinished} if saved.unfinished else {}
                write_json(self.file, {"version": 1, "models": models, **begun})
        except OSError as error:
            raise PluginError(f"Cannot write {self.file}: {error.strerror}.") from error


def folder_of(name: str, entry: Entry) -> Path:
    """The folder of a known model, if it is still there."""
    path = Path(entry.path)
    if not path.is_dir():
        raise PluginError(
            f"The folder of {name!r} is gone: {path}. Put it back, or remove the model from the "
            f"list: llm flash-moe remove {name}"
        )
    return path


def _taken(name: str) -> PluginError:
    return PluginError(
        f"There is already a model {name!r}. Choose another --name, or remove it first: "
        f"llm flash-moe remove {name}"
    )


def _entry(value: Any) -> Entry:
    experts = value.get("experts")
    if not isinstance(value["path"], str) or not (experts is None or type(experts) is int):
        raise ValueError("an entry is not a path with a number of experts")
    return Entry(value["path"], experts, value.get("managed") is True)
