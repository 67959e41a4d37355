"""How fast experts come off a disk, as ratios to that disk's own sequential speed, in one run.

    python backend/benchmarks/reading.py FOLDER    # a pack, or a checkpoint used in place

Floor: bytes of a read ÷ bandwidth. Every round reads the same random experts, K at a time as
decoding does: direct (past the page cache) where the folder's form allows it, and hot (from it).
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from pathlib import Path

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import OptionError
from flash_moe.stream.bank import Bank
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import ExpertStore
from flash_moe.stream.streamed import Streamer

K, ROUNDS, SEED = 4, 24, 1


def main() -> None:
    skeleton = open_skeleton(open_folder(Path(sys.argv[1])))
    layers = skeleton.layers()
    record = layers[0].layout.nbytes
    print(f"{skeleton.folder.form}: {record / 1e6:.2f} MB an expert, {K} at a time")
    biggest = max((run.file for layer in layers for run in layer.runs), key=os.path.getsize)
    disk = sequential(biggest, os.O_DIRECT)
    print(f"sequential, direct: {disk:.2f} GB/s (the floor for cold reads)")
    bank = Bank(2 * K, layers[0].layout.stride)
    for mode in ("direct", "buffered"):
        for threads, chunk in ((1, 1 << 20), (4, 1 << 24), (8, 1 << 20), (16, 1 << 20)):
            store = ExpertStore(layers, mode)
            reader = Reader(threads, chunk)
            streamer = Streamer(store, reader, bank)
            try:
                if mode == "buffered":
                    read(streamer)  # into the page cache
                seconds = read(streamer)
            except OptionError as error:
                print(f"{mode}: {error}")
                break
            finally:
                reader.close()
                store.close()
            speed = ROUNDS * K * record / seconds / 1e9
            print(
                f"{mode:8} {threads:2} threads, {chunk >> 20:2} MiB pieces: {speed:5.2f} GB/s, "
                f"{speed / disk:4.2f} of the disk, {seconds / ROUNDS * 1e3:6.2f} ms for {K}"
            )


def read(streamer: Streamer) -> float:
    choose = random.Random(SEED)
    layers = streamer.store.layers
    start = time.perf_counter()
    for turn in range(ROUNDS):
        layer = turn % len(layers)
        streamer.load(layer, choose.sample(range(layers[layer].experts), K))
    return time.perf_counter() - start


def sequential(file: Path, flags: int) -> float:
    """GB/s of 16 MiB reads, one after the other, of at most 1 GB."""
    block = mmap.mmap(-1, 16 << 20)  # page-aligned, as O_DIRECT wants it
    fd = os.open(file, os.O_RDONLY | flags)
    try:
        total, count, start = 0, len(block), time.perf_counter()
        while total < 1 << 30 and count == len(block):
            count = os.preadv(fd, [block], total)
            total += count
        return total / (time.perf_counter() - start) / 1e9
    finally:
        os.close(fd)


if __name__ == "__main__":
    main()
