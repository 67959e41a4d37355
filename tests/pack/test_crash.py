"""Packing killed at any moment: a half-made pack never loads, and resuming gives the same bytes."""

from __future__ import annotations

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

import pytest

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, FlashMoeError
from flash_moe.format.manifest import MANIFEST
from flash_moe.model.load import load
from flash_moe.synth.model import Shape, synthesize
from tests.pack.packs import hashes, pack
from tests.strategies import tiny_checkpoint

# 130 MB: long enough to write (0.6 s on a virtio disk) that random kills land inside.
LARGE = Shape(layers=8, experts=128, hidden=256, intermediate=256)
PROGRESSIVE_KILLS, FRESH_KILLS = 12, 8
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

PACK = """
import sys
from pathlib import Path
from flash_moe.pack.job import PackJob

print("ready", flush=True)
target = Path(sys.stdin.readline().rstrip())
PackJob.plan(Path(sys.argv[1]), target).write()
print("done", flush=True)
"""


@dataclass(frozen=True)
class Reference:
    source: Path
    files: dict[str, str]
    seconds: float


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """The large source, and an undisturbed pack of it, by another process like the others."""
    folder = tmp_path_factory.mktemp("crash")
    synthesize(folder / "source", LARGE)
    with Packing(folder / "source") as packing:
        packing.begin(folder / "pack")
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


class Packing:
    """A process that packs when it is told to; made early, because starting is slow."""

    def __init__(self, source: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PACK, source],
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

    def begin(self, target: Path) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.process.stdin.write(f"{target}\n")
        self.process.stdin.flush()

    def kill_after(self, delay: float) -> None:
        select.select([self.process.stdout], [], [], delay)
        self.process.kill()
        self.process.wait()


def assert_half_made(target: Path) -> None:
    """Neither the target nor the workspace can be mistaken for a model."""
    assert not target.exists()
    partial = target.with_name(target.name + ".partial")
    for opening in (open_folder, load):
        with pytest.raises(CheckpointError):
            opening(partial)
    for inside in partial.glob("*/"):
        if not (inside / MANIFEST).exists():  # with it, only the name is missing
            with pytest.raises(FlashMoeError):
                load(inside)


def test_killed_at_random_moments(reference: Reference, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # pytest shows it if this fails
    moments = random.Random(seed)
    # Killed again and again in one folder. Less is left to do each time, so kills come sooner.
    kills = [("again", moments.uniform(0, 0.25)) for _ in range(PROGRESSIVE_KILLS)]
    kills += [(f"fresh-{n}", moments.random()) for n in range(FRESH_KILLS)]
    with ExitStack() as processes:
        following = processes.enter_context(Packing(reference.source))
        for number, (name, moment) in enumerate(kills):
            delay, target = moment * reference.seconds, tmp_path / name
            while True:
                packing = following
                following = processes.enter_context(Packing(reference.source))
                packing.begin(target)
                packing.kill_after(delay)
                if not target.exists():
                    break
                assert_as_undisturbed(reference, target)  # the kill came too late
                delay /= 2
            assert_half_made(target)
            if [name] != [other for other, _ in kills[number + 1 : number + 2]]:
                pack(reference.source, target)
                assert_as_undisturbed(reference, target)


def assert_as_undisturbed(reference: Reference, target: Path) -> None:
    """And remove it. A kill may leave the empty workspace behind, which disturbs nothing."""
    assert hashes(target) == reference.files
    shutil.rmtree(target)


def test_stopped_at_every_change_of_a_folder(small: Path, tmp_path: Path) -> None:
    """Random kills seldom hit the microseconds where names change. This stops at each of them."""
    pack(small, tmp_path / "undisturbed")
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
            # Only the record of the work is left; it must not disturb another pack.
            assert hashes(target) == expected, number
            shutil.rmtree(target)
        else:
            assert_half_made(target)
        pack(small, target)
        assert hashes(target) == expected, number


# From the n-th rename, removal or new folder on, nothing on disk can change any more, so that even
# what `finally` would tidy up stays as a kill leaves it. In its own process, because an audit hook
# cannot be removed.
STOP_AT_EVERY_CHANGE = """
import os, sys
from pathlib import Path
from flash_moe.pack.job import PackJob

class Stop(BaseException):
    pass

left = 0
changes = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}

def hook(event, args):
    global left
    # A folder's descriptor as the last argument means that rmtree walks through our folder.
    if event in changes and ("stopped-" in str(args) or args[-1] != -1):
        left -= 1
        if left < 0:
            raise Stop

sys.addaudithook(hook)
for number in range(1000):
    left = number
    try:
        PackJob.plan(Path(sys.argv[1]), Path(sys.argv[2], f"stopped-{number}")).write()
    except Stop:
        continue
    break
print(number)
"""
