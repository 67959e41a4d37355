"""A header is believed only if it describes its file exactly; anything else is CheckpointError."""

from __future__ import annotations

import json
import tempfile
import tracemalloc
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flash_moe.arrays import mlx_dtype
from flash_moe.errors import CheckpointError
from flash_moe.format.dtypes import BY_NAME, BY_SAFETENSORS
from flash_moe.format.safetensors import (
    MAX_HEADER_BYTES,
    Tensor,
    make_header,
    read_header,
    read_headers,
)
from tests.strategies import json_values, safetensors_bytes, tensor_tables

# Types that mx.load does not know; experts that use them are refused later, by mlx-lm.
NOT_IN_MLX = {"F8_E5M2", "F64"}
MLX_DTYPES = sorted(BY_NAME.keys() - {"float64"})


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "model.safetensors"


def laid_out(table: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, Any], int]:
    header, at = {}, 0
    for name, (dtype, shape) in table.items():
        end = at + prod(shape) * BY_SAFETENSORS[dtype].nbytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return header, at


def accepted(file: Path, content: bytes) -> dict[str, Tensor] | None:
    """The tensors of a file, which must then tile it, or None if `read_header` refuses it."""
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except CheckpointError:
        return None
    at = 8 + int.from_bytes(content[:8], "little")
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
        assert tensor.offset == at
        assert prod(tensor.shape) * BY_SAFETENSORS[tensor.dtype].bits == tensor.nbytes * 8
        at += tensor.nbytes
    assert at == len(content)
    return tensors


