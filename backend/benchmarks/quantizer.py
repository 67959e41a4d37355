"""The quantizer: how fast every path is, how near to the optimum, and what it costs an expert.

    python backend/benchmarks/quantizer.py

Weights are synthetic. Speed is bytes of input ÷ processor seconds of all threads, the best of some
runs; errors are root mean squares relative to the unquantized expert's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.minmax import minmax
from flash_moe.format.layout import AFFINE, Quantization
from flash_moe.machine import inspect_machine
from flash_moe.pack.fit import load_fit
from flash_moe.pack.requantize import Quantize, fit_in_mlx, fit_native, float32_weights
from flash_moe.pack.split_planes import split_planes
from flash_moe.pack.transform import Arrays
from flash_moe.process import peak_memory

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 2048, 512, 4, 256
Source = tuple[Arrays, Quantization | None]


def main() -> None:
    machine = inspect_machine()
    print(f"{machine.cpu}, {machine.cores} CPUs, load {os.getloadavg()[0]:.1f}\n")
    speed()
    optimum()
    for kind in ("Gaussian", "heavy-tailed", "outlier columns"):
        experts(kind)
    for kind in ("Gaussian", "heavy-tailed"):
        mixtures(kind)


# -- speed --------------------------------------------------------------------------------------


def speed() -> None:
    rng = np.random.default_rng(1)
    floats = mx.array(rng.standard_normal((1024, 4096)).astype(np.float32)).astype(mx.bfloat16)
    whole, coded, wide = quantized(floats, None), quantized(floats, 4), quantized(floats, 4, 128)
    weights = rng.random(4096).astype(np.float32)
    data = np.ones(64 << 20, np.float32)
    print(f"memory, read by one thread: {data.nbytes / least(data.sum) / 1e9:.1f} GB/s")
    print("path                                       GB/s a core   ns a group")
    paths: list[tuple[str, Source, int, int, Quantize, Any]] = [
        ("4 bits to 2, the optimum", coded, 2, 64, fit_native, None),
        ("  in groups of 128", wide, 2, 128, fit_native, None),
        ("  weighted", coded, 2, 64, fit_native, weights),
        ("  groups of 64 to 128", coded, 2, 128, fit_native, None),
        ("4 bits to 3", coded, 3, 64, fit_native, None),
        ("bfloat16 to 2", whole, 2, 64, fit_native, None),
        ("bfloat16 to 3", whole, 3, 64, fit_native, None),
        ("bfloat16 to 4", whole, 4, 64, fit_native, None),
        ("4 bits to 2, fit in MLX", coded, 2, 64, fit_in_mlx, None),
        ("bfloat16 to 2, fit in MLX", whole, 2, 64, fit_in_mlx, None),
        ("4 bits to 2, min/max", coded, 2, 64, minmax, None),
    ]
    before = peak_memory()
    for name, (arrays, source), bits, group, quantize, importance in paths:

        def run(q: Quantize = quantize, a: Any = (arrays, source, bits, group, importance)) -> None:
            mx.eval(q(*a))

        nbytes = sum(part.nbytes for part in arrays.values())
        seconds = least(run)
        groups = floats.size // group
        print(f"{name:42} {nbytes / seconds / 1e9:11.3f} {seconds / groups * 1e9:12.0f}")
        if name == "bfloat16 to 4" or (quantize is fit_in_mlx and source):
            print(f"    (up to here, peak memory grew by {(peak_memory() - before) / 1e6:.0f} MB)")
    seconds = least(lambda: mx.eval(mx.quantize(float32_weights(*coded), 64, 2)))
    nbytes = sum(part.nbytes for part in coded[0].values())
    print(f"{'4 bits to 2, mx.quantize':42} {nbytes / seconds / 1e9:11.3f}\n")


def least(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """Processor time of all threads in the best of as many runs as fit, at least two."""
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 2 or time.perf_counter() < end:
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
        runs += 1
    return best


# -- the optimum --------------------------------------------------------------------------------


def optimum() -> None:
    """Values to 2 bits, where the fit is not always the best one: by how much it misses."""
    rng = np.random.default_rng(2)
    print("2 bits of values: root mean square error above the optimum (400 groups)")
    for kind, x in (
        ("Gaussian", rng.standard_normal((400, 64))),
        ("Student's t, 3", rng.standard_t(3, (400, 64))),
    ):
        values = x.astype(np.float32)
        best = optimal(values.astype(np.float64)).mean()
        results = []
        for bins in (16, 24, 32):
            how: dict[str, Any] = {"bits": 2, "group_size": 64, "bins": bins}
            fit = partial(load_fit().values, values, scale_type="float32", **how)
            levels = mx.dequantize(*map(mx.array, fit()), 64, 2)
            error = ((np.array(levels, np.float64) - values) ** 2).mean()
            speed = values.size * 2 / least(fit, 0.3) / 1e9
            results.append(f"{bins} bins {np.sqrt(error / best) - 1:.2%} at {speed:.2f} GB/s")
        print(f"  {kind:16} {', '.join(results)}")
    print()


def optimal(x: np.ndarray) -> np.ndarray:
    """The least mean square error of each group, by all partitions of its sorted values."""
    x = np.sort(x, 1) - x.mean(1, keepdims=True)
    n = x.shape[1]
    tails = np.concatenate([np.cumsum(x[:, ::-1], 1)[:, ::-1], np.zeros((len(x), 1))], 1)
    best = np.zeros(len(x))
    second, third = np.triu_indices(n + 1)
    for first in range(1, n):
        some = second >= first
        cut = np.stack([np.full(some.sum(), first), second[some], third[some]])
        q = (n - cut).sum(0) / n
        den = ((n - cut) * [[1], [3], [5]]).sum(0) / n - q**2
        v = tails[:, cut].sum(1) / n
        best = np.maximum(best, (v**2 / np.where(den > 1e-12, den, np.inf)).max(1))
    return x.var(1) - best


# -- what it costs an expert --------------------------------------------------------------------


def experts(kind: str) -> None:
    rng = np.random.default_rng(3)
    x, seen = activations(rng), activations(rng)
    print(f"{kind:24} bits a weight   weights   output")
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(EXPERTS):
        whole = [weights_like(kind, *shape, rng) for shape in SHAPES]
        right = expert(x, whole)
        inner = hidden(seen, whole)
        squares = [(part**2).mean(0) for part in (seen, seen, inner)]
        for name, (_, make) in METHODS.items():
            coded = [make(w, s.astype(np.float32)) for w, s in zip(whole, squares, strict=True)]
            off = [relative(c, plain(w)) for c, w in zip(coded, whole, strict=True)]
            rows.setdefault(name, []).append((np.mean(off), relative(expert(x, coded), right)))
    for name, errors in rows.items():
        weights, output = np.mean(errors, 0)
        print(f"{name:24} {METHODS[name][0]:13} {weights:9.4f} {output:8.4f}")
    print()


def mixtures(kind: str) -> None:
    """Sums of the ten likeliest of 512 experts, by a softmax of Gaussian logits of two widths."""
    ways = ("2 bits, min/max", "2 bits, fit", "first plane of 4 bits")
    for width in (1.0, 2.0):
        rng = np.random.default_rng(5)
        x = activations(rng)
        odds = np.exp(width * np.sort(rng.standard_normal((TOKENS, 512)), axis=1)[:, :-11:-1])
        weights = odds / odds.sum(1, keepdims=True)
        names = ("own", *ways, "planes, the first two in full", "4 bits, the source")
        sums: dict[str, Any] = dict.fromkeys(names, 0.0)
        for rank in range(10):
            own = [weights_like(kind, *shape, rng) for shape in SHAPES]
            alike = [np.ones(w.shape[1], np.float32) for w in own]
            outputs = {"own": expert(x, own)}
            for name in (*ways, "4 bits, the source"):
                make = METHODS[name][1]
                outputs[name] = expert(x, [make(w, a) for w, a in zip(own, alike, strict=True)])
            best = "4 bits, the source" if rank < 2 else "first plane of 4 bits"
            outputs["planes, the first two in full"] = outputs[best]
            sums = {n: part + weights[:, rank, None] * outputs[n] for n, part in sums.items()}
        print(f"{kind}, ten experts, the first two weigh {weights[:, :2].sum(1).mean():.2f}")
        for name, part in sums.items():
            print(f"  {name:30} {relative(part, sums['own']):.3f}")


SHAPES = ((INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))


def weights_like(kind: str, rows: int, columns: int, rng: np.random.Generator) -> mx.array:
    if kind == "heavy-tailed":
        w = rng.standard_t(5, (rows, columns))
    else:
        w = rng.standard_normal((rows, columns))
    if kind == "outlier columns":
        w *= np.exp(0.25 * rng.standard_normal(columns))
        w[:, rng.choice(columns, columns // 200, replace=False)] *= 4
    return mx.array((w / w.std() / np.sqrt(columns)).astype(np.float32)).astype(mx.bfloat16)


def activations(rng: np.random.Generator) -> np.ndarray:
    """Columns differ in size, as behind a norm with weights, and a few are far larger."""
    sizes = np.random.default_rng(4)
    scale = np.exp(0.4 * sizes.standard_normal(HIDDEN))
    scale[sizes.choice(HIDDEN, HIDDEN // 300, replace=False)] *= 8
    x = rng.standard_normal((TOKENS, HIDDEN)) * scale
    return x / np.sqrt((x**2).mean())


def hidden(x: np.ndarray, matrices: list[Any]) -> np.ndarray:
    gate, up = (x @ plain(matrix).T for matrix in matrices[:2])
    return gate / (1 + np.exp(-gate)) * up


def expert(x: np.ndarray, matrices: list[Any]) -> np.ndarray:
    return hidden(x, matrices) @ plain(matrices[2]).T


def plain(matrix: Any) -> np.ndarray:
    return np.array(matrix.astype(mx.float32)) if isinstance(matrix, mx.array) else matrix


def relative(got: np.ndarray, right: np.ndarray) -> float:
    return float(np.sqrt(((got - right) ** 2).sum() / (right.astype(np.float64) ** 2).sum()))


def quantized(values: mx.array, bits: int | None, group: int = 64) -> Source:
    """As a checkpoint has it."""
    if bits is None:
        return {"weight": values}, None
    parts = mx.quantize(values, group, bits)
    mx.eval(parts)
    return dict(zip(AFFINE, parts, strict=True)), Quantization(bits, group, "affine")


def as_it_is(values: mx.array, squares: np.ndarray) -> np.ndarray:
    return plain(float32_weights(*quantized(values, 4)))


def by_mlx(values: mx.array, squares: np.ndarray) -> np.ndarray:
    four = float32_weights(*quantized(values, 4)).astype(mx.bfloat16)
    return plain(float32_weights(*quantized(four, 2)))


def by(
    quantize: Quantize, source: int | None, bits: int, group: int = 64, weighted: bool = False
) -> Callable[[mx.array, np.ndarray], np.ndarray]:
    def make(values: mx.array, squares: np.ndarray) -> np.ndarray:
        parts = quantize(*quantized(values, source), bits, group, squares if weighted else None)
        arrays = dict(zip(AFFINE, parts, strict=True))
        return plain(float32_weights(arrays, Quantization(bits, group, "affine")))

    return make


def first_plane(values: mx.array, squares: np.ndarray) -> np.ndarray:
    """The source in two planes, read without the second."""
    arrays, how = quantized(values, 4)
    assert how is not None
    planes = split_planes(arrays, how)
    return plain(float32_weights(planes, Quantization(2, how.group_size, "affine")))


METHODS: dict[str, tuple[str, Any]] = {
    "4 bits, the source": ("4.5", as_it_is),
    "4 bits of bf16, fit": ("4.5", by(fit_native, None, 4)),
    "2 bits, min/max": ("2.5", by(minmax, 4, 2)),
    "2 bits, mx.quantize": ("2.5", by_mlx),
    "2 bits, fit": ("2.5", by(fit_native, 4, 2)),
    "2 bits, fit in MLX": ("2.5", by(fit_in_mlx, 4, 2)),
    "first plane of 4 bits": ("2.5", first_plane),
    "2 bits, fit, weighted": ("2.5", by(fit_native, 4, 2, weighted=True)),
    "2 bits of bf16, fit": ("2.5", by(fit_native, None, 2)),
    "2 bits, g128, fit": ("2.25", by(fit_native, 4, 2, 128)),
    "3 bits, g128, min/max": ("3.25", by(minmax, 4, 3, 128)),
    "3 bits, g128, fit": ("3.25", by(fit_native, 4, 3, 128)),
    "3 bits, fit": ("3.5", by(fit_native, 4, 3)),
}


if __name__ == "__main__":
    main()
