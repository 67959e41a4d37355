"""Snapshots across processes: one file each, in a folder of bounded size.

Whatever is wrong with a file, a reply goes on without it: it is ignored and removed. Whatever is
wrong with the folder is told once, by NotKept. Any number of processes may share it: a file takes
its name when it is complete, and is never changed after that.
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

from flash_moe.errors import CheckpointError
from flash_moe.format import sealed as record
from flash_moe.format.atomic import sync
from flash_moe.format.sealed import Damaged, Part
from flash_moe.prefix.folder import file_name, make_room
from flash_moe.prefix.state import NotKept, Snapshot

# What keeps prompts must not be what fills the disk.
KEEP_FREE = 256 << 20
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_counter = itertools.count()


class DiskSnapshots:
    """`scope` is the fingerprint of the model, `model` says the same for people."""

    def __init__(self, folder: Path, limit: int, scope: str, model: dict[str, Any]) -> None:
        self.folder = folder
        self._limit = limit
        self._scope = scope
        self._model = json.dumps(model)

    def get(self, key: str, ids: Sequence[int], ends: Sequence[int]) -> Snapshot | None:
        """The state of a prompt's start, if it is there and sound."""
        path = self.folder / file_name(key)
        try:
            path.open("rb").close()  # only what can be opened can be damaged
            snapshot = self._read(path)
            if not snapshot.holds(ids, ends):
                raise Damaged("it is another prompt's")
        except (Damaged, CheckpointError):
            self.remove(key)
            return None
        except OSError:  # not there, just removed, or not for us to read
            return None
        _touch(path)
        return snapshot

    def put(self, key: str, snapshot: Snapshot) -> None:
        """Write a snapshot; NotKept if that is not possible, with the reason for the user."""
        path = self.folder / file_name(key)
        metadata = {
            "scope": self._scope,
            "model": self._model,
            "tokens": str(len(snapshot.tokens)),
            "structure": json.dumps(snapshot.structure),
        }
        parts = _parts(snapshot)
        head = record.header(metadata, parts)
        nbytes = record.nbytes(head, parts)
        try:
            if path.exists():
                _touch(path)
            elif nbytes > self._limit:
                raise OSError(f"{nbytes:,} bytes are more than all may take, {self._limit:,}")
            else:
                # What was said to a model is nobody else's business.
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                make_room(self.folder, self._limit - nbytes)
                if shutil.disk_usage(self.folder).free < nbytes + KEEP_FREE:
                    raise OSError("the disk is nearly full")
                _write(path, head, parts)
        except OSError as error:
            raise NotKept(
                f"The prompt cannot be kept in {self.folder} ({error.strerror or error}); "
                "a later command will read it again from its start."
            ) from error

    def remove(self, key: str) -> None:
        with suppress(OSError):
            (self.folder / file_name(key)).unlink()

    def _read(self, path: Path) -> Snapshot:
        arrays = {name: _array(part) for name, part in record.read_parts(path)}
        # The checksum holds, so this is what some process wrote: but was it one like this?
        metadata = record.read_metadata(path)
        if metadata.get("scope") != self._scope:
            raise Damaged("it is another model's")
        try:
            tokens, ends = _numbers(arrays.pop("tokens")), _numbers(arrays.pop("ends"))
            structure = json.loads(metadata["structure"])
            return Snapshot(tokens, ends, structure, [arrays[str(n)] for n in range(len(arrays))])
        except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Damaged(str(error)) from error


def _parts(snapshot: Snapshot) -> dict[str, Part]:
    arrays = {str(number): array for number, array in enumerate(snapshot.arrays)}
    arrays["tokens"] = mx.array(snapshot.tokens, mx.uint32)
    arrays["ends"] = mx.array(snapshot.ends, mx.uint32)
    return {name: _part(array) for name, array in arrays.items()}


def _part(array: mx.array) -> Part:
    raw = np.asarray(array.reshape(-1).view(mx.uint8))
    return Part(_NAMES[array.dtype], tuple(array.shape), raw.data)


def _array(part: Part) -> mx.array:
    raw = mx.array(np.frombuffer(part.data, np.uint8))
    array = raw.view(DTYPES[part.dtype]).reshape(part.shape)
    mx.eval(array)
    return array


def _numbers(array: mx.array) -> tuple[int, ...]:
    return tuple(np.asarray(array).tolist())


def _touch(path: Path) -> None:
    """The time of modification says what was used last; a folder that is read-only has no use
    for that."""
    with suppress(OSError):
        os.utime(path)


def _write(path: Path, head: bytes, parts: dict[str, Part]) -> None:
    # Another process may be writing the same snapshot, and a thread of this one, too.
    number = f"{os.getpid()}{next(_counter):04}"
    temporary = path.with_name(f".{path.name}.{number}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            # Tells others that this is not a leftover; some network drives have no locks.
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            record.write(file, head, parts)
            temporary.rename(path)
        sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()
