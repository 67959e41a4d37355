"""Scales and biases in an earlier shard than their codes, large enough for holes: whatever makes a
pull begin a shard anew, what it needs of earlier shards is there again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_moe.errors import CheckpointError
from flash_moe.pull import receive, route, spans
from flash_moe.pull.job import PullJob
from flash_moe.pull.journal import PROGRESS, Journal
from flash_moe.synth.model import Shape
from tests.pack.packs import hashes, pack
from tests.pull import sources
from tests.pull.conftest import Serve

SHAPE = Shape(layers=4, experts=6, experts_per_token=2, hidden=256, intermediate=256)


@pytest.fixture
def parted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(spans, "BATCH_BYTES", 64 << 10)
    monkeypatch.setattr(route, "CHECKPOINT_BYTES", 150 << 10)
    monkeypatch.setattr(receive, "CHECKPOINT_BYTES", 150 << 10)
    read = sources.read_headers
    # As safetensors' own library writes them: biases, scales, weight.
    monkeypatch.setattr(sources, "read_headers", lambda files: dict(sorted(read(files).items())))
    return sources.shuffled_checkpoint(tmp_path / "Model-4bit", SHAPE, shards=10)


def given_back_early(job: PullJob) -> tuple[int, int]:
    """Where a tensor of an earlier shard is given back before the shard that used it ends."""
    from flash_moe.checkpoint.folder import open_folder
    from flash_moe.checkpoint.skeleton import open_skeleton
    from flash_moe.pull.form import transform_of

    source = open_skeleton(open_folder(job.target.with_name("Model-4bit")))
    way = route.Route.of(source, transform_of(2, False))
    return next(
        (number, end)
        for name, (number, end) in way.release.items()
        if way.number(way.tensors[name].file.name) < number
        and end < way.size(way.shards[number]) - (100 << 10)
    )


def stopped_after(
    job: PullJob, position: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> Journal:
    write_down = receive.Receiver._checkpoint

    def stop(self: Any, shard: int, offset: int, state: str | None) -> None:
        write_down(self, shard, offset, state)
        if state and (shard, offset) >= position:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(receive.Receiver, "_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            job.write()
    return Journal.read(job.target.with_name("pack.partial"))


def test_a_hash_of_another_library(
    parted: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, target = serve(parted), tmp_path / "pack"
    job = PullJob.plan(hub.name, target, bits=2)
    journal = stopped_after(job, given_back_early(job), monkeypatch)
    assert journal.hash is not None
    journal.hash = "another." + journal.hash
    journal.write(tmp_path / "pack.partial")
    PullJob.plan(hub.name, target, bits=2).write()
    assert hashes(target) == hashes(pack(parted, tmp_path / "packed", bits=2))


def test_a_shard_that_disagrees_late(
    parted: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, target = serve(parted), tmp_path / "pack"
    job = PullJob.plan(hub.name, target, bits=2)
    journal = stopped_after(job, given_back_early(job), monkeypatch)
    faults = ["corrupt"]
    hub.trouble = lambda: faults.pop() if faults else None
    PullJob.plan(hub.name, target, bits=2).write()
    assert journal.offset
    assert not faults
    assert hashes(target) == hashes(pack(parted, tmp_path / "packed", bits=2))


@pytest.mark.parametrize("key", ["shard", "offset", "hash"])
def test_a_damaged_journal_is_found_out(
    parted: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    hub, target = serve(parted), tmp_path / "pack"
    stopped_after(PullJob.plan(hub.name, target, bits=2), (1, 0), monkeypatch)
    file = tmp_path / "pack.partial" / PROGRESS
    value = json.loads(file.read_text())
    value[key] = value[key][:-1] + "7" if key == "hash" else value[key] + 1
    file.write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="damaged"):
        PullJob.plan(hub.name, target, bits=2)


def test_a_part_that_was_cut(
    parted: Path, serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, target = serve(parted), tmp_path / "pack"
    job = PullJob.plan(hub.name, target, bits=2)
    stopped_after(job, given_back_early(job), monkeypatch)
    part = next((tmp_path / "pack.partial").glob("*.part"))
    with part.open("rb+") as file:
        file.truncate(part.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="gone or cut"):
        PullJob.plan(hub.name, target, bits=2).write()
