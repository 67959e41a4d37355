"""The cost of saving a prompt's state, against computing it again.

    python backend/benchmarks/prefix.py FOLDER [LENGTH …]    # a checkpoint or pack

For every length: the bytes of the state, then seconds to copy it, to write it (synced), to read it
back from the page cache, and to compute it instead; the last also in seconds of all processors
together, which other work on the machine does not change. The best of three; the state is written
to a new folder in the current one.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe.decode.loop import Generation, TokenRequest, prefill_chunk
from flash_moe.model.load import StreamedModel, load
from flash_moe.prefix.boundaries import TurnMarks
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.state import put, take
from flash_moe.prefix.store import PrefixSettings, PrefixStore

LENGTHS = (32, 64, 256, 1024)
ROUNDS = 3
MARK, TURNS = 7, 6


def best(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def main() -> None:
    model = load(Path(sys.argv[1]))
    chunk = prefill_chunk(model)
    print(f"{model.plan.architecture}, {model.plan.bits}, {model.runtime.name}, chunk {chunk}")
    print("tokens  state MB  copy s  write s  read s  compute s  CPU s  faster")
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for length in map(int, sys.argv[2:] or LENGTHS):
            ids = [100 + n % 900 for n in range(length)]
            measure(model, ids, chunk, DiskSnapshots(Path(folder), 1 << 40, "bench", {}))
        turns(model)


def measure(model: StreamedModel, ids: list[int], chunk: int, disk: DiskSnapshots) -> None:
    state = model.make_cache()

    def compute(cache: list[Any]) -> None:
        for start in range(0, len(ids), chunk):
            model.advance(mx.array(ids[start : start + chunk])[None], cache)

    compute(state)
    computed = best(lambda: compute(model.make_cache()))
    processor = best(lambda: compute(model.make_cache()), time.process_time)
    snapshot = take(state, ids, ())
    copied = best(lambda: take(state, ids, ()))
    key = f"{len(ids):040}"

    def write() -> None:
        disk.remove(key)
        disk.put(key, snapshot)

    def read() -> None:
        saved = disk.get(key, ids, ())
        assert saved is not None
        put(saved, model.make_cache())

    written, back = best(write), best(read)
    print(
        f"{len(ids):6}  {snapshot.nbytes / 1e6:8.2f}  {copied:6.4f}  {written:7.4f}  {back:6.4f}"
        f"  {computed:9.4f}  {processor:5.2f}  {computed / back:4.0f} ×"
    )


def turns(model: StreamedModel) -> None:
    """A chat: 300 tokens of instructions, then turns of 40 tokens asked and 120 answered."""
    for reuse in (False, True):
        ids = [100 + n % 900 for n in range(300)]
        store = PrefixStore(model, TurnMarks((MARK,)), PrefixSettings()) if reuse else None
        seconds, processor = [], time.process_time()
        for turn in range(TURNS):
            ids += [200 + (turn * 31 + n) % 700 for n in range(40)]
            prompt = [*ids, MARK, 8]
            begin = store.begin if store else None
            generation = Generation(model, TokenRequest(prompt, max_tokens=1), begin)
            list(generation)
            seconds.append(generation.stats.seconds_to_first_token)
            ids = [*prompt[:-1], *(300 + (turn * 17 + n) % 600 for n in range(120))]
        name = "saved" if reuse else "read again"
        each = ", ".join(f"{s:.2f}" for s in seconds)
        processor = time.process_time() - processor
        print(
            f"first token of each turn, {name}: {each}; mean {statistics.mean(seconds):.3f} s; "
            f"{processor:.2f} s of processors"
        )


if __name__ == "__main__":
    main()
