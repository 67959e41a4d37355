"""A pull killed at any moment: what is left never loads, and going on gives the same bytes.
`pytest -m slow tests/pull` kills fifty times."""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pack.packs import hashes, pack
from tests.pull.hub import Hub, serving
from tests.pull.sources import shuffled_checkpoint
from tests.pull.test_faults import assert_no_model

PULL = """
import sys
from pathlib import Path
from flash_moe.pull import receive, route, spans, stream
from flash_moe.pull.job import PullJob

# Small parts, so that kills land between checkpoints and seals.
stream.RANGE_BYTES, stream.WINDOW_BYTES, spans.BATCH_BYTES = 32 << 10, 256 << 10, 64 << 10
route.CHECKPOINT_BYTES = receive.CHECKPOINT_BYTES = 150 << 10
print("ready", flush=True)
target = Path(sys.stdin.readline().rstrip())
PullJob.plan(sys.argv[1], target, bits=2).write()
print("done", flush=True)
"""


def pulling(hub: Hub) -> subprocess.Popen[str]:
    """A process that pulls when it is told to; made early, because starting is slow."""
    return subprocess.Popen(
        [sys.executable, "-c", PULL, hub.name],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_OFFLINE": "0",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def begin(process: subprocess.Popen[str], target: Path) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write(f"{target}\n")
    process.stdin.flush()


def kill_again_and_again(folder: Path, kills: int) -> None:
    source = shuffled_checkpoint(folder / "Model-4bit")
    expected = hashes(pack(source, folder / "packed", bits=2))
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # pytest shows it if this fails
    moments, killed = random.Random(seed), 0
    with serving(source) as hub:
        start = time.perf_counter()
        process = pulling(hub)
        begin(process, folder / "whole")
        assert process.communicate()[0] == "done\n"
        seconds = time.perf_counter() - start
        assert hashes(folder / "whole") == expected
        number, following = 0, pulling(hub)
        while killed < kills:
            target, number = folder / f"pack-{number}", number + 1
            while not target.exists():
                process, following = following, pulling(hub)
                begin(process, target)
                if killed < kills:
                    # Mostly soon after the start: what is left of a pull takes less each time.
                    delay = moments.uniform(0, seconds * moments.choice((0.3, 0.3, 0.8)))
                    select.select([process.stdout], [], [], delay)
                    killed += process.poll() is None
                    process.kill()
                process.communicate()
                if not target.exists() and target.with_name(f"{target.name}.partial").exists():
                    assert_no_model(target)
            assert hashes(target) == expected
        following.kill()
        following.communicate()
        print(f"{killed} kills, {number} packs")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 5)


@pytest.mark.slow
def test_killed_fifty_times(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path, 50)
