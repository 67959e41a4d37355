"""Store and reader: every byte of an expert is read from its place to its place."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.locations import ExpertLayer, Run, packed_layer
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import OptionError, ReadFailed
from flash_moe.format.layout import (
    make_layout,
)
from flash_moe.options import ReadMode
from flash_moe.pack.job import PackJob
from flash_moe.stream.bank import Bank
from flash_moe.stream.reader import SERIAL_BELOW, Reader
from flash_moe.stream.store import ExpertStore, Segment
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
        drawn.append(run)
        at += length
    return drawn


def place_of(run: Run, expert: int) -> tuple[Path, int]:
    """The file and offset of an expert's part, by the words of Run's docstring."""
    if run.offsets:
        return run.files[expert], run.offsets[expert]
    return run.file, run.base + expert * run.step


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_segments_are_the_runs(file: Path, data: st.DataObject) -> None:
    other = file.with_name("others")
    if not other.exists():
        other.write_bytes(CONTENT[::-1])
    contents = {file: CONTENT, other: CONTENT[::-1]}
    experts = data.draw(st.integers(1, 4))
    drawn = data.draw(runs(experts, [file, other]))
    nbytes = drawn[-1].at + drawn[-1].length
    layout = make_layout([("up", "weight", "uint8", (nbytes,))], [("up", None)])
    store = ExpertStore([ExpertLayer("mlp", experts, layout, tuple(drawn))])
    reader = Reader(1)
    try:
        for expert in range(experts):
            segments = store.segments(0, expert)
            _assert_disjoint_and_joined(segments, nbytes)
            slot = memoryview(bytearray(b"\xee" * layout.stride))
            reader.read([(s, slot[s.at : s.at + s.length]) for s in segments])
            expected = bytearray(b"\xee" * layout.stride)
            for run in drawn:
                path, offset = place_of(run, expert)
                part = contents[path][offset : offset + run.length]
                expected[run.at : run.at + run.length] = part
            assert bytes(slot) == bytes(expected)
    finally:
        store.close()


def _assert_disjoint_and_joined(segments: list[Segment], nbytes: int) -> None:
    ordered = sorted(segments, key=lambda s: s.at)
    assert ordered[0].at >= 0
    assert ordered[-1].at + ordered[-1].length <= nbytes
    for left, right in itertools.pairwise(ordered):
        assert left.at + left.length <= right.at
        # Two that touch on disk and in the slot would have been one.
        assert (left.fd, left.offset + left.length, left.at + left.length) != (
            right.fd,
            right.offset,
            right.at,
        )


def test_neighbours_in_different_files_stay_apart(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(CONTENT[:100])
    layout = make_layout([("up", "weight", "uint8", (32,))], [("up", None)])
    halves = (Run(file, 0, 0, 16, 0), Run(other, 16, 0, 16, 16))
    store = ExpertStore([ExpertLayer("mlp", 1, layout, halves)])
    first, second = store.segments(0, 0)
    assert first.fd != second.fd
    assert (first[1:], second[1:]) == ((0, 16, 0), (16, 16, 16))
    store.close()


def test_a_packed_expert_is_one_aligned_segment(checkpoint: Path) -> None:
    layers = open_skeleton(open_folder(checkpoint / "pack")).layers()
    store = ExpertStore(layers)
    for number, layer in enumerate(layers):
        file = checkpoint / "pack" / f"layer_{number:03}.experts"
        for expert in range(layer.experts):
            (segment,) = store.segments(number, expert)
            assert segment.offset == expert * layer.layout.stride
            assert segment.at == 0
            assert segment.length == layer.layout.stride
            assert os.path.samestat(os.fstat(segment.fd), file.stat())
    store.close()


def test_missing_file(tmp_path: Path) -> None:
    layout = make_layout([("up", "weight", "uint8", (8,))], [("up", None)])
    store = ExpertStore([packed_layer("mlp", 1, layout, tmp_path / "missing")])
    with pytest.raises(ReadFailed, match="missing"):
        store.segments(0, 0)


def test_closing_closes_every_file(checkpoint: Path) -> None:
    store = ExpertStore(open_skeleton(open_folder(checkpoint / "pack")).layers())
    fds = [store.segments(number, 0)[0].fd for number in range(len(store.layers))]
    store.close()
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# Reader


@given(
    st.lists(
        st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 2 * SERIAL_BELOW)), max_size=6
    ),
    st.integers(1, 9),
    st.integers(1, 20),
)
@settings(max_examples=80, deadline=None)
def test_reader_reads_what_is_there(
    file: Path, places: list[tuple[int, int]], threads: int, chunk: int
) -> None:
    reader = Reader(threads, chunk * 16384)
    fd = os.open(file, os.O_RDONLY)
    try:
        targets = []
        for offset, length in places:
            length = min(length, len(CONTENT) - offset)
            targets.append((Segment(fd, offset, length, 0), memoryview(bytearray(length))))
        reader.read(targets)
        for segment, buffer in targets:
            assert buffer == CONTENT[segment.offset : segment.offset + segment.length]
        assert reader.counters.nbytes == sum(segment.length for segment, _ in targets)
    finally:
        reader.close()
        os.close(fd)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("length", [100, 2 * SERIAL_BELOW])
@pytest.mark.parametrize("missing", [1, 99])
def test_a_short_file(file: Path, threads: int, length: int, missing: int) -> None:
    reader = Reader(threads)
    with file.open("rb") as opened:
        start = len(CONTENT) - length + missing
        segment = Segment(opened.fileno(), start, length, 0)
        with pytest.raises(ReadFailed, match=f"ends at byte {len(CONTENT)}, {missing} bytes early"):
            reader.read([(segment, memoryview(bytearray(length)))])
    reader.close()


@pytest.mark.parametrize("length", [100, 2 * SERIAL_BELOW])
def test_a_closed_file(file: Path, length: int) -> None:
    fd = os.open(file, os.O_RDONLY)
    os.close(fd)
    reader = Reader()
    with pytest.raises(ReadFailed, match="Bad file descriptor"):
        reader.read([(Segment(fd, 0, length, 0), memoryview(bytearray(length)))])
    reader.close()


def test_no_thread_writes_after_a_failure(file: Path) -> None:
    """One bad target among good ones: when `read` raises, the buffers are the caller's again."""
    reader = Reader(4, 16384)
    with file.open("rb") as opened:
        good, other = (memoryview(bytearray(2 * SERIAL_BELOW)) for _ in range(2))
        place = Segment(opened.fileno(), 0, len(good), 0)
        bad = Segment(opened.fileno(), len(CONTENT), 16384, 0)
        for _ in range(20):
            with pytest.raises(ReadFailed):
                reader.read([(bad, memoryview(bytearray(16384))), (place, good)])
            good[:] = bytes(len(good))
            # The threads take pieces in turn: after these, none of the failed read's is left.
            reader.read([(place, other)])
            assert not any(good)
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
            buffer = Bank(2, layer.layout.stride).take([0]).buffers[0]
            for expert in range(layer.experts):
                reader.read(
                    [(s, buffer[s.at : s.at + s.length]) for s in store.segments(number, expert)]
                )
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
