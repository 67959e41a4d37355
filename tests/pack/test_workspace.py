"""The folder that a pack is made in: finished work stays, and one process works in it at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, NoSpace, Remedy
from flash_moe.format.manifest import MANIFEST, read_manifest, verify
from flash_moe.pack.job import PackJob
from tests.pack.packs import hashes, interrupt, pack
from tests.strategies import tiny_checkpoint


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source")


def test_the_source_changed_in_between(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    config = json.loads((small / "config.json").read_bytes())
    config["text_config"]["num_experts_per_tok"] = 3
    (small / "config.json").write_text(json.dumps(config))
    partial = hashes(tmp_path / "pack.partial")
    with pytest.raises(CheckpointError, match="was begun from another checkpoint"):
        pack(small, target)
    assert hashes(tmp_path / "pack.partial") == partial
    assert not target.exists()


def test_another_fine_tune_of_the_same_model(small: Path, tmp_path: Path) -> None:
    """Its config and headers are the same to the byte. Nor does one tensor that differs pass."""
    target = tmp_path / "pack"
    half_made(small, target)
    partial = hashes(tmp_path / "pack.partial")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    slightly = shutil.copytree(small, tmp_path / "slightly")
    tensor = next(t for n, t in open_folder(slightly).tensors.items() if n.endswith("A_log"))
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(tensor.nbytes))
    for source in (other, slightly):
        headers = [tensor.shape for tensor in open_folder(source).tensors.values()]
        assert headers == [tensor.shape for tensor in open_folder(small).tensors.values()]
        with pytest.raises(CheckpointError, match="was begun from another checkpoint"):
            pack(source, target)
    assert hashes(tmp_path / "pack.partial") == partial
    pack(small, target)
    assert hashes(target) == hashes(pack(small, tmp_path / "reference"))


def half_made(source: Path, target: Path) -> None:
    """Stop a pack in this process after its first layer."""
    interrupt(PackJob.plan(source, target).write, 1)


def test_a_finished_layer_is_not_written_again(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    before = first.stat()
    pack(small, target)
    after = (target / first.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_finished_layer_of_the_wrong_size_is_written_again(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    os.truncate(first, 100)
    pack(small, target)
    assert verify(target, read_manifest(target)) == []


def test_leftovers_under_temporary_names_are_not_packed(small: Path, tmp_path: Path) -> None:
    """No run begins this file again: it is gone from the source by now."""
    half_made(small, tmp_path / "pack")
    (tmp_path / "pack.partial" / "pack" / ".merges.txt.tmp.txt").write_text("half")
    pack(small, tmp_path / "pack")
    names = {file.name for file in (tmp_path / "pack").iterdir()}
    assert names == {MANIFEST, *read_manifest(tmp_path / "pack").files}


def test_no_space_is_found_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packs" / "pack"
    job = PackJob.plan(small, target)
    free = job.nbytes - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(NoSpace) as refusal:
        job.write()
    assert refusal.value.remedy is Remedy.PACK_ELSEWHERE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    free = job.nbytes
    job.write()
    assert verify(target, read_manifest(target)) == []


def test_files_that_are_written_already_need_no_space(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    job = PackJob.plan(small, target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    free = job.nbytes - first.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    job.write()


def test_a_second_pack_at_the_same_time_is_refused(small: Path, tmp_path: Path) -> None:
    pack(small, tmp_path / "undisturbed")
    first, second = (PackJob.plan(small, tmp_path / "pack") for _ in range(2))
    refusals: list[str] = []

    def try_second(amount: int) -> None:
        for _ in range(2):  # the first refusal must not make way for the second try
            with pytest.raises(CheckpointError) as refusal:
                second.write()
            refusals.append(str(refusal.value))

    first.write(try_second)
    assert refusals
    assert all("Another pack is being written" in text for text in refusals)
    with pytest.raises(CheckpointError, match="exists"):
        second.write()
    assert hashes(tmp_path / "pack") == hashes(tmp_path / "undisturbed")
    assert not (tmp_path / "pack.partial").exists()


def test_a_process_that_waited_for_the_lock_looks_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the folder and locking it, the winner may have finished and removed it."""
    target = tmp_path / "pack"
    job = PackJob.plan(small, target)
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        if not target.exists():
            monkeypatch.setattr(fcntl, "flock", flock)
            PackJob.plan(small, target).write()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(CheckpointError):
        job.write()
    assert verify(target, read_manifest(target)) == []


def test_files_that_a_manifest_cannot_list_stay_behind(small: Path, tmp_path: Path) -> None:
    """macOS leaves `._config.json` on foreign disks; packs with it were refused when loaded."""
    for name in ("._config.json", "tokenizer (1).json", "merges.txt"):
        (small / name).write_text("{}")
    pack(small, tmp_path / "pack")
    names = {file.name for file in (tmp_path / "pack").iterdir()}
    assert names == {MANIFEST, *read_manifest(tmp_path / "pack").files}
    assert "merges.txt" in names
    assert not names & {"._config.json", "tokenizer (1).json"}


def test_packing_twice_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    pack(small, tmp_path / "one")
    pack(small, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
