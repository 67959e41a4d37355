"""The parts of a pull, each alone: hashes that are written down, holes, routes, journals."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.errors import CheckpointError, FlashMoeError
from flash_moe.format.holes import BLOCK, allocated, holes_are_possible, punch
from flash_moe.pack.job import PackJob
from flash_moe.pull import running_hash
from flash_moe.pull.journal import Journal
from flash_moe.pull.repository import Repository, git_hash
from flash_moe.pull.route import Route
from flash_moe.pull.running_hash import RunningHash
from flash_moe.pull.spans import Use
from tests.pull.sources import SMALL, shuffled_checkpoint
from tests.strategies import json_values


@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(0, 8))
def test_a_hash_goes_on_from_its_state(parts: list[bytes], at: int) -> None:
    running = RunningHash()
    for number, part in enumerate(parts):
        if number == at and running.state is not None:
            resumed = RunningHash.resumed(running.state)
            assert resumed is not None
            running = resumed
        running.update(memoryview(bytearray(part)))
    assert running.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()
    assert running.hexdigest() == hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_hash_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """hashlib's, which cannot be saved; and another library's state is not taken for ours."""
    state = RunningHash().state
    monkeypatch.setattr(running_hash, "_library", lambda: None)
    running = RunningHash()
    running.update(memoryview(bytearray(b"abc")))
    assert running.state is None
    assert running.hexdigest() == hashlib.sha256(b"abc").hexdigest()
    assert RunningHash.resumed(state) is None
    monkeypatch.undo()
    assert RunningHash.resumed("other:00") is None
    assert RunningHash.resumed(None) is None
    if state is not None:
        assert RunningHash.resumed(state[:-2] + "zz") is None


def test_git_hashes() -> None:
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_holes(tmp_path: Path) -> None:
    if not holes_are_possible(tmp_path):
        pytest.skip("no holes in files here")
    assert not list(tmp_path.iterdir())
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100 * BLOCK)
    before = allocated(tmp_path)
    with path.open("r+b") as file:
        punch(file.fileno(), BLOCK + 1, 90 * BLOCK - 1)
    assert before - allocated(tmp_path) == 87 * BLOCK
    data = path.read_bytes()
    assert data[: 2 * BLOCK] + data[89 * BLOCK :] == b"x" * 13 * BLOCK
    assert not any(data[2 * BLOCK : 89 * BLOCK])


@settings(max_examples=12)
@given(st.integers(0, 99), st.integers(1, 7), st.sampled_from([{}, {"bits": 2}, {"planes": True}]))
def test_routes(
    tmp_path_factory: pytest.TempPathFactory, seed: int, shards: int, form: dict[str, Any]
) -> None:
    """Every byte once and in order, from any byte on; nothing a piece needs comes after it."""
    folder = tmp_path_factory.mktemp("route")
    shuffled_checkpoint(folder / "source", SMALL, shards, seed)
    job = PackJob.plan(folder / "source", folder / "target", **form)
    route = Route.of(job.skeleton, job.transform)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_moe.pull.spans.BATCH_BYTES", 8 << 10)
        names, seen, pieces = set[str](), set[str](), 0
        fetched = 0
        for number, shard in enumerate(route.shards):
            position = 0
            for batch in route.batches(number, 0, names):
                fetched += 0 if batch.here else batch.nbytes
                if batch.ahead is not None:
                    seen |= {batch.ahead}
                    continue
                assert (batch.shard, batch.start) == (shard, position)
                for span in batch.spans:
                    assert span.start == position
                    position = span.end
                    if span.piece is not None:
                        pieces += 1
                        part = route.layers[span.piece.layer].layout.parts[span.piece.part]
                        for need in route.needs.get((span.piece.layer, part.projection), ()):
                            assert need in seen or route.is_passed(need, (number, span.start))
                    else:
                        assert span.use in (Use.HEADER, Use.KEPT)  # this model has use for all
            assert position == route.size(shard)
    headers = sum(route.header_bytes(shard) for shard in route.shards)
    assert fetched + headers == sum(route.size(shard) for shard in route.shards)
    assert fetched == route.fetch_bytes()
    experts = SMALL.layers * SMALL.experts * 3
    assert pieces == (experts if form else 3 * experts)


def test_bytes_that_no_weight_is_made_of(tmp_path: Path) -> None:
    """A vision tower that mlx-lm leaves out: hashed, and not kept."""
    from flash_moe.format.safetensors import make_header, read_header

    folder = shuffled_checkpoint(tmp_path / "source", shards=1)
    (shard,) = folder.glob("model*.safetensors")
    tensors = sorted(read_header(shard).values(), key=lambda tensor: tensor.offset)
    old = shard.read_bytes()
    extra = ("vision_tower.weight", "U8", (1000,), 1000)
    table = [(t.name, t.dtype, t.shape, t.nbytes) for t in tensors]
    shard.write_bytes(make_header([*table, extra]) + old[tensors[0].offset :] + bytes(1000))
    route = Route.of(PackJob.plan(folder, tmp_path / "target").skeleton, None)
    unused = [s for b in route.batches(0, 0, set()) for s in b.spans if s.use is Use.UNUSED]
    assert sum(span.end - span.start for span in unused) == 1000


@given(st.dictionaries(st.sampled_from(["shard", "offset", "hash", "ahead", "x"]), json_values))
def test_journals_of_anybody(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    folder = tmp_path_factory.mktemp("journal")
    (folder / "progress.json").write_text(json.dumps(value))
    try:
        journal = Journal.read(folder)
    except CheckpointError:
        return
    journal.write(folder)
    assert Journal.read(folder) == journal


@given(json_values)
def test_repositories_of_anybody(value: Any) -> None:
    try:
        Repository.from_json(value)
    except (KeyError, TypeError, ValueError, FlashMoeError):
        return
    pytest.fail("that is no repository")


def test_large_pieces_of_a_file_are_given_back(tmp_path: Path) -> None:
    """`allocated` of a folder counts what is below it, and no links."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(os.urandom(10 * BLOCK))
    (tmp_path / "link").symlink_to("/")
    assert 10 * BLOCK <= allocated(tmp_path) < 14 * BLOCK
    assert allocated(tmp_path / "none") == 0
