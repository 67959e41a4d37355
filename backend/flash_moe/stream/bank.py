"""The bank: the memory that experts are read into and computed from.

Two aligned allocations, the lanes, of equal slots. While one lane computes, the other is
filled. The bank is a working set, not a cache: what a slot holds is lost at the next turn.

The bank owns its fence. MLX is lazy, so an array computed from a slot may not have been computed
yet when the slot is written again; relying on call order gave silently wrong logits (the last
layer has no later router that would force it). So a lane remembers the output computed from it,
and evaluates that before it hands out its slots again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

import mlx.core as mx
import numpy as np

from flash_moe.arrays import address_of, mlx_dtype, on_cuda, raw_bytes
from flash_moe.errors import OptionError
from flash_moe.format.dtypes import BY_NAME
from flash_moe.format.layout import RECORD_ALIGNMENT, Layout
from flash_moe.kernels.spec import U64, ExpertSpec, part_addresses
from flash_moe.stream.cuda_memory import stay_on_host

# MLX shapes are 32-bit, and a lane is one array of bytes.
MAX_LANE_BYTES = 2**31

Arrays = dict[str, mx.array]


class State(Enum):
    FREE = "free"
    FILLING = "filling"
    IN_USE = "in use"


@dataclass(slots=True)
class Lane:
    """Half of the bank. `take` → fill `buffer` → compute from `arrays` → `fence(output)`."""

    slots: int
    stride: int
    memory: mx.array
    buffer: memoryview
    address: int
    owners: tuple[int, ...] = ()
    state: State = State.FREE
    _output: mx.array | None = None
    _words: mx.array | None = None
    _arrays: dict[Layout, Arrays] = field(default_factory=dict)
    _parts: dict[ExpertSpec, U64] = field(default_factory=dict)
    # Of the experts that are computed where the page cache has them; else None.
    elsewhere: U64 | None = None

    def arrays(self, layout: Layout) -> Arrays:
        """The slots that have an owner as stacked arrays [slots, …], one a part: views of the
        lane's memory, or on CUDA fresh copies."""
        if layout not in self._arrays:
            views = {
                part.name: self._view(part.dtype, part.shape, part.offset) for part in layout.parts
            }
            mx.eval(list(views.values()))
            self._arrays[layout] = views
        views = self._arrays[layout]
        # No more than is in use: where MLX converts an operand it converts all of it, which took
        # 0.5 s a token for 4 bfloat16 experts in a lane of 100 MB, against 14 ms.
        used = {name: view[: len(self.owners)] for name, view in views.items()}
        if not on_cuda():
            return used
        # MLX's gather_qmm takes contiguous weights only (0.32.4: "No implementation for problem
        # shape"), and a discrete GPU reads them faster from its own memory than over the bus.
        return {name: mx.contiguous(view) for name, view in used.items()}

    @property
    def words(self) -> mx.array:
        """All of the lane as 32-bit words, for kernels that find the parts by themselves."""
        if self._words is None:
            self._words = self.memory.view(mx.uint32)
        return self._words

    def parts(self, spec: ExpertSpec) -> U64:
        """Where the parts of each owner's expert are, [owners, parts]."""
        if self.elsewhere is not None:
            return self.elsewhere
        if spec not in self._parts:
            self._parts[spec] = part_addresses(spec, self.address, self.slots)
        return self._parts[spec][: len(self.owners)]

    def fence(self, output: mx.array) -> None:
        """Declare what is computed from this lane; its slots stay untouched until it is."""
        self._output = output
        self.state = State.IN_USE

    def wait(self) -> None:
        output, self._output = self._output, None
        self.state = State.FREE
        self.owners = ()
        self.elsewhere = None
        # Free whether or not this fails: what could not be computed needs the slots no more.
        if output is not None:
            mx.eval(output)

    def _view(self, dtype: str, shape: tuple[int, ...], offset: int) -> mx.array:
        size = BY_NAME[dtype].nbytes
        typed = self.memory.view(mlx_dtype(dtype))
        inner = np.cumprod([1, *shape[:0:-1]])[::-1].tolist() if shape else []
        return mx.as_strided(
            typed, (self.slots, *shape), (self.stride // size, *inner), offset // size
        )


class Bank:
    """Two lanes of `slots // 2` experts each. One thread takes and fences; readers only fill."""

    def __init__(self, slots: int, stride: int) -> None:
        if slots < 2 or slots % 2:
            raise OptionError(f"A bank of {slots} slots: choose an even number, 2 or more.")
        if stride <= 0 or stride % RECORD_ALIGNMENT:
            raise OptionError(f"A slot of {stride} bytes is not a multiple of {RECORD_ALIGNMENT}.")
        if slots // 2 * stride >= MAX_LANE_BYTES:
            raise OptionError(
                f"A bank of {slots * stride / 1e9:.1f} GB: each half must stay below 2 GiB."
            )
        self.slots = slots
        self.stride = stride
        self.lanes = [_lane(slots // 2, stride) for _ in range(2)]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        return self.slots * self.stride

    @property
    def lane_slots(self) -> int:
        return self.slots // 2

    def take(self, owners: Sequence[int]) -> Lane:
        """The next lane, its last output evaluated, its first slots given to `owners`."""
        if len(owners) > self.lane_slots:
            raise ValueError(f"{len(owners)} experts for a lane of {self.lane_slots} slots")
        lane = self.lanes[self._turn]
        self._turn ^= 1
        lane.wait()
        lane.owners = tuple(owners)
        lane.state = State.FILLING
        return lane

    def forget(self) -> None:
        """Frees all slots, whatever becomes of what was to be computed from them."""
        for lane in self.lanes:
            with suppress(Exception):  # a compiler's errors have no type of their own
                lane.wait()

    def drain(self) -> None:
        """Wait for both lanes: nothing is computed from the bank any more."""
        for lane in self.lanes:
            lane.wait()

    def count(self) -> dict[State, int]:
        """How many slots are free, being filled, in use."""
        counts = dict.fromkeys(State, 0)
        for lane in self.lanes:
            counts[lane.state] += len(lane.owners)
            counts[State.FREE] += lane.slots - len(lane.owners)
        return counts

    def check(self) -> None:
        """The conservation law: every slot is in one state, and no lane holds an expert twice."""
        counts = self.count()
        assert sum(counts.values()) == self.slots, counts
        for lane in self.lanes:
            assert len(set(lane.owners)) == len(lane.owners), lane.owners
            assert (lane.state is State.FREE) == (not lane.owners), lane
            assert (lane.state is State.IN_USE) == (lane._output is not None), lane


def _lane(slots: int, stride: int) -> Lane:
    memory = _aligned(slots * stride)
    if on_cuda():
        stay_on_host(address_of(memory), slots * stride)
    return Lane(slots, stride, memory, raw_bytes(memory), address_of(memory))


def _aligned(nbytes: int) -> mx.array:
    """MLX memory that starts on a record boundary (its CPU allocations are 8 mod 16)."""
    raw = mx.zeros((nbytes + RECORD_ALIGNMENT,), dtype=mx.uint8)
    mx.eval(raw)
    start = -address_of(raw) % RECORD_ALIGNMENT
    memory = raw[start : start + nbytes]
    mx.eval(memory)
    return memory
