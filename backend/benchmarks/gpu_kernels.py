"""The expert kernels against MLX's own chain of operations, on the GPU of this machine.

    python backend/benchmarks/gpu_kernels.py [--sweep]

True sizes of Qwen3.5-397B-A17B, bfloat16 activations. Layers follow one another, each with weights
of its own, more together than any cache holds, and each needs the one before it. `GPU` is the time
they take behind a long matrix product, which hides what the host does; `all` is with the host, from
Python to the end. The floor is the bytes of the chosen experts over the bandwidth of a copy on the
device, measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice
from typing import cast

import mlx.core as mx
import numpy as np

from flash_moe.format.layout import Quantization, make_layout
from flash_moe.kernels import gpu
from flash_moe.kernels.backends import TILE, tuning_for
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.shaders import GpuKind
from flash_moe.kernels.spec import ExpertSpec, expert_spec

HIDDEN, INTERMEDIATE, GROUP, SLOTS = 4096, 1024, 64, 10
# Layers in a row: enough that a millisecond of noise is 2 µs of one.
STEPS, PREFILL_STEPS = 480, 60
KIND: GpuKind = "metal" if mx.metal.is_available() else "cuda"
SHAPES = {
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
Cut = tuple[gpu.Tuning, gpu.Tuning]  # of gate and up, and of down
Parts = dict[str, tuple[mx.array, mx.array, mx.array]]


@dataclass
class Layer:
    """The same weights twice: stacked for MLX, in records for the kernels."""

    parts: Parts
    bank: mx.array


def make_spec(bits: int) -> ExpertSpec:
    arrays = []
    for name, (rows, columns) in SHAPES.items():
        arrays.append((name, "weight", "uint32", (rows, columns * bits // 32)))
        arrays += [(name, p, "bfloat16", (rows, columns // GROUP)) for p in ("scales", "biases")]
    packing = Quantization(bits, GROUP, "affine")
    layout = make_layout(arrays, [(name, packing) for name in SHAPES])
    assert layout.nbytes == layout.stride  # so records are their parts, one after the other
    return expert_spec(layout, layout.stride)


def make_layer(bits: int) -> Layer:
    parts: Parts = {}
    pieces = []
    for name, (rows, columns) in SHAPES.items():
        words = (SLOTS, rows, columns * bits // 32)
        low = mx.random.randint(0, 1 << 16, words).astype(mx.uint32)
        weight = (mx.random.randint(0, 1 << 16, words).astype(mx.uint32) << 16) | low
        scale = mx.random.uniform(0.5, 1.5, (SLOTS, rows, columns // GROUP))
        scale = (scale / (1 << bits) / columns**0.5 * 3).astype(mx.bfloat16)
        bias = (scale * (-((1 << bits) - 1) / 2)).astype(mx.bfloat16)
        parts[name] = (weight, scale, bias)
        pieces += [mx.contiguous(a).view(mx.uint32).reshape(SLOTS, -1) for a in parts[name]]
    bank = mx.concatenate(pieces, axis=1).reshape(-1)
    mx.eval(parts, bank)
    return Layer(parts, bank)


def mlx_chain(
    layer: Layer, bits: int, x: mx.array, ids: mx.array, weights: mx.array, sort: bool = False
) -> mx.array:
    def project(name: str, v: mx.array) -> mx.array:
        w, s, b = layer.parts[name]
        return mx.gather_qmm(
            v,
            w,
            s,
            b,
            rhs_indices=ids,
            transpose=True,
            group_size=GROUP,
            bits=bits,
            sorted_indices=sort,
        )

    v = x[:, None, None, :]
    gate, up = project("gate_proj", v), project("up_proj", v)
    y = project("down_proj", gate * mx.sigmoid(gate) * up).squeeze(-2)
    return y if sort else (y * weights[..., None]).sum(axis=-2)


def median(seconds: Callable[[], float], repeats: int = 9) -> float:
    """After two for compilers and caches."""
    return statistics.median([seconds() for _ in range(repeats + 2)][2:])


def elapsed(make: Callable[[], mx.array]) -> float:
    mx.synchronize()
    start = time.perf_counter()
    mx.eval(make())
    mx.synchronize()
    return time.perf_counter() - start


class Behind:
    """Times on the GPU alone: graphs are queued behind products that take longer (about 50 ms) than
    queueing does."""

    def __init__(self) -> None:
        self.a = mx.random.normal((16384, 16384)).astype(mx.bfloat16)
        mx.eval(self.a)

    def __call__(self, make: Callable[[], mx.array]) -> float:
        # In turns, so that a changing clock changes both.
        return median(lambda: self._seconds(make()) - self._seconds(None), 9)

    def _seconds(self, built: mx.array | None) -> float:
        mx.synchronize()
        start = time.perf_counter()
        product = self.a
        for _ in range(4):
            product = product @ self.a
        mx.async_eval(product)
        if built is not None:
            mx.eval(built)
        mx.synchronize()
        return time.perf_counter() - start


def copy_bandwidth() -> float:
    big = mx.zeros((256 << 20,), mx.float32)
    mx.eval(big)
    return 2 * big.nbytes / median(lambda: elapsed(lambda: big + 1))


@dataclass
class Result:
    gpu: float
    all: float

    def __str__(self) -> str:
        return f"{self.gpu * 1e6:7.1f} {self.all * 1e6:7.1f}"


def timed(behind: Behind, layers: int, make: Callable[[], mx.array]) -> Result:
    return Result(behind(make) / layers, median(lambda: elapsed(make), 5) / layers)


def decode(
    behind: Behind, layers: list[Layer], bits: int, k: int, cuts: Cut
) -> tuple[Result, Result, float]:
    """Ours, MLX's, and their largest relative difference, for one token through every layer."""
    spec = make_spec(bits)
    rng = np.random.default_rng(k)
    slots = np.stack([rng.permutation(SLOTS)[:k] for _ in layers]).astype(np.uint32)
    ids = [mx.array(s)[None] for s in slots]
    tiles = [gpu.make_tiles(np.zeros(k, np.uint32), s) for s in slots]
    x = mx.random.normal((1, HIDDEN)).astype(mx.bfloat16)
    weights = mx.softmax(mx.random.normal((1, k)))
    mx.eval(x, weights, ids, [t.table for t in tiles])

    def ours(count: int = STEPS) -> mx.array:
        y = x
        for layer, tile in islice(cycle(zip(layers, tiles, strict=True)), count):
            h = gpu.gate_up(KIND, spec, y, layer.bank, tile, cuts[0])
            y = gpu.down_combine(
                KIND, spec, h, layer.bank, tile, weights, Shared(), mx.bfloat16, cuts[1]
            )
        return y

    def theirs(count: int = STEPS) -> mx.array:
        y = x
        for layer, experts in islice(cycle(zip(layers, ids, strict=True)), count):
            y = mlx_chain(layer, bits, y, experts, weights).astype(mx.bfloat16)
        return y

    a, b = ours(1).astype(mx.float32), theirs(1).astype(mx.float32)
    off = mx.abs(a - b).max() / mx.abs(b).max()
    return timed(behind, STEPS, ours), timed(behind, STEPS, theirs), cast(float, off.item())


