"""Inputs for the GPU kernels: shapes, packings, scales and cuts of every kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from flash_moe.kernels import gpu
from flash_moe.kernels.spec import BITS, GROUP_SIZES, SCALE_TYPES, U32, ExpertSpec
from tests.kernels import reference as ref
from tests.kernels.devices import F64
from tests.kernels.native_cases import seeds

DTYPES = ("bfloat16", "float16", "float32")
SLOTS = 11


@dataclass(frozen=True)
class Case:
    spec: ExpertSpec
    dtype: str
    tokens: int
    k: int
    scales: ref.Scales
    tuning: gpu.Tuning
    seed: int

    def make(self) -> Data:
        rng = np.random.default_rng(self.seed)
        bank = [ref.random_record(self.spec, rng, self.scales) for _ in range(SLOTS)]
        x = ref.rounded(rng.normal(size=(self.tokens, self.spec.hidden)), self.dtype)
        slots = np.stack([rng.permutation(SLOTS)[: self.k] for _ in range(self.tokens)])
        return Data(self, bank, x, slots.astype(np.uint32), rng)


@dataclass(frozen=True)
class Data:
    case: Case
    bank: list[ref.Bytes]
    x: F64
    slots: U32
    rng: np.random.Generator

    @property
    def words(self) -> mx.array:
        return mx.array(np.concatenate(self.bank).view(np.uint32))

    def pairs(self) -> tuple[U32, U32]:
        tokens = np.repeat(np.arange(len(self.x), dtype=np.uint32), self.slots.shape[1])
        return tokens, self.slots.reshape(-1)

    def sorted_pairs(self) -> tuple[U32, U32, U32]:
        """Pairs by slot, and the place of each (token, choice) among them."""
        tokens, slots = self.pairs()
        order = np.argsort(slots, kind="stable")
        place = np.empty(len(order), np.uint32)
        place[order] = np.arange(len(order))
        return tokens[order], slots[order], place


# Down to scales that are subnormal, up to sums of 2^60; float16 activations hold neither.
ordinary = st.builds(
    ref.Scales, spread=st.sampled_from([0.0, 4.0]), negative=st.booleans(), zeros=st.booleans()
)
extreme = st.builds(
    ref.Scales,
    magnitude=st.sampled_from([2.0**-130, 2.0**-60, 2.0**-20, 2.0**20]),
    spread=st.sampled_from([0.0, 8.0]),
    negative=st.booleans(),
    zeros=st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes that fill no step of 512 columns and no threadgroup, and some that do."""
    group = draw(st.sampled_from(GROUP_SIZES))
    scale_type = draw(st.sampled_from(SCALE_TYPES))
    dtype = draw(st.sampled_from(DTYPES))
    spec = ref.make_spec(
        group * draw(st.integers(1, 1152 // group)),
        group * draw(st.integers(1, 640 // group)),
        draw(st.sampled_from(BITS)),
        group,
        scale_type,
        draw(st.sampled_from(BITS)),
    )
    scales = draw(extreme | ordinary)
    if "float16" in (dtype, scale_type):
        # Three products of values up to 2^bits and 2^4 must stay below 65504.
        scales = replace(draw(ordinary), magnitude=2.0**-spec.gate.bits / 4)
    return Case(
        spec,
        dtype,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 10)),
        scales,
        gpu.Tuning(
            draw(st.sampled_from([1, 2, 4])),
            draw(st.sampled_from([1, 2, 8])),
            draw(st.sampled_from([16, 32])),
        ),
        draw(seeds),
    )
