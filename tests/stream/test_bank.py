"""The bank against a model: outputs computed from a slot never see bytes read into it later."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flash_moe.errors import OptionError
from flash_moe.format.layout import RECORD_ALIGNMENT, Layout, make_layout
from flash_moe.stream.bank import MAX_LANE_BYTES, Bank, Lane, State
from tests.strategies import layouts

SLOTS = 8
LAYOUT = make_layout(
    [("up", "weight", "uint32", (3, 5)), ("up", "bias", "uint32", (3,))], [("up", None)]
)


def fill(lane: Lane, seed: int) -> np.ndarray:
    """Write records that differ by slot and by seed, as a reader does; their weights."""
    values = np.random.default_rng(seed).integers(0, 2**16, (len(lane.owners), 18), np.uint32)
    weight, bias = LAYOUT.parts
    for slot, row in enumerate(values):
        buffer = slot_of(lane, slot)
        buffer[weight.offset : weight.offset + weight.nbytes] = row[:15].tobytes()
        buffer[bias.offset : bias.offset + bias.nbytes] = row[15:].tobytes()
    return values


def slot_of(lane: Lane, slot: int) -> memoryview:
    return lane.buffer[slot * lane.stride : (slot + 1) * lane.stride]


def compute(lane: Lane, slots: Sequence[int]) -> mx.array:
    """Something lazy from some slots: the weights of each plus its bias."""
    arrays = lane.arrays(LAYOUT)
    rows = mx.array(np.array(slots, np.uint32))
    return arrays["up.weight"][rows] + arrays["up.bias"][rows][..., None]


def expected(values: np.ndarray, slots: Sequence[int]) -> np.ndarray:
    rows = values[list(slots)]
    return rows[:, :15].reshape(-1, 3, 5) + rows[:, 15:, None]


class Unfenced(Bank):
    """A bank that relies on the order of calls, as ours did before it owned its fence: it forgets
    the outputs of its lanes."""

    def take(self, owners: Sequence[int]) -> Lane:
        for lane in self.lanes:
            if lane.state is State.IN_USE:
                lane.fence(mx.zeros(()))
        return super().take(owners)


class BankMachine(RuleBasedStateMachine):
    make_bank: type[Bank] = Bank

    def __init__(self) -> None:
        super().__init__()
        self.bank = self.make_bank(SLOTS, RECORD_ALIGNMENT)
        self.lane: Lane | None = None
        self.values = np.empty((0, 18), np.uint32)
        self.turn = 0
        # Outputs that are not evaluated yet, with the values that they must have.
        self.outputs: list[tuple[mx.array, np.ndarray]] = []

    @rule(owners=st.sets(st.integers(0, 99), min_size=1, max_size=SLOTS // 2))
    def take(self, owners: set[int]) -> None:
        """A lane that was taken and not computed from (a read failed) is given up, too."""
        lane = self.bank.take(sorted(owners))
        assert lane is self.bank.lanes[self.turn % 2], "lanes take turns"
        assert lane.owners == tuple(sorted(owners))
        assert lane.state is State.FILLING
        self.turn += 1
        self.lane = lane

    @precondition(lambda self: self.lane is not None)
    @rule(seed=st.integers(0, 2**32), data=st.data())
    def fill_compute_fence(self, seed: int, data: st.DataObject) -> None:
        lane = self.lane
        assert lane is not None
        values = fill(lane, seed)
        slots = data.draw(st.lists(st.integers(0, len(lane.owners) - 1), min_size=1, max_size=6))
        output = compute(lane, slots)
        lane.fence(output)
        self.outputs.append((output, expected(values, slots)))
        self.lane = None

    @precondition(lambda self: self.outputs)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        """Outputs are evaluated in any order, long after their slots have new owners."""
        output, right = self.outputs.pop(data.draw(st.integers(0, len(self.outputs) - 1)))
        assert (np.array(output) == right).all()

    @rule()
    def drain(self) -> None:
        self.bank.drain()
        self.lane = None
        assert self.bank.count() == {State.FREE: SLOTS, State.FILLING: 0, State.IN_USE: 0}

    @invariant()
    def conserved(self) -> None:
        self.bank.check()
        filling = len(self.lane.owners) if self.lane else 0
        assert self.bank.count()[State.FILLING] >= filling

    def teardown(self) -> None:
        for output, right in self.outputs:
            assert (np.array(output) == right).all()


MACHINE = settings(
    max_examples=80,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_bank_against_the_model() -> None:
    run_state_machine_as_test(BankMachine, settings=MACHINE)


def test_the_machine_finds_a_missing_fence() -> None:
    class Machine(BankMachine):
        make_bank = Unfenced

    # Ends at the first wrong output, which one of about 30 examples shows.
    hunt = settings(
        MACHINE,
        max_examples=3000,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(AssertionError) as failure:
        run_state_machine_as_test(Machine, settings=hunt)
    # A wrong output, not a broken law.
    assert failure.traceback[-1].name in ("look", "teardown")


def late_outputs(bank: Bank) -> list[bool]:
    """Three turns with nothing evaluated in between: whether each output is right at the end."""
    outputs = []
    for seed in range(3):
        lane = bank.take([1, 2, 3])
        values = fill(lane, seed)
        output = compute(lane, [0, 1, 2])
        lane.fence(output)
        outputs.append((output, expected(values, [0, 1, 2])))
    return [bool((np.array(output) == right).all()) for output, right in outputs]


def test_a_lazy_output_survives_the_next_turn_of_its_lane() -> None:
    """The last layer of a lazy prefill, then decode: silently wrong logits without the fence."""
    assert late_outputs(Bank(SLOTS, RECORD_ALIGNMENT)) == [True, True, True]
    assert late_outputs(Unfenced(SLOTS, RECORD_ALIGNMENT)) == [False, True, True]


@given(layouts(), st.integers(1, 3), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_arrays_are_what_the_buffers_hold(layout: Layout, slots: int, seed: int) -> None:
    """Every part of every slot, of any type and shape; once more after it is overwritten."""
    bank = Bank(2 * slots, layout.stride)
    lane = bank.take(range(slots))
    random = np.random.default_rng(seed)
    for _ in range(2):
        lane.buffer[:] = random.bytes(len(lane.buffer))
        for part in layout.parts:
            array = lane.arrays(layout)[part.name]
            assert array.shape == (slots, *part.shape)
            got = np.array(mx.contiguous(array).reshape(slots, -1).view(mx.uint8))
            assert got.shape[1] == part.nbytes
            for slot in range(slots):
                held = slot_of(lane, slot)[part.offset : part.offset + part.nbytes]
                assert got[slot].tobytes() == bytes(held), (part, slot)


def test_slots_are_aligned_and_apart() -> None:
    bank = Bank(SLOTS, 3 * RECORD_ALIGNMENT)
    starts = []
    for lane in bank.lanes:
        assert len(lane.buffer) == lane.slots * bank.stride
        assert np.frombuffer(lane.buffer, np.uint8).ctypes.data == lane.address
        starts += [lane.address + slot * bank.stride for slot in range(lane.slots)]
    assert all(start % RECORD_ALIGNMENT == 0 for start in starts)
    gaps = np.diff(sorted(starts))
    assert len(starts) == SLOTS
    assert gaps.min() >= bank.stride


def test_too_many_owners() -> None:
    bank = Bank(SLOTS, RECORD_ALIGNMENT)
    with pytest.raises(ValueError, match="5 experts for a lane of 4 slots"):
        bank.take(range(5))
    bank.check()


@pytest.mark.parametrize(
    ("slots", "stride"),
    [
        (0, RECORD_ALIGNMENT),
        (1, RECORD_ALIGNMENT),
        (3, RECORD_ALIGNMENT),
        (-2, RECORD_ALIGNMENT),
        (2, 0),
        (2, -RECORD_ALIGNMENT),
        (2, RECORD_ALIGNMENT + 1),
        (4, MAX_LANE_BYTES // 2),
    ],
)
def test_impossible_banks(slots: int, stride: int) -> None:
    with pytest.raises(OptionError):
        Bank(slots, stride)


def test_a_lane_shows_only_the_slots_in_use() -> None:
    """MLX converts whole operands: a lane of 25 slots for 4 experts took 40 times as long."""
    bank = Bank(8, LAYOUT.stride)
    lane = bank.take([5, 1, 2])
    assert {len(array) for array in lane.arrays(LAYOUT).values()} == {3}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="MLX computes this on a GPU")
def test_a_lane_whose_output_cannot_be_computed_is_free_again() -> None:
    bank = Bank(2, LAYOUT.stride)
    half = mx.ones((1, 4, 4), mx.bfloat16)
    bank.take([0]).fence(mx.gather_mm(half, half, rhs_indices=mx.array([0])))
    bank.take([1]).fence(mx.zeros(1))
    with pytest.raises(RuntimeError, match="float32"):
        bank.take([2])
    assert bank.count()[State.FREE] == 1
    bank.drain()
    bank.check()
    assert bank.count()[State.FREE] == 2
