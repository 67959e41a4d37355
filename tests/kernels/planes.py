"""Records in two planes, and the 4-bit records of the same weights that full pairs must equal."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flash_moe.kernels.spec import FULL, U32, ExpertSpec, Matrix, SecondPlane
from tests.kernels import reference as ref

NAMES = ("gate", "up", "down")


def split_spec(
    hidden: int, intermediate: int, group_size: int, scale_type: str = "bfloat16"
) -> ExpertSpec:
    """First planes laid out like a 2-bit record, and second ones behind them, laid out alike."""
    spec = ref.make_spec(hidden, intermediate, 2, group_size, scale_type)
    gate, up, down = (_with_second(getattr(spec, name), spec.stride) for name in NAMES)
    return ExpertSpec(gate, up, down, 2 * spec.stride)


def _with_second(m: Matrix, behind: int) -> Matrix:
    return replace(m, second=SecondPlane(m.weight + behind, m.scales + behind, m.biases + behind))


def first_planes(spec: ExpertSpec) -> ExpertSpec:
    """The same records, read as if there were no second plane."""
    gate, up, down = (replace(getattr(spec, name), second=None) for name in NAMES)
    return ExpertSpec(gate, up, down, spec.stride)


def _low_bits(m: Matrix) -> Matrix:
    assert m.second is not None
    low = m.second
    return replace(m, weight=low.weight, scales=low.scales, biases=low.biases, second=None)


def split_record(spec: ExpertSpec, rng: np.random.Generator, scales: ref.Scales) -> ref.Bytes:
    """The planes are independent of each other, so that mixing them up shows."""
    half = spec.stride // 2
    both = (ref.random_record(first_planes(spec), rng, scales) for _ in NAMES[:2])
    return np.concatenate([record[:half] for record in both])


@dataclass(frozen=True, slots=True)
class Planes:
    """A bank in two planes, and the same weights as 4-bit records."""

    spec: ExpertSpec
    bank: list[ref.Bytes]
    four: ExpertSpec
    four_bank: list[ref.Bytes]

    def expert(self, slot: int, x: ref.F64) -> ref.Bounded:
        """The expected output of a pair with this slot, for x [hidden]."""
        if slot >= FULL:
            return ref.expert(self.four_bank[slot - FULL], self.four, x[None])
        return ref.expert(self.bank[slot], self.spec, x[None])


def make_planes(
    spec: ExpertSpec, count: int, rng: np.random.Generator, scales: ref.Scales = ref.ORDINARY
) -> Planes:
    m, bank = spec.gate, [split_record(spec, rng, scales) for _ in range(count)]
    four = ref.make_spec(spec.hidden, spec.intermediate, 4, m.group_size, m.scale_type)
    return Planes(spec, bank, four, [_recombine(spec, four, record) for record in bank])


def _recombine(spec: ExpertSpec, four: ExpertSpec, record: ref.Bytes) -> ref.Bytes:
    record_4 = np.zeros(four.stride, np.uint8)
    for name in NAMES:
        m, to = getattr(spec, name), getattr(four, name)
        low = _low_bits(m)
        codes = 4 * ref.read_codes(record, m) + ref.read_codes(record, low)
        ref.place(record_4, to.weight, ref.pack(codes, 4))
        size = m.rows * (m.columns // m.group_size) * (4 if m.scale_type == "float32" else 2)
        ref.place(record_4, to.scales, record[low.scales : low.scales + size])
        ref.place(record_4, to.biases, record[low.biases : low.biases + size])
    return record_4


def mark_some(slots: U32, rng: np.random.Generator) -> U32:
    """Mark some pairs to be computed in full."""
    return slots | (rng.integers(0, 2, slots.shape, np.uint32) * np.uint32(FULL))


def unmarked(slots: U32) -> U32:
    return slots & np.uint32(FULL - 1)
