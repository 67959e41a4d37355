"""Which experts are computed in full, by rank and by phase."""

from __future__ import annotations

import typing

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.options import FULL_PHASES, Phase
from flash_moe.stream.precision import Precision

PHASES: tuple[Phase, ...] = typing.get_args(Phase)
phases = st.sampled_from(PHASES)
counts = st.integers(0, 12)
precisions = st.builds(
    Precision,
    st.none() | counts,
    st.lists(st.sampled_from(FULL_PHASES), unique=True).map(tuple),
)


@given(precisions, st.integers(1, 10), phases)
def test_full_experts_are_the_first_ranks(precision: Precision, k: int, phase: Phase) -> None:
    ranks = precision.full_ranks(k, phase)
    assert (ranks.shape, ranks.dtype) == ((k,), np.bool_)
    everything = precision.full_experts is None or phase in precision.full_in
    count = k if everything else min(k, precision.full_experts or 0)
    assert ranks.tolist() == [True] * count + [False] * (k - count)


@given(precisions, phases)
def test_experts_without_a_rank_are_all_alike(precision: Precision, phase: Phase) -> None:
    """In full where every rank is; otherwise none of them, however many are asked for."""
    everything = precision.full_ranks(1 + (precision.full_experts or 0), phase).all()
    assert precision.all_full(phase) == everything


@given(precisions, st.integers(1, 10))
def test_it_is_lossy_if_and_only_if_some_expert_is_not_in_full(
    precision: Precision, k: int
) -> None:
    in_full = all(precision.full_ranks(k, phase).all() for phase in PHASES)
    description = precision.lossy(k)
    assert (description is None) == in_full
    if description is not None:
        assert description.startswith(f"{precision.full_experts} experts of {k} at 4 bits")
        assert all(phase in description for phase in precision.full_in)


def test_the_default_is_everything_in_full() -> None:
    assert not Precision().by_rank
    assert all(Precision().all_full(phase) for phase in PHASES)
    assert Precision(2).by_rank