def prefill(
    behind: Behind, layers: list[Layer], bits: int, each: int, tile: int, cut: Cut
) -> tuple[float, float, float]:
    """GPU seconds a layer for `each` tokens an expert: tiles, pair by pair, MLX's sorted path."""
    spec = make_spec(bits)
    pairs = SLOTS * each
    slots = np.repeat(np.arange(SLOTS, dtype=np.uint32), each)
    tokens = np.arange(pairs, dtype=np.uint32)
    x = mx.random.normal((pairs, HIDDEN)).astype(mx.bfloat16)
    ids = mx.array(slots)[:, None]
    mx.eval(x, ids)

    def ours(shared: int) -> float:
        tiles = gpu.make_tiles(tokens, slots, shared)
        up, down = tuning_for(1) if shared == 1 else cut

        def run() -> mx.array:
            y = x
            for layer in islice(cycle(layers), PREFILL_STEPS):
                h = gpu.gate_up(KIND, spec, y, layer.bank, tiles, up)
                y = gpu.down(KIND, spec, h, layer.bank, tiles, mx.bfloat16, down)
            return y

        return behind(run) / PREFILL_STEPS

    def chain() -> mx.array:
        y = x
        for layer in islice(cycle(layers), PREFILL_STEPS):
            y = mlx_chain(layer, bits, y, ids, x, sort=True).squeeze(-2)
        return y

    return ours(tile), ours(1), behind(chain) / PREFILL_STEPS


def report_decode(behind: Behind, bandwidth: float, bits: int, sweep: bool) -> None:
    # A gigabyte of weights: an H200's L2 holds 50 MB.
    layers = [make_layer(bits) for _ in range(24 if bits == 2 else 14)]
    record = make_spec(bits).stride
    for k in (4, 10):
        cuts = [tuning_for(1)]
        if sweep:
            tried = [gpu.Tuning(r, s, c) for c in (16, 32, 64) for r in (1, 2, 4) for s in (2, 8)]
            cuts = [(cut, replace(cut, columns=min(cut.columns, 32))) for cut in tried]
        for cut in cuts:
            ours, theirs, off = decode(behind, layers, bits, k, cut)
            rate = k * record / ours.gpu
            print(
                f"{bits} bits, K={k:2} {ours} {theirs} {theirs.gpu / ours.gpu:5.2f}x "
                f"{theirs.all / ours.all:5.2f}x {k * record / bandwidth * 1e6:6.1f} "
                f"{rate / 1e9:7,.0f} {rate / bandwidth:7.0%} {off:10.1e} {cut if sweep else ''}",
                flush=True,
            )


def report_prefill(behind: Behind, bits: int, sweep: bool) -> None:
    layers = [make_layer(bits) for _ in range(6)]
    cuts = [(TILE, tuning_for(TILE))]
    if sweep:
        tried = [gpu.Tuning(r, s, 16) for r in (1, 2, 4) for s in (2, 4)]
        cuts = [(tile, (cut, cut)) for tile in (4, 8) for cut in tried]
    for tile, cut in cuts:
        for each in (2, 4, 8, 16, 32) if not sweep else (4, 16):
            times = prefill(behind, layers, bits, each, tile, cut)
            shown = " ".join(f"{seconds * 1e6:9.1f}" for seconds in times)
            print(f"{bits} bits, {each:3} {shown} {(tile, cut) if sweep else ''}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="try other cuts of the kernels")
    sweep = parser.parse_args().sweep
    behind = Behind()
    behind(lambda: behind.a + 1)  # clocks rise with work: a copy first came out a third too slow
    bandwidth = copy_bandwidth()
    print(f"{mx.device_info().get('device_name', KIND)}, MLX {version('mlx')}")
    print(f"copy on the device: {bandwidth / 1e9:,.0f} GB/s (read + write)\n")
    print("One token, µs a layer")
    print("                 ours           MLX           ratio        floor    ours")
    print(
        "                GPU     all     GPU     all   GPU    all            GB/s of copy rel. diff"
    )
    for bits in (2, 4):
        report_decode(behind, bandwidth, bits, sweep)
    print(f"\n{SLOTS} experts, tokens each; GPU µs a layer")
    print("               tiles  one by one  MLX")
    for bits in (2, 4):
        report_prefill(behind, bits, sweep)


if __name__ == "__main__":
    main()
