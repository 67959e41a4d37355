"""A token of a streamed model by part, cold and hot, and what the disk gives for equal records.

    llm flash-moe synth --shape 397b --layers 15 --bits 2 --name wide --to FOLDER
    python backend/benchmarks/token_parts.py FOLDER/wide --experts 4 --prompts 37,512

Ratios of one run: disks of rented machines differ by a factor of three from day to day.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_moe.format.layout import RECORD_ALIGNMENT
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Settings
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import AT, FILE, LENGTH, OFFSET, Pieces

DISK_PAGE = 4096
# Tokens whose time is not counted: kernels are compiled, pages are touched for the first time.
WARM = 2


def evict(model: StreamedModel, folder: Path) -> None:
    """Out of the page cache, which keeps what is mapped: so that goes first."""
    if (mapping := model.streamer.mapping) is not None:
        limit, mapping.limit = mapping.limit, 0
        mapping.find(0, [0])
        mapping.limit = limit
    for file in folder.iterdir():
        if file.suffix in (".safetensors", ".experts"):
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def tokens(model: StreamedModel, count: int, title: str, before: Callable[[], None] | None) -> None:
    """One row: the median of tokens one after the other."""
    streamer, cache, rows = model.streamer, model.make_cache(), []
    counters, dice = streamer.reader.counters, random.Random(title)
    for _ in range(WARM + count):
        if before is not None:
            before()
        old = (counters.seconds, streamer.readback_seconds, counters.nbytes)
        start = time.perf_counter()
        mx.eval(model(mx.array([[dice.randrange(300, 900)]]), cache=cache))
        took = time.perf_counter() - start
        now = (counters.seconds, streamer.readback_seconds, counters.nbytes)
        rows.append((took, *(b - a for a, b in zip(old, now, strict=True))))
    took, reading, waiting, nbytes = map(statistics.median, zip(*rows[WARM:], strict=True))
    rate = f"{nbytes / reading / 1e9:.1f}" if nbytes else "–"
    rest = took - reading - waiting
    parts = " | ".join(f"{seconds * 1e3:.1f}" for seconds in (took, reading, waiting, rest))
    print(f"| {title} | {parts} | {nbytes / 1e6:.0f} | {rate} |", flush=True)


@contextmanager
def nothing_read(model: StreamedModel) -> Iterator[None]:
    """Computes whatever is in the bank."""
    reader, mapping = model.streamer.reader, model.streamer.mapping
    own = Reader.read
    Reader.read = lambda self, pieces, into: None  # type: ignore[method-assign]
    model.streamer.mapping = None
    try:
        yield
    finally:
        Reader.read = own  # type: ignore[method-assign]
        model.streamer.reader, model.streamer.mapping = reader, mapping


def raw(model: StreamedModel, folder: Path, direct: bool, cold: bool) -> None:
    """As many records of each layer as a token has, at random, by the engine's own reader."""
    store, k = model.streamer.store, model.plan.experts_per_token
    dice, reader, files = random.Random(f"{direct}{cold}"), model.streamer.reader, dict[int, int]()
    buffer = memoryview(mmap.mmap(-1, (k + 1) * (model.streamer.bank.stride + 32 * DISK_PAGE)))
    rows = []
    for _ in range(WARM + 4):
        if cold:
            evict(model, folder)
        else:  # the same ones again
            dice = random.Random("again")
        start, nbytes = time.perf_counter(), 0
        for number, layer in enumerate(store.layers):
            pieces = store.pieces(number, dice.sample(range(layer.experts), k))
            pieces[:, AT] = 0
            wanted = int(pieces[:, LENGTH].sum())
            if direct:
                pieces = whole_pages(pieces, files)
            sizes = -(-pieces[:, LENGTH] // DISK_PAGE) * DISK_PAGE
            pieces[:, AT] = np.cumsum(sizes) - sizes
            reader.read(pieces, buffer)
            nbytes += wanted
        rows.append(nbytes / (time.perf_counter() - start) / 1e9)
    for fd in files.values():
        os.close(fd)
    kind = f"{'direct' if direct else 'buffered'}, {'cold' if cold else 'again'}"
    print(f"| {kind} | {statistics.median(rows[WARM:]):.2f} |", flush=True)


def whole_pages(pieces: Pieces, files: dict[int, int]) -> Pieces:
    """The same from files that go past the page cache, which takes whole pages only."""
    for fd in {int(fd) for fd in pieces[:, FILE]} - files.keys():
        files[fd] = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)
    wide = pieces.copy()
    wide[:, FILE] = [files[int(fd)] for fd in pieces[:, FILE]]
    wide[:, OFFSET] = pieces[:, OFFSET] // DISK_PAGE * DISK_PAGE
    ends = pieces[:, OFFSET] + pieces[:, LENGTH]
    wide[:, LENGTH] = -(-ends // DISK_PAGE) * DISK_PAGE - wide[:, OFFSET]
    return wide


def prompts(model: StreamedModel, lengths: list[int]) -> None:
    print(
        "\n| prompt | first, s | again, s | of which reading | experts, GB |\n|--:|--:|--:|--:|--:|"
    )
    counters = model.streamer.reader.counters
    for length in lengths:
        ids = mx.array([random.Random(length).choices(range(300, 900), k=length)])
        times = []
        for _ in range(2):
            reading, nbytes, start = counters.seconds, counters.nbytes, time.perf_counter()
            cache = model.make_cache()
            for at in range(0, length, 512):
                model.advance(ids[:, at : at + 512], cache)
            times.append((time.perf_counter() - start, counters.seconds - reading))
        size = (counters.nbytes - nbytes) / 1e9
        (first, _), (again, reading) = times
        print(f"| {length} | {first:.2f} | {again:.2f} | {reading:.2f} | {size:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--prompts", default="37")
    args = parser.parse_args()
    assert RECORD_ALIGNMENT % DISK_PAGE == 0
    model = load(args.folder, Settings(experts=args.experts))
    plan = model.plan
    print(
        f"{plan.layers} layers, {plan.experts_per_token} experts a token, "
        f"{plan.expert_bytes / 1e9:.1f} GB of experts, {model.runtime.name} runtime; loaded in "
        f"{model.load_seconds:.1f} s\n\n| raw reads | GB/s |\n|---|--:|"
    )
    raw(model, args.folder, direct=True, cold=True)
    raw(model, args.folder, direct=False, cold=True)
    raw(model, args.folder, direct=False, cold=False)
    columns = ("ms a token", "all", "reading", "waiting for the router", "rest", "MB", "GB/s")
    print(f"\n| {' | '.join(columns)} |\n|---{'|--:' * 6}|")
    tokens(model, args.tokens, "hot", None)
    tokens(model, args.tokens, "hot", None)
    with nothing_read(model):
        tokens(model, args.tokens, "nothing read", None)
    tokens(model, args.tokens, "cold", lambda: evict(model, args.folder))
    prompts(model, [int(length) for length in args.prompts.split(",")])
    model.close()


if __name__ == "__main__":
    main()
