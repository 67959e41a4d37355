"""Our kernels at sizes that have every edge: rows and columns that do not fill a threadgroup or a
step, a tile that is not full, the last record of a bank and none beside it to be touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from flash_moe.kernels import gpu
from flash_moe.kernels import gpu_operations as operations
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.spec import FULL, U32, ExpertSpec, Matrix
from tests.kernels import reference
from tests.kernels.planes import make_planes, split_spec
from tests.kernels.reference import Bounded, Bytes
from tests.kernels.rules import in_float64, sigmoid
from tests.metal.emulator import Ranges

TUNING = gpu.Tuning(rows=5, simdgroups=2)
TOKENS = np.array([0, 1, 0, 1, 2], np.uint32)
SLOTS = np.array([4, 4, 2, 2, 2], np.uint32)  # in tiles of two tokens: full, full, not full
CHOICE = np.uint32(FULL)  # of records in two planes, slot 2 is computed from both
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


@dataclass(frozen=True, slots=True)
class Bank:
    spec: ExpertSpec
    records: list[Bytes]
    four: ExpertSpec  # that full pairs are computed from
    four_records: list[Bytes]

    def of(self, slot: int) -> tuple[Bytes, ExpertSpec]:
        if slot >= FULL:
            return self.four_records[slot - FULL], self.four
        return self.records[slot], self.spec

    def marked(self, slots: U32) -> U32:
        return slots | (slots == 2) * CHOICE if self.spec.two_planes else slots


def gate_up(bits: int = 4, split: bool = False) -> Scene:
    bank, rng = _bank(576, 96, bits, split)
    spec, slots = bank.spec, bank.marked(SLOTS)
    x = reference.rounded(rng.standard_normal((3, 576)), "bfloat16")
    tiles = gpu.make_tiles(TOKENS, slots, 2)

    def launch() -> list[mx.array]:
        rows = mx.array(x.astype(np.float32)).astype(mx.bfloat16)
        return [gpu.gate_up("metal", spec, rows, _words(bank.records), tiles, TUNING)]

    rows = [
        reference.hidden_state(*bank.of(slot), x[token : token + 1])
        for slot, token in zip(slots, TOKENS, strict=True)
    ]
    read = [spec.gate, spec.up]
    return Scene(launch, *_stack(rows), {"bank": _others(spec, slots, read)})


def down(bits: int = 4, split: bool = False) -> Scene:
    bank, rng = _bank(96, 576, bits, split)
    spec, slots = bank.spec, bank.marked(SLOTS)
    h = rng.standard_normal((5, 576)).astype(np.float32)
    tiles = gpu.make_tiles(TOKENS, slots, 2)

    def launch() -> list[mx.array]:
        arguments = (mx.array(h), _words(bank.records), tiles)
        return [gpu.down("metal", spec, *arguments, mx.float32, TUNING)]

    rows = [_product(*bank.of(slot), h[i]) for i, slot in enumerate(slots)]
    return Scene(launch, *_stack(rows), {"bank": _others(spec, slots, [spec.down])})


def down_combine(bits: int = 4, split: bool = False) -> Scene:
    bank, rng = _bank(96, 576, bits, split)
    spec, slots = bank.spec, bank.marked(np.array([4, 0, 2, 2, 4, 0], np.uint32))
    h = rng.standard_normal((6, 576)).astype(np.float32)
    tiles = gpu.make_tiles(np.repeat(np.arange(2, dtype=np.uint32), 3), slots)
    weights = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    shared, added = _shared(rng)

    def launch() -> list[mx.array]:
        arguments = (mx.array(h), _words(bank.records), tiles, mx.array(weights), shared)
        return [gpu.down_combine("metal", spec, *arguments, mx.float32, TUNING)]

    rows = [_product(*bank.of(slot), h[i]) for i, slot in enumerate(slots)]
    return Scene(
        launch,
        *_mixed([(weights[i // 3, i % 3], row) for i, row in enumerate(rows)], added),
        {"bank": _others(spec, slots, [spec.down])},
    )


def combine() -> Scene:
    rng = np.random.default_rng(0)
    d = rng.standard_normal((6, 96)).astype(np.float32)
    place = np.array([3, 5, 0, 1, 4, 2], np.uint32)
    weights = rng.uniform(0.1, 1, (2, 3)).astype(np.float32)
    shared, added = _shared(rng)

    def launch() -> list[mx.array]:
        arguments = (mx.array(d), place, mx.array(weights), shared)
        return [gpu.combine("metal", *arguments, mx.float32)]

    rows = [Bounded(d[place[i]][None].astype(np.float64), np.zeros((1, 96))) for i in range(6)]
    return Scene(
        launch, *_mixed([(weights[i // 3, i % 3], row) for i, row in enumerate(rows)], added)
    )


def router() -> Scene:
    """With ties, which the lowest index must win; some lanes have three experts, some two."""
    logits = np.random.default_rng(0).integers(-2, 3, (3, 70)).astype(np.float32)

    def launch() -> list[mx.array]:
        return list(gpu.router("metal", mx.array(logits), 6, True, 4))

    ids, weights = (full[:, :4] for full in reference.router(logits.astype(np.float64), 6, True))
    return Scene(launch, [ids.astype(np.float64), weights], [np.zeros(ids.shape), weights * 1e-5])


def gated_delta(raw: bool = False) -> Scene:
    """Rows that do not fill a simdgroup, two heads a key; as mlx-lm gives them, or raw."""
    heads, key_heads, tokens, keys, values = 4, 2, 3, 64, 18
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, tokens, key_heads, keys)).astype(np.float32)
    v = rng.standard_normal((tokens, heads, values)).astype(np.float32)
    decay, beta = rng.uniform(0.2, 0.9, (2, tokens, heads)).astype(np.float32)
    state = rng.standard_normal((heads, values, keys)).astype(np.float32)
    log_rate, step = rng.standard_normal((2, heads)).astype(np.float32)

    def launch() -> list[mx.array]:
        arrays = [mx.array(array)[None] for array in (q, k, v, decay, beta, state)]
        if not raw:
            return list(operations.gated_delta("metal", *arrays))
        mixed = mx.concatenate([array.reshape(1, tokens, -1) for array in arrays[:3]], axis=2)
        gates = operations.Gates(mx.array(log_rate), mx.array(step))
        return list(operations.gated_delta_raw("metal", mixed, *arrays[3:5], gates, arrays[5], 2))

    if raw:
        unit = [x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True)) for x in (q, k)]
        shrink = np.exp(-np.exp(log_rate) * np.logaddexp(decay + step, 0))
        answers = in_float64(unit[0] / np.sqrt(keys), unit[1], v, shrink, sigmoid(beta), state)
    else:
        answers = in_float64(q, k, v, decay, beta, state)
    return Scene(launch, [a[None] for a in answers], [1e-5 * np.abs(a).max() for a in answers])


def short_conv() -> Scene:
    """Channels that do not fill a threadgroup; fewer tokens than the past is long."""
    rng = np.random.default_rng(0)
    x, past = (rng.standard_normal((n, 300)).astype(np.float32) for n in (2, 3))
    weight = rng.standard_normal((300, 4)).astype(np.float32)

    def launch() -> list[mx.array]:
        arrays = (mx.array(x)[None], mx.array(past)[None], mx.array(weight)[..., None])
        return list(operations.short_conv("metal", *arrays))

    joined = np.concatenate([past, x]).astype(np.float64)
    sums = sum(joined[i : i + 2] * weight[:, i] for i in range(4))
    answers = [(sums * sigmoid(sums))[None], joined[2:][None]]
    return Scene(launch, answers, [np.full(answers[0].shape, 1e-5), np.zeros(answers[1].shape)])


SCENES: dict[str, Callable[[], Scene]] = {
    "expert_gate_up_swiglu": gate_up,
    "gate and up of planes": lambda: gate_up(2, True),
    "expert_down": down,
    "expert_down_combine": down_combine,
    "combine": combine,
    "router_topk": router,
    "gated_delta": gated_delta,
    "gated_delta, raw": lambda: gated_delta(raw=True),
    "short_conv": short_conv,
}


def _bank(
    hidden: int, intermediate: int, bits: int, split: bool
) -> tuple[Bank, np.random.Generator]:
    """Records without padding: the last byte of the last is the last of the buffer."""
    rng = np.random.default_rng(0)
    if split:
        planes = make_planes(split_spec(hidden, intermediate, 32), RECORDS, rng)
        spec, records, four = planes.spec, planes.bank, (planes.four, planes.four_bank)
    else:
        spec = reference.make_spec(hidden, intermediate, bits, 32)
        records = [reference.random_record(spec, rng) for _ in range(RECORDS)]
        four = (spec, records)
    end = _parts(spec.down, split)[-1][1]
    return Bank(replace(spec, stride=end), [record[:end] for record in records], *four), rng


def _words(bank: list[Bytes]) -> mx.array:
    return mx.array(np.stack(bank).view(np.uint32))


def _parts(matrix: Matrix, full: bool) -> list[tuple[int, int]]:
    codes = matrix.rows * matrix.columns * matrix.bits // 8
    scales = matrix.rows * matrix.columns // matrix.group_size * 2
    sizes, starts = [codes, scales, scales], [matrix.weight, matrix.scales, matrix.biases]
    if full and matrix.second is not None:
        second = matrix.second
        sizes = [codes, codes, scales, scales]
        starts = [matrix.weight, second.weight, second.scales, second.biases]
    return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _others(spec: ExpertSpec, slots: U32, read: list[Matrix]) -> list[tuple[int, int]]:
    """All of the bank but these matrices of these records, in the planes that are needed."""
    others, at = [], 0
    for slot, full in sorted({(slot % FULL, slot >= FULL) for slot in slots.tolist()}):
        for begin, end in sorted(part for matrix in read for part in _parts(matrix, full)):
            others.append((at, slot * spec.stride + begin))
            at = slot * spec.stride + end
    return [(begin, end) for begin, end in [*others, (at, RECORDS * spec.stride)] if begin < end]


def _product(record: Bytes, spec: ExpertSpec, h: npt.NDArray[np.float32]) -> Bounded:
    x = h[None].astype(np.float64)
    return reference.product(record, spec.down, Bounded(x, np.zeros_like(x)))


def _stack(rows: list[Bounded]) -> tuple[list[Answer], list[Answer]]:
    return [np.concatenate([r.value for r in rows])], [np.concatenate([r.error for r in rows])]


def _shared(rng: np.random.Generator) -> tuple[Shared, Answer]:
    output = rng.standard_normal((2, 96)).astype(np.float32)
    gate = rng.standard_normal(2).astype(np.float32)
    shared = Shared(mx.array(output), mx.array(gate))
    return shared, output.astype(np.float64) / (1 + np.exp(-gate[:, None]))


def _mixed(
    parts: list[tuple[np.float32, Bounded]], added: Answer
) -> tuple[list[Answer], list[Answer]]:
    """Three a token, and what is added: each of at most 10 roundings is of less than `size`."""
    values = [np.concatenate([w * p.value for w, p in parts[i : i + 3]]) for i in (0, 3)]
    errors = [np.concatenate([w * p.error for w, p in parts[i : i + 3]]) for i in (0, 3)]
    value = np.stack([v.sum(0) for v in values]) + added
    size = np.stack([np.abs(v).sum(0) for v in values]) + np.abs(added) + 4
    return [value], [np.stack([e.sum(0) for e in errors]) + reference.gamma(10) * size]
