"""Snapshots on disk, shared by processes: one file each, in a folder of bounded size.

A faulty file is ignored and removed, and the reply goes on without it. A faulty folder raises
NotSaved. Any number of processes may share a folder: a file gets its name when it is complete and
never changes afterwards.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.arrays import dtype_name, mlx_dtype
from flash_moe.errors import CheckpointError
from flash_moe.format import sealed
from flash_moe.format.atomic import sync
from flash_moe.format.dtypes import BY_NAME, BY_SAFETENSORS
from flash_moe.format.sealed import Damaged, SealedArray
from flash_moe.prefix.folder import file_name, make_room
from flash_moe.prefix.state import NotSaved, Snapshot

# Saved prompts must not fill the disk.
KEEP_FREE = 256 << 20
_counter = itertools.count()


class DiskSnapshots:
    """`scope` is the fingerprint of the model, `model` describes it for people."""

    def __init__(self, folder: Path, limit: int, scope: str, model: dict[str, Any]) -> None:
        self.folder = folder
        self._limit = limit
        self._scope = scope
        self._model = json.dumps(model)

    def get(self, key: str, ids: Sequence[int], ends: Sequence[int]) -> Snapshot | None:
        """The snapshot of a prompt's start, if there is one and it is sound."""
        path = self.folder / file_name(key)
        try:
            path.open("rb").close()  # only what can be opened can be damaged
            snapshot = self._read(path)
            if not snapshot.holds(ids, ends):
                raise Damaged("it belongs to another prompt")
        except (Damaged, CheckpointError):
            self.remove(key)
            return None
        except OSError:  # missing, just removed, or not readable for us
            return None
        _touch(path)
        return snapshot

    def put(self, key: str, snapshot: Snapshot) -> None:
        """Write a snapshot; NotSaved, with the reason, if that fails."""
        path = self.folder / file_name(key)
        metadata = {
            "scope": self._scope,
            "model": self._model,
            "tokens": str(len(snapshot.tokens)),
            "structure": json.dumps(snapshot.structure),
        }
        arrays = _sealed_arrays(snapshot)
        head = sealed.header(metadata, arrays)
        nbytes = sealed.file_bytes(head, arrays)
        try:
            if path.exists():
                _touch(path)
            elif nbytes > self._limit:
                raise OSError(f"it takes {nbytes:,} bytes, and the limit is {self._limit:,}")
            else:
                # Conversations are private.
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                make_room(self.folder, self._limit - nbytes)
                if shutil.disk_usage(self.folder).free < nbytes + KEEP_FREE:
                    raise OSError("the disk is nearly full")
                _write(path, head, arrays)
        except OSError as error:
            raise NotSaved(
                f"The prompt cannot be saved in {self.folder} ({error.strerror or error}); "
                "another process will have to read it from the start."
            ) from error

    def remove(self, key: str) -> None:
        with suppress(OSError):
            (self.folder / file_name(key)).unlink()

    def _read(self, path: Path) -> Snapshot:
        arrays = {name: _unseal(array) for name, array in sealed.read_arrays(path)}
        # The checksum is right, so some process wrote this, but not necessarily for our model.
        metadata = sealed.read_metadata(path)
        if metadata.get("scope") != self._scope:
            raise Damaged("it belongs to another model")
        try:
            tokens, ends = _numbers(arrays.pop("tokens")), _numbers(arrays.pop("ends"))
            structure = json.loads(metadata["structure"])
            return Snapshot(tokens, ends, structure, [arrays[str(n)] for n in range(len(arrays))])
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(str(error)) from error


def _sealed_arrays(snapshot: Snapshot) -> dict[str, SealedArray]:
    arrays = {str(number): array for number, array in enumerate(snapshot.arrays)}
    arrays["tokens"] = mx.array(snapshot.tokens, mx.uint32)
    arrays["ends"] = mx.array(snapshot.ends, mx.uint32)
    return {name: _seal(array) for name, array in arrays.items()}


def _seal(array: mx.array) -> SealedArray:
    raw = np.asarray(array.reshape(-1).view(mx.uint8))
    return SealedArray(BY_NAME[dtype_name(array.dtype)].safetensors, tuple(array.shape), raw.data)


def _unseal(array: SealedArray) -> mx.array:
    dtype = BY_SAFETENSORS[array.dtype].name
    if dtype is None:
        raise Damaged(f"MLX has no type {array.dtype}")
    raw = mx.array(np.frombuffer(array.data, np.uint8))
    unsealed = raw.view(mlx_dtype(dtype)).reshape(array.shape)
    mx.eval(unsealed)
    return unsealed


def _numbers(array: mx.array) -> tuple[int, ...]:
    return tuple(np.asarray(array).tolist())


def _touch(path: Path) -> None:
    """Mark a file as just used, by its time of modification, unless the folder is read-only."""
    with suppress(OSError):
        os.utime(path)


def _write(path: Path, head: bytes, arrays: dict[str, SealedArray]) -> None:
    # Another process, or another thread of this one, may be writing the same snapshot.
    number = f"{os.getpid()}{next(_counter):04}"
    temporary = path.with_name(f".{path.name}.{number}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            # Tells others that the file is in use. Some network drives have no locks.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            sealed.write(file, head, arrays)
            temporary.rename(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
