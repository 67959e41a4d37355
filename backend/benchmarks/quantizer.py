"""The quantizer: how fast every path is, how near to the optimum, and what it costs an expert.

    python backend/benchmarks/quantizer.py

Weights are synthetic. Speed is bytes of input ÷ processor seconds of all threads, the best of some
runs; errors are root mean squares relative to what the unquantized expert has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.decode.statistics import peak_rss
from flash_moe.format.layout import Quantization
from flash_moe.machine import inspect_machine
from flash_moe.pack import fit as fit_module
from flash_moe.pack.fit import load_fit
from flash_moe.pack.requantize import requantize
from flash_moe.pack.split_planes import two_planes

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 2048, 512, 4, 256
Arrays = dict[str, mx.array]
Given = tuple[Arrays, Quantization | None]


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
    whole, coded, wide = given(floats, None), given(floats, 4), given(floats, 4, 128)
    weights = rng.random(4096).astype(np.float32)
    data = np.ones(64 << 20, np.float32)
    print(f"memory, read by one thread: {data.nbytes / least(data.sum) / 1e9:.1f} GB/s")
    print("path                                       GB/s a core   ns a group")
    paths: list[tuple[str, Given, int, int, str, Any]] = [
        ("4 bits to 2, the optimum", coded, 2, 64, "fit", None),
        ("  in groups of 128", wide, 2, 128, "fit", None),
        ("  weighted", coded, 2, 64, "fit", weights),
        ("  groups of 64 to 128", coded, 2, 128, "fit", None),
        ("4 bits to 3", coded, 3, 64, "fit", None),
        ("bfloat16 to 2", whole, 2, 64, "fit", None),
        ("bfloat16 to 3", whole, 3, 64, "fit", None),
        ("bfloat16 to 4", whole, 4, 64, "fit", None),
        ("4 bits to 2, fit in MLX", coded, 2, 64, "fit in MLX", None),
        ("bfloat16 to 2, fit in MLX", whole, 2, 64, "fit in MLX", None),
        ("4 bits to 2, minmax", coded, 2, 64, "minmax", None),
    ]
    before = peak_rss()
    for name, (arrays, source), bits, group, method, importance in paths:

        def run(a: Any = (arrays, source, bits, group, method, importance)) -> None:
            mx.eval(requantize(*a))

        nbytes = sum(part.nbytes for part in arrays.values())
        seconds = least(run)
        groups = floats.size // group
        print(f"{name:42} {nbytes / seconds / 1e9:11.3f} {seconds / groups * 1e9:12.0f}")
        if name == "bfloat16 to 4" or (method == "fit in MLX" and source):
            print(f"    (up to here, peak memory grew by {(peak_rss() - before) / 1e6:.0f} MB)")
    seconds = least(lambda: mx.eval(mx.quantize(dequantized(coded), 64, 2)))
    nbytes = sum(part.nbytes for part in coded[0].values())
    print(f"{'4 bits to 2, mx.quantize':42} {nbytes / seconds / 1e9:11.3f}\n")


def least(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """Processor time of all threads: of the best run of as many as fit, at least two."""
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
        found = []
        for bins in (16, 24, 32):
            fit_module.VALUE_BINS[2] = bins
            made = load_fit().values(values, bits=2, group_size=64, scale_type="float32")
            levels = mx.dequantize(*map(mx.array, made), 64, 2)
            error = ((np.array(levels, np.float64) - values) ** 2).mean()
            seconds = least(
                lambda v=values: load_fit().values(v, bits=2, group_size=64, scale_type="float32"),
                0.3,
            )
            speed = values.size * 2 / seconds / 1e9
            found.append(f"{bins} bins {np.sqrt(error / best) - 1:.2%} at {speed:.2f} GB/s")
        fit_module.VALUE_BINS[2] = 24
        print(f"  {kind:16} {', '.join(found)}")
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
            made = [make(w, s.astype(np.float32)) for w, s in zip(whole, squares, strict=True)]
            off = [relative(m, plain(w)) for m, w in zip(made, whole, strict=True)]
            rows.setdefault(name, []).append((np.mean(off), relative(expert(x, made), right)))
    for name, found in rows.items():
        weights, output = np.mean(found, 0)
        print(f"{name:24} {METHODS[name][0]:13} {weights:9.4f} {output:8.4f}")
    print()


def mixtures(kind: str) -> None:
    """Sums of the ten best of 512 experts, by a softmax of Gaussian logits of two widths."""
    ways = ("2 bits, minmax", "2 bits, fit", "first plane of 4 bits")
    for width in (1.0, 2.0):
        rng = np.random.default_rng(5)
        x = activations(rng)
        odds = np.exp(width * np.sort(rng.standard_normal((TOKENS, 512)), axis=1)[:, :-11:-1])
        weights = odds / odds.sum(1, keepdims=True)
        names = ("own", *ways, "planes, the first two whole", "4 bits, the source")
        sums: dict[str, Any] = dict.fromkeys(names, 0.0)
        for rank in range(10):
            own = [weights_like(kind, *shape, rng) for shape in SHAPES]
            alike = [np.ones(w.shape[1], np.float32) for w in own]
            made = {"own": expert(x, own)}
            for name in (*ways, "4 bits, the source"):
                make = METHODS[name][1]
                made[name] = expert(x, [make(w, a) for w, a in zip(own, alike, strict=True)])
            best = "4 bits, the source" if rank < 2 else "first plane of 4 bits"
            made["planes, the first two whole"] = made[best]
            sums = {n: part + weights[:, rank, None] * made[n] for n, part in sums.items()}
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


def given(values: mx.array, bits: int | None, group: int = 64) -> Given:
    if bits is None:
        return {"weight": values}, None
    made = mx.quantize(values, group, bits)
    mx.eval(made)
    return dict(zip(("weight", "scales", "biases"), made, strict=True)), Quantization(
        bits, group, "affine"
    )


def dequantized(source: Given) -> mx.array:
    arrays, how = source
    assert how is not None
    parts = [arrays[name].astype(mx.float32) for name in ("scales", "biases")]
    return mx.dequantize(arrays["weight"], *parts, how.group_size, how.bits)


def by(
    method: str, source: int | None, bits: int, group: int = 64, weighted: bool = False
) -> Callable[[mx.array, np.ndarray], np.ndarray]:
    def make(values: mx.array, squares: np.ndarray) -> np.ndarray:
        start = given(values, source)
        if method == "as it is":
            return np.array(dequantized(start))
        if method == "mx.quantize":
            return np.array(dequantized(given(dequantized(start).astype(mx.bfloat16), bits, group)))
        made = requantize(*start, bits, group, method, squares if weighted else None)
        how = Quantization(bits, group, "affine")
        return np.array(
            dequantized((dict(zip(("weight", "scales", "biases"), made, strict=True)), how))
        )

    return make


def first_plane(values: mx.array, squares: np.ndarray) -> np.ndarray:
    """Of the source in two planes, read without the second."""
    arrays, how = given(values, 4)
    assert how is not None
    made = two_planes(arrays, how)
    return np.array(dequantized((made, Quantization(2, how.group_size, "affine"))))


METHODS: dict[str, tuple[str, Any]] = {
    "4 bits, the source": ("4.5", by("as it is", 4, 4)),
    "4 bits of bf16, fit": ("4.5", by("fit", None, 4)),
    "2 bits, minmax": ("2.5", by("minmax", 4, 2)),
    "2 bits, mx.quantize": ("2.5", by("mx.quantize", 4, 2)),
    "2 bits, fit": ("2.5", by("fit", 4, 2)),
    "2 bits, fit in MLX": ("2.5", by("fit in MLX", 4, 2)),
    "first plane of 4 bits": ("2.5", first_plane),
    "2 bits, fit, weighted": ("2.5", by("fit", 4, 2, weighted=True)),
    "2 bits of bf16, fit": ("2.5", by("fit", None, 2)),
    "2 bits, g128, fit": ("2.25", by("fit", 4, 2, 128)),
    "3 bits, g128, minmax": ("3.25", by("minmax", 4, 3, 128)),
    "3 bits, g128, fit": ("3.25", by("fit", 4, 3, 128)),
    "3 bits, fit": ("3.5", by("fit", 4, 3)),
}


if __name__ == "__main__":
    main()
