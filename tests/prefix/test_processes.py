"""Several processes on one folder, some of them killed: what loads is always whole."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.folder import clear, entries, file_name
from tests.prefix.conversations import contents
from tests.prefix.kept_files import files, small

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
KILLS, ROUNDS = 12, 60
KEY = "f" * 40  # none that the writers use

# Snapshots that say of themselves what they are: number n is n tokens, and n in all 4 MB.
WRITER = """
import sys
from pathlib import Path
import mlx.core as mx
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.state import Snapshot

folder, seed, rounds, limit = Path(sys.argv[1]), *map(int, sys.argv[2:])
disk = DiskSnapshots(folder, limit, "scope", {})
print("ready", flush=True)
for turn in range(rounds):
    n = (turn * 7 + seed) % 10
    tokens = tuple(range(n))
    disk.put(f"{n:040}", Snapshot(tokens, (), [n], [mx.full((1 << 20,), n, mx.int32)]))
    other = (n * 3 + 1) % 10
    found = disk.get(f"{other:040}", tuple(range(other)), ())
    if found is not None:
        assert found.structure == [other]
        assert mx.all(found.arrays[0] == other).item()
    if turn % 5 == 4:
        disk.remove(f"{n:040}")
print("done", flush=True)
"""


def start(folder: Path, seed: int, rounds: int, limit: int = 1 << 30) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, folder, *map(str, (seed, rounds, limit))],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def temporaries(folder: Path) -> list[str]:
    return [name for name in files(folder) if name.endswith(".tmp")]


def assert_all_sound(folder: Path) -> None:
    disk = DiskSnapshots(folder, 1 << 30, "scope", {})
    names = files(folder)
    for n in range(10):
        found = disk.get(f"{n:040}", tuple(range(n)), ())
        if found is not None:
            assert found.structure == [n]
            assert set(found.arrays[0].tolist()) == {n}
    assert files(folder) == names, "a file was removed, because it was not whole"


def test_killed_while_writing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # pytest shows it if this fails
    moments, leftovers = random.Random(seed), 0
    for number in range(KILLS):
        with start(tmp_path, number, 10_000) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        if tmp_path.exists():
            leftovers += bool(temporaries(tmp_path))
            assert_all_sound(tmp_path)
    print(f"{leftovers} of {KILLS} kills left a half-written file")
    assert leftovers, "kills came too late to mean much"
    # A write that comes later removes what is left over.
    for name in temporaries(tmp_path):
        os.utime(tmp_path / name, (1, 1))
    DiskSnapshots(tmp_path, 1 << 30, "scope", {}).put(KEY, small())
    assert temporaries(tmp_path) == []


def test_two_processes_at_once(tmp_path: Path) -> None:
    """They write, read, touch and remove the same names in a folder that holds only five."""
    limit = 5 * ((4 << 20) + 4096)
    processes = [start(tmp_path, seed, ROUNDS, limit) for seed in (0, 3)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "ready\ndone\n"), errors
    assert temporaries(tmp_path) == []
    assert_all_sound(tmp_path)
    # Each makes room before it writes, so both together are over by one at most.
    assert sum(entry.nbytes for entry in entries(tmp_path)) <= limit + (5 << 20)


def test_a_file_that_somebody_writes_is_no_leftover(tmp_path: Path) -> None:
    """Even if that takes long; without its writer it is one."""
    disk = DiskSnapshots(tmp_path, 1 << 30, "scope", {})
    path = tmp_path / f".{file_name(KEY)}.7.tmp"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(path, (1, 1))
        disk.put("a" * 40, small())
        assert path.exists()
    disk.put("b" * 40, small())
    assert not path.exists()
    path.touch()  # new, so its writer may be about to lock it
    disk.put("c" * 40, small())
    assert path.exists()


def test_removed_while_it_is_read(tmp_path: Path) -> None:
    disk = DiskSnapshots(tmp_path, 1 << 30, "scope", {})
    disk.put(KEY, small())
    path = next(tmp_path.iterdir())
    before = contents(small())
    with path.open("rb"):
        clear(tmp_path)
        assert disk.get(KEY, (5, 6, 7), (2, 3)) is None
    disk.put(KEY, small())
    found = disk.get(KEY, (5, 6, 7), (2, 3))
    assert found is not None
    assert contents(found) == before
