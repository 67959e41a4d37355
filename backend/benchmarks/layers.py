"""Streamed decoding through layers of the true widths, one runtime after the other.

    python backend/benchmarks/layers.py [--bits 2] [--experts 4] [--tokens 12] [--folder FOLDER]

Four layers of Qwen3.5-397B-A17B (three with linear attention, one with full) with 64 experts each
and a small vocabulary, bfloat16, all matrices but the routers of `--bits`, experts in the page
cache. Times are of complete tokens, with attention, router, reads and everything else: the best one
of each runtime. `mlx, float32` is the runtime of a CPU without a C compiler.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from flash_moe.kernels.runtime import Runtime, choose_runtime
from flash_moe.model import load as loading
from flash_moe.model.load import StreamedModel
from flash_moe.options import Settings
from flash_moe.synth.model import SHAPES, synthesize

LAYERS = 4
SHAPE = replace(SHAPES["397b"], layers=LAYERS, experts=64, vocabulary=2048)


def measure(model: StreamedModel, tokens: int) -> tuple[float, float, float]:
    """Seconds of the quickest token, and of its reads and its waiting for the router."""
    cache, streamer = model.make_cache(), model.streamer
    mx.eval(model(mx.arange(1, 9)[None], cache=cache))
    best = (float("inf"), 0.0, 0.0)
    for token in range(tokens):
        io, back = streamer.reader.counters.seconds, streamer.readback_seconds
        start = time.perf_counter()
        # A few words in turn, which choose other experts as the state moves on.
        mx.eval(model(mx.array([[token % 7 + 1]]), cache=cache))
        seconds = time.perf_counter() - start
        counters = streamer.reader.counters
        best = min(best, (seconds, counters.seconds - io, streamer.readback_seconds - back))
    return best


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="where to make the model, 1 GB at 2 bits")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "layers"
        synthesize(path, SHAPE, bits=options.bits, dtype="bfloat16")
        run(path, options.experts, options.tokens, options.bits)


def always(runtime: Runtime) -> Callable[[str | None], Runtime]:
    return lambda asked: runtime


def run(path: Path, experts: int, tokens: int, bits: int) -> None:
    best = choose_runtime()
    runtimes = {"mlx, as stored": Runtime("mlx", "as asked")}
    if best.widen:
        runtimes["mlx, float32"] = Runtime("mlx", "no compiler", widen=True)
    runtimes[best.name] = best
    print(f"{bits} bits, K={experts}, {best.why}")
    print(f"{'':16} ms a token  a layer   reads  router and before   ratio to the last")
    results: dict[str, tuple[float, float, float]] = {}
    for name, runtime in runtimes.items():
        # The only way to a runtime that this machine would not choose.
        setattr(loading, "choose_runtime", always(runtime))  # noqa: B010
        model = loading.load(path, Settings(experts=experts))
        results[name] = measure(model, tokens)
        model.close()
    last = results[best.name][0]
    for name, (seconds, io, back) in results.items():
        print(
            f"{name:16} {seconds * 1e3:10.1f} {seconds * 1e3 / LAYERS:8.2f} {io * 1e3:7.1f} "
            f"{back * 1e3:18.1f} {seconds / last:18.1f}x"
        )


if __name__ == "__main__":
    main()
