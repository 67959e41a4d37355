"""How a token's time and the memory grow with layers, experts, K, context and prompt.

    python backend/benchmarks/growth.py FOLDER growth.svg

One number at a time is changed, from 8 layers of 64 experts (hidden 1,024, inner 512, 4 bits), 8 a
token, after 128 tokens. Everything is in the page cache. A setting is a process of its own, which
makes its model in FOLDER and removes it.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from chart import Chart, colours

from flash_moe.model.load import load
from flash_moe.synth.model import Shape, synthesize

BASE = {"layers": 8, "experts": 64, "k": 8, "context": 128}
SERIES = {
    "layers": (4, 8, 16, 32, 60),
    "experts": (16, 64, 256, 512),
    "k": (2, 4, 8, 16, 32),
    "context": (128, 512, 2048, 8192),
}
CHUNK, TOKENS = 512, 24


def measure(folder: Path, setting: dict[str, int]) -> dict[str, float]:
    """Of one setting: milliseconds and megabytes a token; tokens a second of its context."""
    shape = Shape(
        layers=setting["layers"],
        experts=setting["experts"],
        experts_per_token=setting["k"],
        hidden=1024,
        intermediate=512,
        heads=16,
        linear_heads=16,
        linear_key_heads=8,
    )
    synthesize(folder, shape, dtype="bfloat16")
    try:
        model = load(folder)
        dice = random.Random(0)
        words = [dice.randrange(2048) for _ in range(setting["context"])]
        # Everything that is used later is read, and its pages are mapped.
        model.advance(mx.array([words[:128]]), model.make_cache())
        cache, start = model.make_cache(), time.perf_counter()
        for at in range(0, len(words), CHUNK):
            model.advance(mx.array([words[at : at + CHUNK]]), cache)
        prompt = time.perf_counter() - start
        seconds, before = [], model.streamer.reader.counters.nbytes
        for _ in range(2 * TOKENS):
            start = time.perf_counter()
            mx.eval(model(mx.array([[dice.randrange(2048)]]), cache=cache))
            seconds.append(time.perf_counter() - start)
        nbytes = model.streamer.reader.counters.nbytes - before
        model.close()
    finally:
        shutil.rmtree(folder)
    return {
        "ms": 1e3 * statistics.median(seconds[TOKENS:]),
        "mb": nbytes / (2 * TOKENS) / 1e6,
        "prompt": len(words) / prompt,
        "memory": private_memory() / 1e6,
    }


def private_memory() -> int:
    """Of this process, without pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    folder, picture = Path(sys.argv[1]), Path(sys.argv[2])
    title = "A token's time over what grows, both as shares of the most"
    chart = Chart(title, (0, 1), (0, 1))
    shares = {n / 4: f"{25 * n} %" for n in range(5)}
    chart.ticks(shares, shares)
    print("| | | ms a token | MB of experts | ms ÷ MB | prompt, tokens/s | private MB |")
    print(f"|---|{'--:|' * 6}")
    for (what, values), colour in zip(SERIES.items(), colours(len(SERIES)), strict=True):
        rows: list[tuple[int, dict[str, Any]]] = []
        for value in values:
            setting = json.dumps({**BASE, what: value})
            command = [sys.executable, __file__, "--one", str(folder / "model"), setting]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            row = json.loads(done.stdout)
            rows.append((value, row))
            figures = (row["ms"], row["mb"], row["ms"] / row["mb"], row["prompt"], row["memory"])
            print(f"| {what} | {value} | {' | '.join(f'{n:.3g}' for n in figures)} |", flush=True)
        last, longest = rows[-1][0], rows[-1][1]["ms"]
        points = [(value / last, row["ms"] / longest) for value, row in rows]
        chart.line(points, f"{what}, to {last:,}: {longest:.1f} ms", colour)
    chart.write(picture)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(Path(sys.argv[2]), json.loads(sys.argv[3]))))
    else:
        main()
