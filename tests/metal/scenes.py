"""Our kernels at sizes that have every edge: rows and columns that do not fill a threadgroup or a
step, a tile that is not full, the last record of a bank and none beside it to be touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.kernels import gpu
from flash_moe.kernels.spec import ExpertSpec, Matrix
from tests.kernels import reference
from tests.kernels.reference import Bounded, Bytes
from tests.metal.emulator import Ranges

TUNING = gpu.Tuning(rows=5, simdgroups=2)
TOKENS = np.array([0, 1, 0, 1, 2], np.uint32)
SLOTS = np.array([4, 4, 2, 2, 2], np.uint32)  # in tiles of two tokens: full, full, not full
RECORDS = 5
Answer = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scene:
    launch: Callable[[], list[mx.array]]
    value: list[Answer]
    error: list[Answer]
    forbidden: Ranges = field(default_factory=dict)

    def right(self, outputs: list[mx.array]) -> bool:
        got = [np.array(y, np.float64) for y in outputs]
        return all(
            bool((np.abs(y - value) <= error).all())  # not where y is NaN
            for y, value, error in zip(got, self.value, self.error, strict=True)
        )


def gate_up(bits: int = 4) -> Scene:
    spec, bank, rng = _bank(reference.make_spec(576, 96, bits, 32))
    x = reference.rounded(rng.standard_normal((3, 576)), "bfloat16")
    tiles = gpu.make_tiles(TOKENS, SLOTS, 2)

    def launch() -> list[mx.array]:
        given = mx.array(x.astype(np.float32)).astype(mx.bfloat16)
        return [gpu.gate_up("metal", spec, given, _words(bank), tiles, TUNING)]

    rows = [
        reference.hidden_state(bank[slot], spec, x[token : token + 1])
        for slot, token in zip(SLOTS, TOKENS, strict=True)
    ]
    read = [spec.gate, spec.up]
    return Scene(launch, *_stack(rows), {"bank": _others(spec, {2, 4}, read)})


def down(bits: int = 4) -> Scene:
    spec, bank, rng = _bank(reference.make_spec(96, 576, bits, 32))
    h = rng.standard_normal((5, 576)).astype(np.float32)
    tiles = gpu.make_tiles(TOKENS, SLOTS, 2)

    def launch() -> list[mx.array]:
        given = (mx.array(h), _words(bank), tiles)
        return [gpu.down("metal", spec, *given, mx.float32, TUNING)]

    rows = [_product(bank[slot], spec.down, h[i]) for i, slot in enumerate(SLOTS)]
    return Scene(launch, *_stack(rows), {"bank": _others(spec, {2, 4}, [spec.down])})


def down_combine(bits: int = 4) -> Scene:
    spec, bank, rng = _bank(reference.make_spec(96, 576, bits, 32))
    h = rng.standard_normal((6, 576)).astype(np.float32)
    slots = np.array([4, 0, 2, 2, 4, 0], np.uint32)
    tiles = gpu.make_tiles(np.repeat(np.arange(2, dtype=np.uint32), 3), slots)
    weights = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    extras, added = _extras(rng)

    def launch() -> list[mx.array]:
        given = (mx.array(h), _words(bank), tiles, mx.array(weights), extras)
        return [gpu.down_combine("metal", spec, *given, mx.float32, TUNING)]

    rows = [_product(bank[slot], spec.down, h[i]) for i, slot in enumerate(slots)]
    return Scene(
        launch,
        *_mixed([(weights[i // 3, i % 3], row) for i, row in enumerate(rows)], added),
        {"bank": _others(spec, {0, 2, 4}, [spec.down])},
    )


def combine() -> Scene:
    rng = np.random.default_rng(0)
    d = rng.standard_normal((6, 96)).astype(np.float32)
    place = np.array([3, 5, 0, 1, 4, 2], np.uint32)
    weights = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    extras, added = _extras(rng)

    def launch() -> list[mx.array]:
        given = (mx.array(d), place, mx.array(weights), extras)
        return [gpu.combine("metal", *given, mx.float32)]

    rows = [Bounded(d[place[i]][None].astype(np.float64), np.zeros((1, 96))) for i in range(6)]
    return Scene(
        launch, *_mixed([(weights[i // 3, i % 3], row) for i, row in enumerate(rows)], added)
    )


def router() -> Scene:
    """With ties, which the lowest index must win; some lanes have three experts, some two."""
    logits = np.random.default_rng(0).integers(-2, 3, (3, 70)).astype(np.float32)

    def launch() -> list[mx.array]:
        return list(gpu.router("metal", mx.array(logits), 6, True))

    ids, weights = reference.router(logits.astype(np.float64), 6, True)
    return Scene(launch, [ids.astype(np.float64), weights], [np.zeros(ids.shape), weights * 1e-5])


SCENES: dict[str, Callable[[], Scene]] = {
    "expert_gate_up_swiglu": gate_up,
    "expert_down": down,
    "expert_down_combine": down_combine,
    "combine": combine,
    "router_topk": router,
}


def _bank(spec: ExpertSpec) -> tuple[ExpertSpec, list[Bytes], np.random.Generator]:
    """Records without padding: the last byte of the last is the last of the buffer."""
    spec = replace(spec, stride=_parts(spec.down)[-1][1])
    rng = np.random.default_rng(0)
    return spec, [reference.random_record(spec, rng) for _ in range(RECORDS)], rng


def _words(bank: list[Bytes]) -> mx.array:
    return mx.array(np.stack(bank).view(np.uint32))


def _parts(matrix: Matrix) -> list[tuple[int, int]]:
    scales = matrix.rows * matrix.columns // matrix.group_size * 2
    sizes = (matrix.rows * matrix.columns * matrix.bits // 8, scales, scales)
    starts = (matrix.weight, matrix.scales, matrix.biases)
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _others(spec: ExpertSpec, slots: set[int], read: list[Matrix]) -> list[tuple[int, int]]:
    """All of the bank but these matrices of these records."""
    found, at = [], 0
    for slot in sorted(slots):
        for begin, end in sorted(part for matrix in read for part in _parts(matrix)):
            found.append((at, slot * spec.stride + begin))
            at = slot * spec.stride + end
    return [(begin, end) for begin, end in [*found, (at, RECORDS * spec.stride)] if begin < end]


def _product(record: Bytes, matrix: Matrix, h: npt.NDArray[np.float32]) -> Bounded:
    x = h[None].astype(np.float64)
    return reference.product(record, matrix, Bounded(x, np.zeros_like(x)))


def _stack(rows: list[Bounded]) -> tuple[list[Answer], list[Answer]]:
    return [np.concatenate([r.value for r in rows])], [np.concatenate([r.error for r in rows])]


def _extras(rng: np.random.Generator) -> tuple[gpu.Extras, Answer]:
    shared, residual = rng.standard_normal((2, 2, 96)).astype(np.float32)
    gate = rng.standard_normal(2).astype(np.float32)
    extras = gpu.Extras(mx.array(shared), mx.array(gate), mx.array(residual))
    return extras, residual + shared.astype(np.float64) / (1 + np.exp(-gate[:, None]))


def _mixed(
    parts: list[tuple[np.float32, Bounded]], added: Answer
) -> tuple[list[Answer], list[Answer]]:
    """Three a token, and what is added: each of at most 10 roundings is of less than `size`."""
    values = [np.concatenate([w * p.value for w, p in parts[i : i + 3]]) for i in (0, 3)]
    errors = [np.concatenate([w * p.error for w, p in parts[i : i + 3]]) for i in (0, 3)]
    value = np.stack([v.sum(0) for v in values]) + added
    size = np.stack([np.abs(v).sum(0) for v in values]) + np.abs(added) + 4
    return [value], [np.stack([e.sum(0) for e in errors]) + reference.gamma(10) * size]
