"""The format of saved prompts does not change: files of earlier versions are read, and the same
snapshot gives the same file under the same name.

The writer below is independent of the product's: one from the documentation of the format alone.
A file is a safetensors file: the length of the header in 8 bytes, the header as compact JSON, the
arrays without gaps. Its last array, `checksum`, is the CRC-32 of all bytes before it.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.model.load import StreamedModel
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.lookup import state_keys
from flash_moe.prefix.state import Snapshot
from tests.prefix.conversations import contents, new_store, reply
from tests.prefix.saved_files import PROMPT, files

SCOPE, MODEL = "0123abcd", {"path": "/models/ä", "experts_per_token": 4, "bits": "4-bit"}
TOKENS, ENDS = (5, 6, 7, 1 << 20), (2, 4)
STRUCTURE = [
    {"class": "KVCache", "fields": {"keys": {"array": 0, "room": 256}, "offset": 4}},
    {"class": "ArraysCache", "fields": {"cache": {"list": [{"array": 1}, None]}}},
]
KEYS = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
# bfloat16 as its bits: 1.0, -2.0, 0.5.
RECURRENT = np.array([[0x3F80, 0xC000, 0x3F00]], np.uint16)

Array = tuple[str, Sequence[int], bytes]


def sealed_file(metadata: dict[str, str], arrays: dict[str, Array]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in {**arrays, "checksum": ("U32", [1], bytes(4))}.items():
        offsets = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        offset += len(data)
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    body = struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in arrays.values())
    return body + struct.pack("<I", zlib.crc32(body))


def saved_prompt() -> bytes:
    return sealed_file(
        {
            "scope": SCOPE,
            "model": json.dumps(MODEL),
            "tokens": str(len(TOKENS)),
            "structure": json.dumps(STRUCTURE),
        },
        {
            "0": ("F32", KEYS.shape, KEYS.tobytes()),
            "1": ("BF16", RECURRENT.shape, RECURRENT.tobytes()),
            "tokens": ("U32", [len(TOKENS)], struct.pack("<4I", *TOKENS)),
            "ends": ("U32", [len(ENDS)], struct.pack("<2I", *ENDS)),
        },
    )


def key_of(ids: Sequence[int], ends: Sequence[int], scope: str) -> str:
    """SHA-256 of the scope, then of every chunk: its length, its ids, each in 8 bytes."""
    data, start = scope.encode() + b"\0", 0
    for end in ends:
        data += struct.pack(f"<Q{end - start}Q", end - start, *ids[start:end])
        start = end
    return hashlib.sha256(data).hexdigest()[:40]


def snapshot() -> Snapshot:
    return Snapshot(
        TOKENS, ENDS, STRUCTURE, [mx.array(KEYS), mx.array(RECURRENT).view(mx.bfloat16)]
    )


@pytest.fixture
def disk(tmp_path: Path) -> DiskSnapshots:
    return DiskSnapshots(tmp_path, 1 << 20, SCOPE, MODEL)


def test_the_key_of_a_state() -> None:
    keys = state_keys([*TOKENS, 9], ENDS, SCOPE)
    assert keys == {end: key_of(TOKENS, [e for e in ENDS if e <= end], SCOPE) for end in ENDS}


def test_a_snapshot_is_written_as_ever(disk: DiskSnapshots) -> None:
    key = key_of(TOKENS, ENDS, SCOPE)
    disk.put(key, snapshot())
    assert files(disk.folder) == [f"v1-{key}.safetensors"]
    assert (disk.folder / f"v1-{key}.safetensors").read_bytes() == saved_prompt()


def test_an_earlier_file_is_read(disk: DiskSnapshots) -> None:
    key = key_of(TOKENS, ENDS, SCOPE)
    path = disk.folder / f"v1-{key}.safetensors"
    path.write_bytes(saved_prompt())
    read = disk.get(key, [*TOKENS, 9], ENDS)
    assert read is not None
    assert contents(read) == contents(snapshot())
    assert path.read_bytes() == saved_prompt()


def test_a_file_with_a_type_that_mlx_lacks_is_removed(disk: DiskSnapshots) -> None:
    metadata = {"scope": SCOPE, "model": "{}", "tokens": "0", "structure": "[]"}
    path = disk.folder / f"v1-{'0' * 40}.safetensors"
    path.write_bytes(sealed_file(metadata, {"0": ("F8_E4M3", [2], b"ab")}))
    assert disk.get("0" * 40, TOKENS, ENDS) is None
    assert files(disk.folder) == []


def test_a_model_continues_from_a_file_of_the_independent_writer(
    hybrid: StreamedModel, tmp_path: Path
) -> None:
    """Its own file, taken apart with MLX's reader and put together again by the writer above."""
    store = new_store(hybrid, folder=tmp_path / "own")
    whole = reply(hybrid, store, PROMPT, 512)
    [path] = (tmp_path / "own").iterdir()
    arrays, metadata = mx.load(str(path), return_metadata=True)
    dtypes = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.uint32: "U32"}
    order = [*map(str, range(len(arrays) - 3)), "tokens", "ends"]
    (tmp_path / "other").mkdir()
    data = sealed_file(
        # MLX gives the metadata in another order.
        {name: metadata[name] for name in ("scope", "model", "tokens", "structure")},
        {
            name: (
                dtypes[arrays[name].dtype],
                arrays[name].shape,
                np.array(arrays[name].reshape(-1).view(mx.uint8)).tobytes(),
            )
            for name in order
        },
    )
    assert data == path.read_bytes()
    (tmp_path / "other" / path.name).write_bytes(data)
    resumed = reply(hybrid, new_store(hybrid, folder=tmp_path / "other"), PROMPT, 512)
    assert (resumed.cached, resumed.logprobs) == (90, whole.logprobs)
