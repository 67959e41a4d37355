"""Several processes on one folder, some of them killed: every file that loads is whole."""

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
from flash_moe.prefix.folder import PromptFolder, file_name
from tests.prefix.conversations import contents
from tests.prefix.saved_files import files, small

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
KILLS, ROUNDS = 12, 60
KEY = "f" * 40  # not one of the writers'

# Snapshots that show which one they are: number n has n tokens, and 4 MB filled with n.
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
    snapshot = disk.get(f"{other:040}", tuple(range(other)), ())
    if snapshot is not None:
        assert snapshot.structure == [other]
        assert mx.all(snapshot.arrays[0] == other).item()
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


def temporaries(folder: Path) -> set[str]:
    return {name for name in files(folder) if name.endswith(".tmp")} if folder.exists() else set()


def writes(process: subprocess.Popen[str], folder: Path, before: set[str]) -> bool:
    """Whether a process has a file half-written; then it is stopped, otherwise it goes on."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    if temporaries(folder) > before:
        return True
    process.send_signal(signal.SIGCONT)
    return False


def assert_all_sound(folder: Path) -> None:
    disk = DiskSnapshots(folder, 1 << 30, "scope", {})
    names = files(folder)
    for n in range(10):
        snapshot = disk.get(f"{n:040}", tuple(range(n)), ())
        if snapshot is not None:
            assert snapshot.structure == [n]
            assert set(snapshot.arrays[0].tolist()) == {n}
    assert files(folder) == names, "a file was removed because it was not whole"


def test_killed_while_writing(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # pytest shows it if this fails
    moments = random.Random(seed)
    for number in range(KILLS):
        before = temporaries(tmp_path)
        with start(tmp_path, number, 10_000) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.1))
            # Half of them at any moment, half of them while a file is being written.
            while number % 2 and not writes(process, tmp_path, before):
                time.sleep(moments.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
        if tmp_path.exists():
            assert_all_sound(tmp_path)
        if number % 2:
            assert temporaries(tmp_path) > before
    # A later write removes the leftovers.
    for name in temporaries(tmp_path):
        os.utime(tmp_path / name, (1, 1))
    DiskSnapshots(tmp_path, 1 << 30, "scope", {}).put(KEY, small())
    assert temporaries(tmp_path) == set()


def test_two_processes_at_once(tmp_path: Path) -> None:
    """They write, read, touch and remove the same names in a folder with room for only five."""
    limit = 5 * ((4 << 20) + 4096)
    processes = [start(tmp_path, seed, ROUNDS, limit) for seed in (0, 3)]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output) == (0, "ready\ndone\n"), errors
    assert temporaries(tmp_path) == set()
    assert_all_sound(tmp_path)
    # Each makes room before it writes, so both together exceed the limit by one file at most.
    prompts = PromptFolder(tmp_path).prompts()
    assert sum(prompt.nbytes for prompt in prompts) <= limit + (5 << 20)


def test_a_file_that_is_being_written_is_not_a_leftover(tmp_path: Path) -> None:
    """Even if that takes long; once its writer is gone, it is one."""
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
        PromptFolder(tmp_path).clear()
        assert disk.get(KEY, (5, 6, 7), (2, 3)) is None
    disk.put(KEY, small())
    snapshot = disk.get(KEY, (5, 6, 7), (2, 3))
    assert snapshot is not None
    assert contents(snapshot) == before
