"""Experts computed where the page cache has them: the same bits as when they are read, whatever is
there, whatever goes in the meantime; and no more mapped than is allowed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.kernels.spec import part_offsets
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import ReadMode, Settings
from flash_moe.pack.job import PackJob
from flash_moe.stream.mapping import BLOCK, MappedExperts
from flash_moe.stream.native_reader import load_native_reader
from flash_moe.stream.store import AT, LENGTH, OFFSET, ExpertStore
from flash_moe.stream.streamed import StreamedLayer, StreamedSwitch
from flash_moe.synth.model import Shape, synthesize
from tests.devices import needs_native
from tests.stream.test_residency import drop

pytestmark = [needs_native, pytest.mark.usefixtures("on_cpu")]

# Experts of half a megabyte: a system may keep, and drop, pieces of 64 KB together.
SHAPE = Shape(layers=4, experts=8, experts_per_token=2, hidden=512, intermediate=512)
PROMPT = mx.array([[5, 700, 31, 8]])
FORMS = ("in place", "pack", "planes")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In place an expert's nine parts lie apart, at odd places; in planes some are left out."""
    folder = tmp_path_factory.mktemp("mapping")
    source = folder / "source"
    synthesize(source, SHAPE)
    PackJob.plan(source, folder / "pack").write()
    PackJob.plan(source, folder / "planes", planes=True).write()
    return {"in place": source, "pack": folder / "pack", "planes": folder / "planes"}