@given(tensor_tables(), st.booleans(), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_sound_files_are_accepted(
    file: Path, table: dict[str, tuple[str, list[int]]], described: bool, padding: int
) -> None:
    header, size = laid_out(table)
    if described:
        header = {"__metadata__": {"format": "mlx"}, **header}
    raw = json.dumps(header).encode() + b" " * padding
    tensors = accepted(file, safetensors_bytes(raw, bytes(size)))
    assert tensors is not None
    assert {t.name: (t.dtype, list(t.shape)) for t in tensors.values()} == table


@given(tensor_tables(), st.none() | st.dictionaries(st.text(), st.text()), st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_own_writer_round_trips(
    file: Path,
    table: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str] | None,
    alignment: int,
) -> None:
    sizes = {n: prod(shape) * BY_SAFETENSORS[dtype].nbytes for n, (dtype, shape) in table.items()}
    tensors = [(name, dtype, tuple(shape), sizes[name]) for name, (dtype, shape) in table.items()]
    head = make_header(tensors, metadata, alignment)
    assert (len(head) - 8) % alignment == 0
    read = accepted(file, head + bytes(sum(sizes.values())))
    assert read is not None
    assert [(t.name, t.dtype, t.shape, t.nbytes) for t in read.values()] == tensors


@given(
    st.dictionaries(
        st.text("abc.é ", min_size=1, max_size=8),
        st.tuples(st.sampled_from(MLX_DTYPES), st.lists(st.integers(0, 4), max_size=4)),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_mlx_writer_round_trips_to_the_byte(
    file: Path, table: dict[str, tuple[str, list[int]]]
) -> None:
    arrays = {}
    for number, (name, (dtype, shape)) in enumerate(table.items(), 1):
        values = mx.arange(prod(shape)).reshape(shape) + number
        arrays[name] = values.astype(mlx_dtype(dtype))
    mx.save_safetensors(str(file), arrays)
    content = file.read_bytes()
    tensors = accepted(file, content)
    assert tensors is not None
    assert tensors.keys() == arrays.keys()
    for name, tensor in tensors.items():
        assert tensor.shape == arrays[name].shape
        raw = np.array(mx.contiguous(arrays[name]).reshape(-1).view(mx.uint8)).tobytes()
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == raw


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
@example(b"")
@example(b"\0" * 8)
@example(b"\xff" * 8)
def test_random_bytes(file: Path, content: bytes) -> None:
    accepted(file, content)


@given(json_values, st.binary(max_size=16))
@settings(max_examples=300, deadline=None)
def test_random_json(file: Path, header: Any, data: bytes) -> None:
    accepted(file, safetensors_bytes(header, data))


ODD_SIZES = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**62, 2**64, 10**30, True, False, 1.0, "1", None]),
)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["U8", "F32", "BF16", "F4", "u8", 3, None]),
            st.lists(ODD_SIZES, max_size=18),
            st.lists(ODD_SIZES, max_size=3),
        ),
        max_size=3,
    ),
    st.integers(0, 12),
)
@settings(max_examples=500, deadline=None)
@example([("U8", [True], [0, 1])], 1)
@example([("U8", [1], [False, 1])], 1)
@example([("U8", [1.0], [0, 1])], 1)
@example([("U8", [2**62], [0, 2**62])], 1)
@example([("U8", [2**62, 0], [0, 0])], 0)
@example([("U8", [2**31, 0], [0, 0])], 0)
@example([("U8", [-1, -1], [0, 1])], 1)
@example([("U8", [1], [0, 1]), ("U8", [1], [0, 1])], 1)
@example([("U8", [1], [0, 1]), ("U8", [1], [2, 3])], 3)
@example([("U8", [2], [0, 2]), ("U8", [1], [1, 2]), ("U8", [1], [3, 4])], 4)
@example([("U8", [1], [1, 2]), ("U8", [1], [1, 2])], 2)
@example([("U8", [1] * 17, [0, 1])], 1)
def test_odd_entries(file: Path, entries: list[tuple[Any, Any, Any]], size: int) -> None:
    header = {
        f"t{number}": {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for number, (dtype, shape, offsets) in enumerate(entries)
    }
    tensors = accepted(file, safetensors_bytes(header, bytes(size)))
    for tensor in (tensors or {}).values():
        assert all(type(n) is int and n >= 0 for n in (*tensor.shape, tensor.offset))
    if tensors:
        _mlx_agrees(file, tensors)


def _mlx_agrees(file: Path, tensors: dict[str, Tensor]) -> None:
    """A header that we accept must be safe to give to MLX, and mean the same to it."""
    if any(tensor.dtype in NOT_IN_MLX for tensor in tensors.values()):
        return
    loaded = mx.load(str(file))
    assert {name: array.shape for name, array in loaded.items()} == {
        tensor.name: tensor.shape for tensor in tensors.values()
    }


SOUND_HEADER, SOUND_SIZE = laid_out(
    {"a.weight": ("U32", [4, 8, 2]), "a.scales": ("BF16", [4, 8]), "empty": ("F32", [0, 3])}
)
SOUND = safetensors_bytes(
    {"__metadata__": {"format": "mlx"}, **SOUND_HEADER}, bytes(range(256)) * 2
)[: -(512 - SOUND_SIZE)]
HEADER_BITS = 8 * (len(SOUND) - SOUND_SIZE)


@given(st.sets(st.integers(0, HEADER_BITS - 1), min_size=1, max_size=3))
@settings(max_examples=500, deadline=None)
def test_flipped_bits_of_a_header(file: Path, bits: set[int]) -> None:
    broken = bytearray(SOUND)
    for bit in bits:
        broken[bit // 8] ^= 1 << bit % 8
    tensors = accepted(file, bytes(broken))
    if tensors:
        _mlx_agrees(file, tensors)


def test_the_file_that_other_tests_break_is_sound(file: Path) -> None:
    tensors = accepted(file, SOUND)
    assert tensors is not None
    assert tensors.keys() == SOUND_HEADER.keys()


@given(st.integers(0, len(SOUND) - 1))
@settings(max_examples=150, deadline=None)
def test_truncated(file: Path, length: int) -> None:
    assert accepted(file, SOUND[:length]) is None


@given(st.binary(min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_grown(file: Path, tail: bytes) -> None:
    assert accepted(file, SOUND + tail) is None


@pytest.mark.parametrize("claimed", [2**62, 2**64 - 1, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1])
def test_a_claimed_size_allocates_nothing(file: Path, claimed: int) -> None:
    file.write_bytes(safetensors_bytes(SOUND_HEADER, length=claimed))
    assert _peak(file) < 100_000


def test_a_claimed_tensor_allocates_nothing(file: Path) -> None:
    entry = {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}
    file.write_bytes(safetensors_bytes({"huge": entry}))
    assert _peak(file) < 100_000


def test_a_header_over_the_cap_is_not_read(file: Path) -> None:
    # A sparse file, large enough for its claim: only the cap keeps it from being read.
    with file.open("wb") as out:
        out.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        out.truncate(MAX_HEADER_BYTES + 100)
    assert _peak(file) < 100_000


def _peak(file: Path) -> int:
    """Peak memory while a file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(file)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 1_000_000,
        b'{"a":' * 200_000,
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, Infinity]}}',
        b'{"a": {"dtype": ["U8"], "shape": [], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": {}, "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1]}}',
        b'{"a": []}',
        b'{"__metadata__": {"format": 1}}',
        b'{"__metadata__": [1]}',
        b"[]",
        b"null",
        b"",
        "{}".encode("utf-16"),
        b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": NaN}}',
    ],
    ids=range(17),
)
def test_hostile_json(file: Path, header: bytes) -> None:
    assert accepted(file, safetensors_bytes(header, b"\0")) is None
    assert accepted(file, safetensors_bytes(header)) is None


@pytest.mark.parametrize("twice", ["a", "dtype"])
def test_duplicate_names(file: Path, twice: str) -> None:
    entry = '{"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    if twice == "a":
        header = f'{{"a": {entry}, "a": {entry}}}'
    else:
        header = f'{{"a": {entry[:-1]}, "dtype": "U8"}}}}'
    assert accepted(file, safetensors_bytes(header.encode(), b"\0")) is None


def test_a_name_in_two_files(tmp_path: Path) -> None:
    files = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for file in files:
        file.write_bytes(SOUND)
    with pytest.raises(CheckpointError, match=r"is also in model-1\.safetensors"):
        read_headers(files)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError):
            read_header(path)
