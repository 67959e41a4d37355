"""What a model needs, known from headers: disk, memory, bytes a token. Nothing is read or written.

The floor of a token is the bytes that it must read, over the bandwidth that they come at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.format.manifest import Requantized
from flash_moe.stream.choice import Choice

# The working set, both lanes. 256 MB are 64 experts of the 397B at 2 bits; a lane then serves
# any K up to 32 at once, and prefill reads and computes in groups large enough for 1 MiB reads.
BANK_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    architecture: str
    form: str
    layers: int
    experts: int
    experts_per_token: int
    own_experts_per_token: int
    bits: str
    record_bytes: int
    expert_bytes: int
    resident_bytes: int
    bank_slots: int
    bank_bytes: int
    token_bytes: int
    requantized: Requantized | None = None
    choice: Choice | None = None
    # Of a record in two planes, what is read of it for the first alone.
    first_bytes: int | None = None

    @property
    def lossy(self) -> list[str]:
        """What makes it less exact than the checkpoint, in words; empty if nothing does."""
        k = self.experts_per_token
        choice = self.choice or Choice(k, k, renormalise=False)
        # Two planes lose nothing where both are read, and the choice says where they are not.
        made = self.requantized if self.requantized and not self.requantized.planes else None
        return choice.lossy(self.own_experts_per_token) + ([str(made)] if made else [])

    @property
    def pack_bytes(self) -> int:
        """Disk that a pack takes, give or take tokenizer files."""
        return self.expert_bytes + self.resident_bytes

    @property
    def memory_bytes(self) -> int:
        """Weights and bank; the state of a conversation comes on top."""
        return self.resident_bytes + self.bank_bytes

    def tokens_per_second(self, bandwidth: float) -> float:
        """The most that a disk of `bandwidth` bytes a second allows, with nothing cached."""
        return bandwidth / self.token_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(skeleton: Skeleton, own_experts_per_token: int, bank_bytes: int = BANK_BYTES) -> Plan:
    """Count what a skeleton holds. Works for checkpoints that must be packed first, too."""
    layouts = {path: skeleton.layout(path) for path in skeleton.switches}
    counts = {path: skeleton.expert_count(path) for path in skeleton.switches}
    widest = max(layouts.values(), key=lambda layout: layout.nbytes)
    manifest = skeleton.folder.manifest
    k = skeleton.experts_per_token
    slots = bank_slots(
        max(layout.stride for layout in layouts.values()), k, max(counts.values()), bank_bytes
    )
    return Plan(
        architecture=skeleton.folder.architecture,
        form=skeleton.folder.form,
        layers=len(layouts),
        experts=max(counts.values()),
        experts_per_token=k,
        own_experts_per_token=own_experts_per_token,
        bits=" and ".join(dict.fromkeys(layout.bits for layout in layouts.values())),
        record_bytes=widest.nbytes,
        expert_bytes=sum(layouts[path].nbytes * counts[path] for path in layouts),
        resident_bytes=sum(array.nbytes for array in skeleton.resident().values()),
        bank_slots=slots,
        bank_bytes=slots * max(layout.stride for layout in layouts.values()),
        token_bytes=sum(k * layout.nbytes for layout in layouts.values()),
        requantized=manifest.requantized if manifest else None,
        first_bytes=widest.first_bytes if widest.planes else None,
    )


def bank_slots(stride: int, k: int, experts: int, budget: int = BANK_BYTES) -> int:
    """Slots for both lanes: within the budget, but never fewer than a token needs."""
    lane = min(experts, max(k, budget // 2 // stride, 1))
    return 2 * lane
