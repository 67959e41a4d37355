"""The folder that a pack is made in, `NAME.partial`: for one process at a time, and only for work
that it was begun with.

Its `source.json` identifies the source and the transform, so that a killed pack is resumed by the
same command and by no other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from flash_moe.checkpoint.folder import Folder
from flash_moe.errors import CheckpointError, NoSpace, Remedy
from flash_moe.format.atomic import locked_folder, write_json
from flash_moe.format.holes import allocated
from flash_moe.format.json_files import read_json
from flash_moe.format.manifest import MANIFEST
from flash_moe.pack.transform import ExpertTransform

IDENTITY = "source.json"
SAMPLES, SAMPLE_BYTES = "samples", 4096
# Inside of the workspace, what will be the pack.
PACK = "pack"


@contextmanager
def open_workspace(target: Path, nbytes: int, identity: dict[str, Any]) -> Iterator[Path]:
    """The folder beside `target`, with room for `nbytes` in all."""
    require_absent(target)
    workspace = workspace_of(target)
    require_space(target, nbytes)
    busy = f"Another pack is being written to {workspace}."
    with locked_folder(workspace, busy):
        require_same(workspace, identity)
        write_json(workspace / IDENTITY, identity)
        require_absent(target)  # again: another process may have finished it
        yield workspace


def identity_of(folder: Folder, transform: ExpertTransform | None) -> dict[str, Any]:
    """The source, by its headers and by samples of every tensor (all of them are too much to hash
    twice; two fine-tunes of one model have equal headers), and the transform. Written to disk:
    packs that an older version began are resumed by these keys, before it had samples."""
    digest = hashlib.sha256((folder.path / "config.json").read_bytes())
    for tensor in sorted(folder.tensors.values(), key=lambda tensor: tensor.name):
        digest.update(repr((tensor.name, tensor.dtype, tensor.shape, tensor.offset)).encode())
        digest.update(tensor.file.name.encode())
    source = {"source": digest.hexdigest(), SAMPLES: _samples(folder)}
    return source if transform is None else {**source, "recast": transform.to_json()}


def _samples(folder: Folder) -> str:
    """The beginning, the middle and the end of each tensor."""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        files = {
            file: stack.enter_context(file.open("rb"))
            for file in sorted({tensor.file for tensor in folder.tensors.values()})
        }
        for _, tensor in sorted(folder.tensors.items()):
            last = max(0, tensor.nbytes - SAMPLE_BYTES)
            for at in (0, last // 2, last):
                size = min(SAMPLE_BYTES, tensor.nbytes)
                digest.update(os.pread(files[tensor.file].fileno(), size, tensor.offset + at))
    return digest.hexdigest()


def require_absent(target: Path) -> None:
    if (target / MANIFEST).is_file():
        raise CheckpointError(
            f"{target} exists already: a finished pack.", Remedy.ADD_AGAIN, target
        )
    if target.exists():
        raise CheckpointError(f"{target} exists. Remove it first, or choose another target.")


def require_same(workspace: Path, identity: dict[str, Any]) -> None:
    """CheckpointError, if what was begun there is something else."""
    file = workspace / IDENTITY
    begun = read_json(file) if file.exists() else identity
    if SAMPLES in identity and SAMPLES not in begun:
        begun = {**begun, SAMPLES: identity[SAMPLES]}
    if begun != identity:
        raise CheckpointError(
            f"{workspace} was begun from another checkpoint, with other bits or another text. "
            "Remove it, or choose another target."
        )


def workspace_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def free_space(target: Path) -> int:
    """Of the disk that `target` will be on."""
    return shutil.disk_usage(_disk(target)).free


def require_space(target: Path, nbytes: int) -> None:
    """NoSpace, if there is no room for `nbytes` in all, with what is there already."""
    missing, free = nbytes - allocated(workspace_of(target)), free_space(target)
    if missing > free:
        raise NoSpace(
            f"The pack needs {missing / 1e9:.1f} GB more, and {_disk(target)} has "
            f"{free / 1e9:.1f} GB free. Free some space, or choose another target.",
            Remedy.PACK_ELSEWHERE,
        )


def _disk(target: Path) -> Path:
    return next(folder for folder in target.absolute().parents if folder.exists())
