"""Store and reader: every byte of an expert is read from its place to its place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.locations import ExpertLayer, Run, packed_layer
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import OptionError, ReadFailed
from flash_moe.format.layout import (
    make_layout,
)
from flash_moe.native.build import find_compiler
from flash_moe.options import ReadMode
from flash_moe.pack.job import PackJob
from flash_moe.stream.bank import Bank
from flash_moe.stream.native_reader import load_native_reader
from flash_moe.stream.reader import SERIAL_BELOW, Reader
from flash_moe.stream.store import FILE, ExpertStore, Pieces
from tests.strategies import tiny_checkpoint

CONTENT = np.random.default_rng(7).bytes(3 * SERIAL_BELOW + 12345)


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experts"
        path.write_bytes(CONTENT)
        yield path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, and its pack beside it."""
    folder = tmp_path_factory.mktemp("store")
    source = tiny_checkpoint(folder / "source")
    PackJob.plan(source, folder / "pack").write()
    return folder


# Store


@st.composite
def runs(draw: st.DrawFn, experts: int, files: list[Path]) -> list[Run]:
    """Runs as a checkpoint in place has them: apart in the slot, anywhere in the files; some
    evenly spaced, some each at its own place, some exactly behind the one before."""
    drawn: list[Run] = []
    at = 0
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.integers(1, 400))
        at += draw(st.sampled_from([0, 0, 64]))
        spread = st.integers(0, 5000)
        if drawn and not drawn[-1].offsets and draw(st.booleans()):
            last = drawn[-1]
            run = Run(last.file, last.base + last.length, last.step, length, at)
        elif draw(st.booleans()):
            run = Run(draw(st.sampled_from(files)), draw(spread), draw(spread), length, at)
        else:
            offsets = draw(st.lists(spread, min_size=experts, max_size=experts))
            places = draw(st.lists(st.sampled_from(files), min_size=experts, max_size=experts))
            run = Run(places[0], 0, 0, length, at, tuple(offsets), tuple(places))
        drawn.append(replace(run, second_plane=draw(st.booleans())))
        at += length
    return drawn


def place_of(run: Run, expert: int) -> tuple[Path, int]:
    """The file and offset of an expert's part, by the words of Run's docstring."""
    if run.offsets:
        return run.files[expert], run.offsets[expert]
    return run.file, run.base + expert * run.step


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_are_the_runs(file: Path, data: st.DataObject) -> None:
    """Of some experts one after the other in a buffer, second planes only of those in full."""
    other = file.with_name("others")
    if not other.exists():
        other.write_bytes(CONTENT[::-1])
    contents = {file: CONTENT, other: CONTENT[::-1]}
    count = data.draw(st.integers(1, 4))
    drawn = data.draw(runs(count, [file, other]))
    nbytes = drawn[-1].at + drawn[-1].length
    layout = make_layout([("up", "weight", "uint8", (nbytes,))], [("up", None)])
    experts = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    full = data.draw(
        st.none() | st.lists(st.booleans(), min_size=len(experts), max_size=len(experts))
    )
    store = ExpertStore([ExpertLayer("mlp", count, layout, tuple(drawn))])
    reader = Reader(data.draw(st.integers(1, 3)), native=data.draw(st.booleans()))
    try:
        pieces = store.pieces(0, experts, layout.stride, full if full is None else np.array(full))
        buffer = memoryview(bytearray(b"\xee" * layout.stride * len(experts)))
        reader.read(pieces, buffer)
        expected = bytearray(b"\xee" * len(buffer))
        for slot, expert in enumerate(experts):
            for run in drawn:
                if run.second_plane and full is not None and not full[slot]:
                    continue
                path, offset = place_of(run, expert)
                part = contents[path][offset : offset + run.length]
                at = slot * layout.stride + run.at
                expected[at : at + run.length] = part
        assert bytes(buffer) == bytes(expected)
    finally:
        reader.close()
        store.close()


def test_a_packed_expert_is_one_aligned_piece(checkpoint: Path) -> None:
    layers = open_skeleton(open_folder(checkpoint / "pack")).layers()
    store = ExpertStore(layers)
    for number, layer in enumerate(layers):
        file = checkpoint / "pack" / f"layer_{number:03}.experts"
        stride = layer.layout.stride
        for expert in range(layer.experts):
            ((fd, *place),) = store.pieces(number, [expert]).tolist()
            assert place == [expert * stride, stride, 0]
            assert os.path.samestat(os.fstat(fd), file.stat())
    store.close()


def test_missing_file(tmp_path: Path) -> None:
    layout = make_layout([("up", "weight", "uint8", (8,))], [("up", None)])
    store = ExpertStore([packed_layer("mlp", 1, layout, tmp_path / "missing")])
    with pytest.raises(ReadFailed, match="missing"):
        store.pieces(0, [0])


def test_closing_closes_every_file(checkpoint: Path) -> None:
    store = ExpertStore(open_skeleton(open_folder(checkpoint / "pack")).layers())
    fds = [store.pieces(number, [0])[0, FILE] for number in range(len(store.layers))]
    store.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# Reader


@pytest.fixture(params=[True, False], ids=["native", "Python"])
def native(request: pytest.FixtureRequest) -> bool:
    if request.param and find_compiler() is None:
        pytest.skip("this machine has no C compiler")
    assert not request.param or load_native_reader() is not None
    return bool(request.param)