@pytest.fixture(autouse=True)
def everything_is_cached(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        for file in expert_files(folder):
            drop(file, 0, 0)  # written first: what is not on the disk cannot be dropped later
            file.read_bytes()


@pytest.fixture(params=FORMS)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@contextmanager
def loaded(folder: Path, **settings: Any) -> Iterator[StreamedModel]:
    if (folder / "manifest.json").exists() and "planes" in folder.name:
        settings = {"full_experts": 1, **settings}
    model = load(folder, Settings(**settings))
    try:
        yield model
    finally:
        model.close()


def replies(model: StreamedModel, tokens: int = 4) -> list[bytes]:
    """The logits of a prompt and of some tokens after it."""
    model.streamer.phase = "prompt"
    cache = model.make_cache()
    logits = [model(PROMPT, cache=cache)]
    model.streamer.phase = "reply"
    logits += [model(mx.array([[token]]), cache=cache) for token in range(3, 3 + tokens)]
    return [np.array(one.astype(mx.float32)).tobytes() for one in logits]


def in_memory(model: StreamedModel) -> MappedExperts:
    mapping = model.streamer.mapping
    assert mapping is not None
    return mapping


def expert_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.experts")] or [*folder.glob("*.safetensors")]


@pytest.mark.parametrize("limit", [None, 1 << 20, 1])
def test_the_same_bits_as_when_they_are_read(folder: Path, limit: int | None) -> None:
    """With room for all, for half a block, and for none."""
    with loaded(folder, mapped_bytes=0) as model:
        assert model.streamer.mapping is None
        want = replies(model)
        read = model.streamer.reader.counters.nbytes
        assert model.streamer.reader.counters.mapped == 0
    with loaded(folder, mapped_bytes=limit) as model:
        assert replies(model) == want
        counters = model.streamer.reader.counters
        assert counters.mapped == counters.nbytes == read
        assert limit is None or in_memory(model).mapped == 0
        assert replies(model) == want


def test_what_is_not_there_is_read(folder: Path) -> None:
    """Some of an expert's parts dropped from the page cache, or all, or none: mapped and read
    experts in one token."""
    with loaded(folder, mapped_bytes=0) as model:
        want = replies(model)
    read = []

    @settings(max_examples=8, deadline=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        with loaded(folder) as model:
            store = model.streamer.store
            for layer in range(len(store.layers)):
                for expert in data.draw(st.lists(st.integers(0, SHAPE.experts - 1), max_size=4)):
                    pieces = store.pieces(layer, [expert]).tolist()
                    fd, offset, length, _ = pieces[data.draw(st.integers(0, len(pieces) - 1))]
                    os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            assert replies(model) == want
            counters = model.streamer.reader.counters
            read.append(counters.nbytes - counters.mapped)

    check()
    if not any(read):
        pytest.skip("this file system drops nothing")


def test_gone_between_the_question_and_the_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow, and right."""
    with loaded(folder, mapped_bytes=0) as model:
        want = replies(model)
    evicted = []
    with loaded(folder) as model:
        mapping, find = in_memory(model), MappedExperts.find

        def find_and_drop(self: MappedExperts, layer: int, experts: list[int], *full: Any) -> Any:
            found = find(self, layer, experts, *full)
            for fd, offset, length, _ in self.store.pieces(layer, experts).tolist():
                os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
            evicted.append(not find(self, layer, experts, *full)[0].any())
            return found

        monkeypatch.setattr(MappedExperts, "find", find_and_drop)
        assert replies(model, tokens=1) == want[:2]
        assert mapping.mapped
        assert model.streamer.reader.counters.mapped
    if not any(evicted):
        pytest.skip("this file system drops nothing")


def test_parts_are_where_the_file_has_them(folder: Path) -> None:
    with loaded(folder) as model:
        store, mapping = model.streamer.store, in_memory(model)
        switches = [m for _, m in model.model.named_modules() if isinstance(m, StreamedSwitch)]
        for switch in switches:
            layer: StreamedLayer = switch.layer
            assert layer.spec is not None
            experts = np.array([7, 0, 3])
            mapping.find(layer.number, experts.tolist())
            for expert, parts in zip(
                experts.tolist(), mapping.parts(layer.number, experts, layer.spec), strict=True
            ):
                pieces = store.pieces(layer.number, [expert])
                for address, offset in zip(
                    parts.tolist(), part_offsets(layer.spec).tolist(), strict=True
                ):
                    (piece,) = (p for p in pieces if p[AT] <= offset < p[AT] + p[LENGTH])
                    at = int(piece[OFFSET] + offset - piece[AT])
                    assert ctypes.string_at(address, 8) == os.pread(int(piece[0]), 8, at)


@pytest.mark.parametrize("form", FORMS)
def test_no_more_is_mapped_than_allowed(folders: dict[str, Path], form: str) -> None:
    """The least recently used blocks go first, and are not in the process's memory any more."""
    with loaded(folders[form]) as model:
        store, mapping = model.streamer.store, in_memory(model)
        mapping.limit = 3 * BLOCK
        files = expert_files(folders[form])
        before = mapped_memory(files)
        for layer in range(len(store.layers)):
            for expert in range(SHAPE.experts):
                assert mapping.find(layer, [expert])[0].all()
                assert mapping.mapped <= mapping.limit
                for fd, offset, length, _ in store.pieces(layer, [expert]).tolist():
                    if (fd, offset // BLOCK) in mapping._used:
                        ctypes.string_at(int(mapping._places[fd, 0]) + offset, length)
                assert mapped_memory(files) - before <= mapping.limit
        whole = sum(file.stat().st_size for file in files)
        assert whole > 2 * mapping.limit


def test_the_least_recently_used_go_first(folders: dict[str, Path]) -> None:
    with loaded(folders["pack"]) as model:
        mapping = in_memory(model)
        mapping.limit = 3 * BLOCK
        last = SHAPE.experts - 1
        # Each in blocks that no other has.
        for layer, expert in ((0, 0), (1, last), (2, 0), (0, 0), (3, last)):
            mapping.find(layer, [expert])
        kept = [key for key, blocks in mapping._blocks.items() if set(blocks) <= set(mapping._used)]
        assert (0, 0) in kept
        assert (3, last) in kept
        assert (1, last) not in kept


def mapped_memory(files: list[Path]) -> int:
    """Bytes of files that are in this process's page tables."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.split(maxsplit=5)[-1] in map(str, files)
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_files_of_others_are_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux says of every page of theirs that it is there."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with loaded(folders["pack"]) as model:
        replies(model)
        counters = model.streamer.reader.counters
        assert counters.nbytes > counters.mapped == 0


@pytest.mark.parametrize("mode", ["buffered", "direct"])
def test_direct_reading_maps_nothing(folders: dict[str, Path], mode: ReadMode) -> None:
    with loaded(folders["pack"], mode=mode) as model:
        assert (model.streamer.mapping is None) == (mode == "direct")
    with loaded(folders["pack"], runtime="mlx") as model:
        assert model.streamer.mapping is None


SHRUNKEN = """
import sys
from pathlib import Path
import mlx.core as mx
mx.set_default_device(mx.cpu)
from flash_moe.errors import ReadFailed
from flash_moe.model.load import load
from flash_moe.options import Settings
folder = Path(sys.argv[1])
model = load(folder, Settings())
mx.eval(model(mx.array([[1]]), cache=model.make_cache()))
assert model.streamer.reader.counters.mapped
for file in folder.glob("*.experts"):
    with file.open("r+b") as content:
        content.truncate(1000)
try:
    mx.eval(model(mx.array([[1]]), cache=model.make_cache()))
except ReadFailed as error:
    print("refused:", error)
"""


def test_a_file_that_shrinks_is_an_error_and_no_crash(tmp_path: Path) -> None:
    """A page of a mapped file beyond its end would kill the process."""
    synthesize(tmp_path / "source", SHAPE)
    PackJob.plan(tmp_path / "source", tmp_path / "pack").write()
    done = subprocess.run(
        [sys.executable, "-c", SHRUNKEN, str(tmp_path / "pack")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "refused: A file of experts ends at byte 1000" in done.stdout


def test_files_opened_later_are_mapped_too(tmp_path: Path) -> None:
    """Layers in files of their own, the first ones used last."""
    synthesize(tmp_path / "source", SHAPE)
    PackJob.plan(tmp_path / "source", tmp_path / "pack").write()
    with loaded(tmp_path / "pack", mapped_bytes=0) as model:
        layers = model.streamer.store.layers
    store = ExpertStore(layers)
    mapping = MappedExperts(store, load_native_reader(), 1 << 40)
    for layer in reversed(range(len(layers))):
        assert mapping.find(layer, [0, 1])[0].all()
    mapping.close()
    assert mapping.mapped == 0
    mapping.give_up_all()
    store.close()
