"""The native CPU kernels against MLX's own and against memory, as ratios in one run.

    python backend/benchmarks/native.py

Group size 64, bfloat16 scales (MLX in float32 has them in float32 too, which is its faster case).
"hot" is one matrix again and again, "cold" a walk through more matrices than any cache holds, which
is what streamed experts are. Every figure is the least of several repetitions.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.kernels.native import Native, load_native
from flash_moe.kernels.spec import ExpertSpec, Matrix
from flash_moe.kernels.structs import Resident, resident

HIDDEN, INTERMEDIATE, GROUP, COLD_BYTES = 4096, 1024, 64, 256 << 20
rng = np.random.default_rng(1)


def main() -> None:
    native = load_native()
    print(f"{processor()}, {os.cpu_count()} CPUs, {native.simd}, load {os.getloadavg()[0]:.1f}")
    bandwidth = measure_bandwidth()
    print(f"memory, one thread: {bandwidth / 1e9:.1f} GB/s (numpy's sum of 256 MiB)\n")
    matrices(native, bandwidth)
    layers(native, bandwidth)
    prefill(native)
    router(native)


def least(run: Callable[[], Any], seconds: float = 0.7) -> float:
    """The best time of as many runs as fit, at least three."""
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def measure_bandwidth() -> float:
    data = np.ones(COLD_BYTES // 4, np.float32)
    return data.nbytes / least(data.sum)


def matrices(native: Native, bandwidth: float) -> None:
    native.threads = 1
    print("one matrix, one vector, one thread (ms)")
    print("rows x columns bits   hot  cold floor cold/floor  MLX f32 ratio  MLX bf16 ratio")
    for rows, columns in ((INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)):
        for bits in (2, 3, 4, 8):
            count = COLD_BYTES // (rows * columns * bits // 8)
            many = [random_resident(rows, columns, bits) for _ in range(count)]
            x = rng.normal(size=(1, columns)).astype(np.float32)

            def walk(many: list[Resident] = many, x: Any = x) -> None:
                for matrix in many:
                    native.matmul(matrix, x)

            hot = least(lambda many=many, x=x: native.matmul(many[0], x))  # type: ignore[misc]
            cold = least(walk) / count
            floor = sum(part.nbytes for part in many[0].arrays) / bandwidth
            single, half = (mlx_matmul(many[0], x, bits, t) for t in (mx.float32, mx.bfloat16))
            print(
                f"{rows:4} x {columns:4} {bits:7} {hot * 1e3:6.3f} {cold * 1e3:5.3f} "
                f"{floor * 1e3:5.3f} {cold / floor:9.1f} {single * 1e3:10.2f} {single / hot:4.0f}x "
                f"{half * 1e3:9.1f} {half / hot:4.0f}x"
            )


def random_resident(rows: int, columns: int, bits: int) -> Resident:
    weight = rng.integers(0, 2**32, (rows, columns * bits // 32), np.uint32)
    # bfloat16 from 2^-8 to 2^-6
    scales, biases = (
        rng.integers(0x3B80, 0x3C80, (rows, columns // GROUP), np.uint16) for _ in "sb"
    )
    return resident(weight, scales, biases, bits=bits, group_size=GROUP)


def mlx_matmul(matrix: Resident, x: Any, bits: int, dtype: mx.Dtype) -> float:
    weight, scales, biases = (mx.array(part) for part in matrix.arrays)
    scales, biases = (part.view(mx.bfloat16).astype(dtype) for part in (scales, biases))
    vector = mx.array(x).astype(dtype)
    mx.eval(weight, scales, biases, vector)

    def run() -> None:
        mx.eval(mx.quantized_matmul(vector, weight, scales, biases, True, GROUP, bits))

    return least(run)


def make_spec(bits: int) -> ExpertSpec:
    """A record as a pack has it: nine parts one after the other."""
    parts, offset = [], 0
    for rows, columns in [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]:
        weight, scales = rows * columns * bits // 8, rows * columns // GROUP * 2
        places = (offset, offset + weight, offset + weight + scales)
        parts.append(Matrix(rows, columns, bits, GROUP, "bfloat16", *places))
        offset += weight + 2 * scales
    return ExpertSpec(*parts, stride=offset)


def make_bank(spec: ExpertSpec, count: int) -> memoryview:
    bank = rng.integers(0, 256, (count, spec.stride), np.uint8)
    for m in (spec.gate, spec.up, spec.down):
        size = m.rows * m.columns // GROUP * 2
        for offset in (m.scales, m.biases):
            scales = rng.integers(0x3B80, 0x3C80, (count, size // 2), np.uint16)
            bank[:, offset : offset + size] = scales.view(np.uint8)
    return memoryview(bank.reshape(-1))


def layers(native: Native, bandwidth: float) -> None:
    print(f"\nlayer of {HIDDEN} x {INTERMEDIATE}, one token, experts from memory (ms)")
    print("bits  K threads    ms  a token of 60 layers  of one thread's bandwidth")
    for bits in (2, 4):
        spec = make_spec(bits)
        count = COLD_BYTES // spec.stride
        bank = make_bank(spec, count)
        x = rng.normal(size=(1, HIDDEN)).astype(np.float32)
        for k in (4, 10):
            weights = np.full((1, k), 1 / k, np.float32)
            turns = [
                (np.arange(k, dtype=np.uint32) + i * k)[None] % np.uint32(count)
                for i in range(count // k)
            ]
            for threads in (1, 2):
                native.threads = threads

                def walk(turns: Any = turns, weights: Any = weights) -> None:
                    for slots in turns:
                        native.experts(spec, bank, x, slots, weights)  # noqa: B023

                seconds = least(walk) / len(turns)
                share = k * spec.stride / seconds / bandwidth
                print(
                    f"{bits:4} {k:2} {threads:7} {seconds * 1e3:5.2f} "
                    f"{seconds * 60 * 1e3:15.0f} ms {share:18.0%}"
                )


def prefill(native: Native) -> None:
    """The more tokens an expert has, the less its codes cost a token."""
    print("\n2 bits, 8 experts, K=1: tokens of a chunk, all threads and one (ms a token)")
    spec = make_spec(2)
    bank = make_bank(spec, 8)
    for threads in sorted({1, os.cpu_count() or 1}):
        native.threads = threads
        first = 0.0
        for tokens in (1, 8, 16, 32, 64, 512):
            x = rng.normal(size=(tokens, HIDDEN)).astype(np.float32)
            slots = (np.arange(tokens, dtype=np.uint32) % np.uint32(8))[:, None]
            weights = np.ones((tokens, 1), np.float32)

            def run(x: Any = x, slots: Any = slots, weights: Any = weights) -> None:
                native.experts(spec, bank, x, slots, weights)

            each = least(run) / tokens
            first = first or each
            flops = 6 * HIDDEN * INTERMEDIATE / each / 1e9
            print(
                f"{threads} threads {tokens:4} tokens {each * 1e3:6.3f}, "
                f"{first / each:4.1f}x decoding, {flops:5.0f} GFLOP/s"
            )


def router(native: Native) -> None:
    logits = rng.normal(size=(1, 512)).astype(np.float32)
    once = least(lambda: native.router(logits, 10, True))
    spec = make_spec(2)
    square = Matrix(32, 32, 2, 32, "bfloat16", 0, 256, 320)
    tiny = ExpertSpec(square, square, square, spec.stride)
    bank = make_bank(spec, 1)
    native.threads = 1
    x, slots = np.ones((1, 32), np.float32), np.zeros((1, 1), np.uint32)
    weights = np.ones((1, 1), np.float32)
    call = least(lambda: native.experts(tiny, bank, x, slots, weights))
    print(
        f"\nrouter, 10 of 512: {once * 1e6:.1f} us; a call with nothing to do: {call * 1e6:.1f} us"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return f"{sys.platform} {platform.machine()}"


if __name__ == "__main__":
    main()
