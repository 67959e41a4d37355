"""What a process is to hold, and the one name of it: equal only where replies would be equal."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flash_moe
from flash_moe.options import Settings

PROTOCOL = 1
MODEL = (".safetensors", ".experts", ".json", ".jinja", ".model", ".txt", ".tiktoken")
CODE = (".py", ".c", ".h", ".metal")
# What makes a reply of a request.
LIBRARIES = ("mlx", "mlx-lm", "tokenizers", "jinja2", "llguidance")
# Where compiled kernels are, and how many operations a GPU is given at once: no result changes, and
# this package sets them.
WITHOUT_EFFECT = ("MLX_PTX_CACHE_DIR", "MLX_MAX_OPS_PER_BUFFER")


@dataclass(frozen=True, slots=True)
class Loading:
    """What `Engine.load` is given; `prompts` is the folder of saved prompts."""

    path: Path
    settings: Settings = Settings()
    prompts: Path | None = None

    def identity(self) -> str:
        """A digest of all that a reply depends on. Made anew for every reply, in 4 ms: a folder
        that has changed, or code, is another one. FileNotFoundError if the folder is gone."""
        digest = hashlib.sha256()
        for text in (*self._model(), *_environment(), *_code()):
            digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        prompts = None if self.prompts is None else os.path.abspath(self.prompts)
        path = os.path.abspath(self.path)
        return {"path": path, "settings": asdict(self.settings), "prompts": prompts}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Loading:
        settings: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item
            for name, item in value["settings"].items()
        }
        prompts = value["prompts"]
        return cls(Path(value["path"]), Settings(**settings), prompts and Path(prompts))

    def _model(self) -> Iterator[str]:
        yield str(self.path.resolve())
        yield str(self.prompts and self.prompts.resolve())
        yield from (f"{one.name}={getattr(self.settings, one.name)}" for one in fields(Settings))
        yield from _files(self.path, MODEL)


def _environment() -> Iterator[str]:
    yield f"{PROTOCOL} {flash_moe.__version__} {platform.python_version()}"
    yield from (f"{name} {version(name)}" for name in LIBRARIES)
    yield f"{time.tzname}"  # templates may say what time it is
    for name, value in sorted(os.environ.items()):
        if name.startswith(("MLX_", "CUDA_VISIBLE")) and name not in WITHOUT_EFFECT:
            yield f"{name}={value}"


def _code() -> Iterator[str]:
    """A checkout changes without a new version number."""
    package = Path(flash_moe.__file__).parent
    shaders = package / "shaders"
    for top in (package, shaders if shaders.is_dir() else package.parents[1] / "shaders"):
        for folder, folders, _ in os.walk(top):
            folders.sort()
            yield from _files(Path(folder), CODE)


def _files(folder: Path, kinds: tuple[str, ...]) -> Iterator[str]:
    """What tells whether one of them was written, or put in another's place."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.endswith(kinds):
                status = entry.stat()
                times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
                yield f"{entry.path} {status.st_ino} {status.st_size} {times}"
