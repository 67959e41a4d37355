"""`pack` killed at any moment: what is there never loads, and going on gives the same bytes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, FlashMoeError, NoSpace
from flash_moe.format.manifest import MANIFEST, read_manifest, verify
from flash_moe.model.load import load
from flash_moe.pack import job as pack_module
from flash_moe.pack.job import plan_pack
from flash_moe.synth.model import Shape, synthesize
from tests.strategies import tiny_checkpoint

# 130 MB: long enough to write (0.6 s on a virtio disk) that random kills land inside.
LARGE = Shape(layers=8, experts=128, hidden=256, intermediate=256)
PROGRESSIVE_KILLS, FRESH_KILLS = 12, 8
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

PACK = """
import sys
from pathlib import Path
from flash_moe.checkpoint.folder import open_folder
from flash_moe.pack.job import plan_pack

job = plan_pack(open_folder(Path(sys.argv[1])), Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
job.write()
print("done", flush=True)
"""


@dataclass(frozen=True)
class Reference:
    source: Path
    files: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """The large source, and what an undisturbed pack of it is, in another process like the rest."""
    folder = tmp_path_factory.mktemp("crash")
    synthesize(folder / "source", LARGE)
    with Packing(folder / "source", folder / "pack") as packing:
        packing.begin()
        start = time.perf_counter()
        assert packing.process.wait(60) == 0
        seconds = time.perf_counter() - start
    files = hashes(folder / "pack")
    shutil.rmtree(folder / "pack")
    yield Reference(folder / "source", files, seconds)
    shutil.rmtree(folder)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "source")


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


class Packing:
    """A process that plans at once, and writes when told; it is made early to save its start."""

    def __init__(self, source: Path, target: Path) -> None:
        self.target = target
        self.process = subprocess.Popen(
            [sys.executable, "-c", PACK, source, target],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Packing:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill_after(self, delay: float) -> bool:
        """Whether the kill came before the pack was done."""
        self.begin()
        finished, _, _ = select.select([self.process.stdout], [], [], delay)
        self.process.kill()
        self.process.wait()
        return not finished


def assert_half_made(target: Path) -> None:
    """Neither the target nor the folder of the work can be taken for a model."""
    assert not target.exists()
    partial = target.with_name(target.name + ".partial")
    for opening in (open_folder, load):
        with pytest.raises(CheckpointError):
            opening(partial)
    for inside in partial.glob("*/"):
        if not (inside / MANIFEST).exists():  # with it, only the name is missing
            with pytest.raises(FlashMoeError):
                load(inside)


def finish(source: Path, target: Path) -> None:
    plan_pack(open_folder(source), target).write()


def assert_as_undisturbed(reference: Reference, target: Path) -> None:
    if not target.exists():
        finish(reference.source, target)
    assert hashes(target) == reference.files
    assert not target.with_name(target.name + ".partial").exists()
    shutil.rmtree(target)


def test_killed_at_random_moments(reference: Reference, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # pytest shows it if this fails
    moments = random.Random(seed)
    # Killed again and again in one folder, where less is left each time: so sooner each time.
    kills = [(tmp_path / "again", moments.uniform(0, 0.25)) for _ in range(PROGRESSIVE_KILLS)]
    kills += [(tmp_path / f"fresh-{n}", moments.random()) for n in range(FRESH_KILLS)]
    in_time = 0
    with ExitStack() as processes:
        packings = [processes.enter_context(Packing(reference.source, kills[0][0]))]
        for number, (target, moment) in enumerate(kills):
            following = kills[number + 1][0] if number + 1 < len(kills) else None
            if following:
                packings.append(processes.enter_context(Packing(reference.source, following)))
            if not target.exists() and packings[number].kill_after(moment * reference.seconds):
                in_time += 1
                assert_half_made(target)
            if following != target:
                assert_as_undisturbed(reference, target)
    print(f"{in_time} of {len(kills)} kills came before the pack was done")
    assert in_time >= len(kills) // 4, "kills came too late to mean much"


def test_stopped_at_every_change_of_a_folder(small: Path, tmp_path: Path) -> None:
    """Random kills seldom hit the microseconds where names change. This stops at each of them."""
    finish(small, tmp_path / "undisturbed")
    expected = hashes(tmp_path / "undisturbed")
    done = subprocess.run(
        [sys.executable, "-c", STOP_AT_EVERY_CHANGE, small, tmp_path],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stops = int(done.stdout)
    assert stops > 20
    for number in range(stops):
        target = tmp_path / f"stopped-{number}"
        if target.exists():
            # Only the record of the work is left over; it must not disturb another pack.
            assert hashes(target) == expected, number
            shutil.rmtree(target)
        else:
            assert_half_made(target)
        finish(small, target)
        assert hashes(target) == expected, number


# From the n-th rename, removal or new folder on, nothing on disk can change any more, so that
# what `finally` would tidy up stays as a kill leaves it. In its own process, because an audit
# hook is for life.
STOP_AT_EVERY_CHANGE = """
import os, sys
from pathlib import Path
from flash_moe.checkpoint.folder import open_folder
from flash_moe.pack.job import plan_pack

class Stop(BaseException):
    pass

left = 0
changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

def hook(event, args):
    global left
    # With a folder's descriptor as last argument, it is rmtree that walks through ours.
    if event in changes and ("stopped-" in str(args) or args[-1] != -1):
        left -= 1
        if left < 0:
            raise Stop

sys.addaudithook(hook)
for number in range(1000):
    left = number
    try:
        plan_pack(open_folder(Path(sys.argv[1])), Path(sys.argv[2], f"stopped-{number}")).write()
    except Stop:
        continue
    break
print(number)
"""


def test_the_source_changed_in_between(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    config = json.loads((small / "config.json").read_bytes())
    config["text_config"]["num_experts_per_tok"] = 3
    (small / "config.json").write_text(json.dumps(config))
    partial = hashes(tmp_path / "pack.partial")
    with pytest.raises(CheckpointError, match="was begun from another checkpoint"):
        finish(small, target)
    assert hashes(tmp_path / "pack.partial") == partial
    assert not target.exists()


class Stop(Exception):
    pass


def half_made(source: Path, target: Path) -> None:
    """Stop a pack in this process after its first layer."""
    calls = []

    def stop(nbytes: int) -> None:
        calls.append(nbytes)
        if len(calls) == 2:
            raise Stop

    with pytest.raises(Stop):
        plan_pack(open_folder(source), target).write(stop)


def test_a_finished_layer_is_not_written_again(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    before = first.stat()
    finish(small, target)
    after = (target / first.name).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_finished_layer_of_the_wrong_size_is_written_again(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    os.truncate(first, 100)
    finish(small, target)
    assert verify(target, read_manifest(target)) == []


def test_what_a_kill_left_under_a_temporary_name_is_not_packed(small: Path, tmp_path: Path) -> None:
    """Nothing begins this file again: it is gone from the source by now."""
    half_made(small, tmp_path / "pack")
    (tmp_path / "pack.partial" / "pack" / ".merges.txt.tmp.txt").write_text("half")
    finish(small, tmp_path / "pack")
    names = {file.name for file in (tmp_path / "pack").iterdir()}
    assert names == {MANIFEST, *read_manifest(tmp_path / "pack").files}


def test_no_space_is_found_before_anything_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "packs" / "pack"
    job = plan_pack(open_folder(small), target)
    free = job.nbytes - 1
    disk = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=free))
    for name in ("rmtree", "copyfile"):
        setattr(disk, name, getattr(shutil, name))
    monkeypatch.setattr(pack_module, "shutil", disk)
    with pytest.raises(NoSpace):
        job.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    free = job.nbytes
    job.write()
    assert verify(target, read_manifest(target)) == []


def test_what_is_written_already_needs_no_space(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "pack"
    half_made(small, target)
    job = plan_pack(open_folder(small), target)
    (first,) = tmp_path.glob("pack.partial/**/layer_000.experts")
    free = job.nbytes - first.stat().st_size
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    job.write()


def test_a_second_pack_at_the_same_time_is_refused(reference: Reference, tmp_path: Path) -> None:
    target = tmp_path / "pack"
    with Packing(reference.source, target) as first:
        first.begin()
        while not list(tmp_path.glob("pack.partial/**/*.experts")):
            time.sleep(0.001)
        job = plan_pack(open_folder(reference.source), target)
        for _ in range(2):  # the first refusal must not make way for the second try
            with pytest.raises(CheckpointError, match="Another pack is being written"):
                job.write()
        assert first.process.wait(60) == 0
        with pytest.raises(CheckpointError, match="exists"):
            job.write()
    assert hashes(target) == reference.files


def test_who_waited_for_the_lock_looks_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the folder and locking it, the winner may have finished and removed it."""
    target = tmp_path / "pack"
    job = plan_pack(open_folder(small), target)
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        if not target.exists():
            monkeypatch.setattr(pack_module.fcntl, "flock", flock)
            plan_pack(open_folder(small), target).write()
        flock(fd, operation)

    monkeypatch.setattr(pack_module.fcntl, "flock", late)
    with pytest.raises(CheckpointError):
        job.write()
    assert verify(target, read_manifest(target)) == []


def test_files_that_a_manifest_cannot_list_stay_behind(small: Path, tmp_path: Path) -> None:
    """macOS leaves `._config.json` on foreign disks; a pack with it was refused when loaded."""
    for name in ("._config.json", "tokenizer (1).json", "merges.txt"):
        (small / name).write_text("{}")
    finish(small, tmp_path / "pack")
    names = {file.name for file in (tmp_path / "pack").iterdir()}
    assert names == {MANIFEST, *read_manifest(tmp_path / "pack").files}
    assert "merges.txt" in names
    assert not names & {"._config.json", "tokenizer (1).json"}


def test_packing_the_same_twice_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    finish(small, tmp_path / "one")
    finish(small, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
