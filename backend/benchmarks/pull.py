"""A pull against plain downloads of the same bytes, in turn, from a server in another process; the
most that it has on disk; and its bytes against its plan's.

    python backend/benchmarks/pull.py FOLDER [--rate MB/s] [--rounds N] [--layers N] [--experts N]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

CONNECTIONS = 8
FORMS: list[dict[str, Any]] = [{}, {"bits": 2}, {"planes": True}]
SERVER = """
import sys, time
from pathlib import Path
from tests.pull.hub import serving

with serving(Path(sys.argv[1])) as hub:
    hub.rate = float(sys.argv[2]) or None
    print(hub.endpoint, flush=True)
    for _ in sys.stdin:
        print(hub.served, flush=True)
"""


@contextmanager
def server(folder: Path, rate: float) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), str(rate)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(["backend", "."])},
    ) as process:
        yield process
        process.kill()


def ask(process: subprocess.Popen[str]) -> int:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return int(process.stdout.readline())


class Watch:
    """The most that a folder has on disk while something runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most, self._end = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        from flash_moe.format.holes import allocated

        while not self._end.wait(0.02):
            self.most = max(self.most, allocated(self.folder))


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and processor seconds of all threads."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu


def plain(name: str, folder: Path) -> None:
    """The same ranges over as many connections into files, and nothing else."""
    from flash_moe.pull.ranges import Ranges
    from flash_moe.pull.repository import find_repository
    from flash_moe.pull.stream import Segment, stream

    repository = find_repository(name)
    ranges = Ranges(repository)
    for file in repository.files:
        segments = (
            Segment(file, at, min(at + (8 << 20), file.size)) for at in range(0, file.size, 8 << 20)
        )
        with (folder / file.name).open("wb") as out:
            for segment in stream(ranges, segments):
                out.write(segment.buffer)
            out.flush()
            os.fsync(out.fileno())


def hub_download(name: str, folder: Path) -> None:
    """Its own client: a connection a file."""
    from huggingface_hub import hf_hub_download

    from flash_moe.pull.repository import find_repository

    files = [file.name for file in find_repository(name).files]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(lambda file: hf_hub_download(name, file, local_dir=folder), files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=0.0, help="MB/s of all connections together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    given = parser.parse_args()
    from flash_moe.synth.model import SHAPES
    from tests.pull.sources import shuffled_checkpoint

    source = given.folder / "Model-4bit"
    if not source.exists():
        shape = replace(SHAPES["397b"], layers=given.layers, experts=given.experts, vocabulary=8192)
        shuffled_checkpoint(source, shape, shards=3, dtype="bfloat16")
    with server(source, given.rate * 1e6 / CONNECTIONS) as process:
        assert process.stdout is not None
        os.environ |= {
            "HF_ENDPOINT": process.stdout.readline().strip(),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        measure(given.folder, process, given.rounds)


def measure(folder: Path, process: subprocess.Popen[str], rounds: int) -> None:
    from flash_moe.pull.job import PullJob

    name, place = "org/Model-4bit", folder / "place"
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for title, download in (("plain", plain), ("huggingface_hub", hub_download)):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            took, cpu = timed(lambda fetch=download: fetch(name, place))  # type: ignore[misc]
            seconds.setdefault(title, []).append(took)
            print(f"{title:<16} {took:6.2f} s, {cpu:5.2f} s of processors")
        for form in FORMS:
            shutil.rmtree(place)
            place.mkdir()
            before = ask(process)
            job = PullJob.plan(name, place / "pack", **form)
            with Watch(place) as watch:
                took, cpu = timed(job.write)
            sent, size = ask(process) - before, sum(f.stat().st_size for f in place.rglob("*.*"))
            title = json.dumps(form)
            seconds.setdefault(title, []).append(took)
            print(
                f"{title:<16} {took:6.2f} s, {cpu:5.2f} s of processors; on disk "
                f"{watch.most / 1e6:,.0f} MB at most (plan {job.form.peak_bytes / 1e6:,.0f}), pack "
                f"{size / 1e6:,.0f}: {(watch.most - size) / 1e6:,.0f} more; sent {sent:,} bytes, "
                f"planned {job.repository.nbytes:,}"
            )
    nbytes = job.repository.nbytes
    base = statistics.median(seconds["plain"])
    for title, all_of_it in seconds.items():
        median = statistics.median(all_of_it)
        print(f"{title:<16} {nbytes / median / 1e6:,.0f} MB/s, {base / median:.2f} of plain")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