@given(st.data())
@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_reader_reads_what_is_there(file: Path, native: bool, data: st.DataObject) -> None:
    """Pieces of any length and order, some of them neighbours, and nothing beside them."""
    lengths = st.integers(0, 2 * SERIAL_BELOW) | st.integers(0, 3000)
    pieces, at = [], 0
    with file.open("rb") as opened:
        for _ in range(data.draw(st.integers(0, 90))):
            if pieces and data.draw(st.booleans()):
                offset = pieces[-1][1] + pieces[-1][2]
            else:
                at += data.draw(st.integers(0, 9))
                offset = data.draw(st.integers(0, len(CONTENT) - 1))
            length = min(data.draw(lengths), len(CONTENT) - offset)
            pieces.append([opened.fileno(), offset, length, at])
            at += length
        data.draw(st.randoms(use_true_random=False)).shuffle(pieces)
        reader = Reader(
            data.draw(st.integers(1, 9)), data.draw(st.integers(1, 20)) * 16384, native=native
        )
        buffer, expected = memoryview(bytearray(at + 9)), bytearray(at + 9)
        try:
            reader.read(rows(pieces), buffer)
        finally:
            reader.close()
    for _, offset, length, start in pieces:
        expected[start : start + length] = CONTENT[offset : offset + length]
    assert buffer == expected
    assert reader.counters.nbytes == sum(length for _, _, length, _ in pieces)


def rows(pieces: list[list[int]]) -> Pieces:
    return np.array(pieces, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("length", [100, 2 * SERIAL_BELOW])
@pytest.mark.parametrize("missing", [1, 99])
def test_a_short_file(file: Path, native: bool, threads: int, length: int, missing: int) -> None:
    reader = Reader(threads, native=native)
    with file.open("rb") as opened:
        piece = [opened.fileno(), len(CONTENT) - length + missing, length, 0]
        with pytest.raises(ReadFailed, match=f"ends at byte {len(CONTENT)}, {missing} bytes early"):
            reader.read(rows([piece]), memoryview(bytearray(length)))
    reader.close()


@pytest.mark.parametrize("length", [100, 2 * SERIAL_BELOW])
def test_a_closed_file(file: Path, native: bool, length: int) -> None:
    fd = os.open(file, os.O_RDONLY)
    os.close(fd)
    reader = Reader(native=native)
    with pytest.raises(ReadFailed, match="Bad file descriptor"):
        reader.read(rows([[fd, 0, length, 0]]), memoryview(bytearray(length)))
    reader.close()


def test_a_piece_outside_of_its_buffer_is_refused(native: bool, file: Path) -> None:
    reader = Reader(native=native)
    with file.open("rb") as opened:
        for piece in ([opened.fileno(), 0, 9, 8], [opened.fileno(), 0, 9, -1]):
            with pytest.raises(ValueError, match="not within its buffer"):
                reader.read(rows([piece]), memoryview(bytearray(16)))
    reader.close()


def test_no_thread_writes_after_a_failure(file: Path, native: bool) -> None:
    """One bad piece among good ones: when `read` raises, the buffer is the caller's again."""
    reader, length = Reader(4, 16384, native=native), 2 * SERIAL_BELOW
    with file.open("rb") as opened:
        buffer = memoryview(bytearray(length + 16384))
        good = [opened.fileno(), 0, length, 0]
        bad = [opened.fileno(), len(CONTENT), 16384, length]
        for _ in range(20):
            with pytest.raises(ReadFailed):
                reader.read(rows([bad, good]), buffer)
            buffer[:] = bytes(len(buffer))
            # The threads take tasks in turn: after these, none of the failed read's is left.
            reader.read(rows([good]), memoryview(bytearray(length)))
            assert not any(buffer)
    reader.close()


@pytest.mark.parametrize(("threads", "chunk"), [(0, 16384), (257, 16384), (1, 0), (1, 16385)])
def test_impossible_readers(threads: int, chunk: int) -> None:
    with pytest.raises(OptionError):
        Reader(threads, chunk)


# Direct and buffered, packed and in place: the same bytes


def expert_bytes(folder: Path, mode: ReadMode) -> list[bytes]:
    """The parts of every expert of every layer, read through bank, reader and store."""
    layers = open_skeleton(open_folder(folder)).layers()
    store, reader = ExpertStore(layers, mode), Reader(2)
    parts = []
    try:
        for number, layer in enumerate(layers):
            buffer = Bank(2, layer.layout.stride).take([0]).buffer
            for expert in range(layer.experts):
                reader.read(store.pieces(number, [expert]), buffer)
                parts += [bytes(buffer[p.offset : p.offset + p.nbytes]) for p in layer.layout.parts]
    finally:
        store.close()
        reader.close()
    return parts


def test_a_pack_holds_the_bytes_of_its_source(checkpoint: Path) -> None:
    packed = expert_bytes(checkpoint / "pack", "buffered")
    assert packed == expert_bytes(checkpoint / "source", "buffered")
    assert len(set(packed)) > len(packed) / 4  # random weights, so few parts are alike


def test_direct_reads_the_same_bytes(checkpoint: Path) -> None:
    if hasattr(os, "O_DIRECT"):
        try:
            os.close(os.open(checkpoint / "pack" / "layer_000.experts", os.O_DIRECT))
        except OSError as error:
            pytest.skip(f"this file system has no O_DIRECT: {error.strerror}")
    direct = expert_bytes(checkpoint / "pack", "direct")
    assert direct == expert_bytes(checkpoint / "pack", "buffered")


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="macOS reads unaligned past its cache")
def test_direct_refuses_what_is_not_aligned(checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="Pack the checkpoint"):
        expert_bytes(checkpoint / "source", "direct")
