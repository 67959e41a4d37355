"""Records in two planes, and what a pair of both must equal: a 4-bit record of the same weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flash_moe.kernels.gpu import U32
from flash_moe.kernels.spec import WHOLE, ExpertSpec, Matrix, Rest
from tests.kernels import reference as ref

NAMES = ("gate", "up", "down")


def split_spec(
    hidden: int, intermediate: int, group_size: int, scale_type: str = "bfloat16"
) -> ExpertSpec:
    """The first planes as in a record of 2 bits, and behind them the second ones alike."""
    spec = ref.make_spec(hidden, intermediate, 2, group_size, scale_type)
    matrices = (_with_rest(getattr(spec, name), spec.stride) for name in NAMES)
    return ExpertSpec(*matrices, 2 * spec.stride)


def _with_rest(m: Matrix, behind: int) -> Matrix:
    return replace(m, rest=Rest(m.weight + behind, m.scales + behind, m.biases + behind))


def first_planes(spec: ExpertSpec) -> ExpertSpec:
    """The same records to one who knows of no second plane."""
    return ExpertSpec(*(replace(getattr(spec, n), rest=None) for n in NAMES), spec.stride)


def _second(m: Matrix) -> Matrix:
    assert m.rest is not None
    rest = m.rest
    return replace(m, weight=rest.weight, scales=rest.scales, biases=rest.biases, rest=None)


def split_record(spec: ExpertSpec, rng: np.random.Generator, scales: ref.Scales) -> ref.Bytes:
    """Nothing in one plane follows from the other: a mix-up of them shows."""
    half = spec.stride // 2
    both = (ref.random_record(first_planes(spec), rng, scales) for _ in NAMES[:2])
    return np.concatenate([record[:half] for record in both])


@dataclass(frozen=True, slots=True)
class Planes:
    """A bank in planes, and as records of 4 bits."""

    spec: ExpertSpec
    bank: list[ref.Bytes]
    four: ExpertSpec
    four_bank: list[ref.Bytes]

    def expert(self, slot: int, x: ref.F64) -> ref.Bounded:
        """What a pair of this slot must be, for x [hidden]."""
        if slot >= WHOLE:
            return ref.expert(self.four_bank[slot - WHOLE], self.four, x[None])
        return ref.expert(self.bank[slot], self.spec, x[None])


def make_planes(
    spec: ExpertSpec, count: int, rng: np.random.Generator, scales: ref.Scales = ref.Scales()
) -> Planes:
    m, bank = spec.gate, [split_record(spec, rng, scales) for _ in range(count)]
    four = ref.make_spec(spec.hidden, spec.intermediate, 4, m.group_size, m.scale_type)
    return Planes(spec, bank, four, [_recombine(spec, four, record) for record in bank])


def _recombine(spec: ExpertSpec, four: ExpertSpec, record: ref.Bytes) -> ref.Bytes:
    made = np.zeros(four.stride, np.uint8)
    for name in NAMES:
        m, to = getattr(spec, name), getattr(four, name)
        low = _second(m)
        codes = 4 * ref.read_codes(record, m) + ref.read_codes(record, low)
        ref.place(made, to.weight, ref.pack(codes, 4))
        size = m.rows * (m.columns // m.group_size) * (4 if m.scale_type == "float32" else 2)
        ref.place(made, to.scales, record[low.scales : low.scales + size])
        ref.place(made, to.biases, record[low.biases : low.biases + size])
    return made


def choose(slots: U32, rng: np.random.Generator) -> U32:
    """Some pairs of the first plane, some of both."""
    return slots | (rng.integers(0, 2, slots.shape, np.uint32) * np.uint32(WHOLE))


def plain(slots: U32) -> U32:
    return slots & np.uint32(WHOLE - 1)
