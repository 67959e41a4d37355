"""What a model needs, known from headers: disk, memory, bytes a token. No weight is read.

The floor of a token is the bytes that it must read, over the bandwidth that they come at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flash_moe.checkpoint.folder import Folder, experts_per_token
from flash_moe.checkpoint.skeleton import Skeleton, open_skeleton
from flash_moe.format.layout import Layout
from flash_moe.format.manifest import Requantized
from flash_moe.options import BANK_BYTES


@dataclass(frozen=True, slots=True)
class Plan:
    """`own_experts_per_token` is the K that the model was trained with. `first_plane_bytes` is
    what is read of a record in two planes for the first of them."""

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
    first_plane_bytes: int | None = None

    def tokens_per_second(self, bandwidth: float) -> float:
        """The most that a disk of `bandwidth` bytes a second allows, with nothing cached."""
        return bandwidth / self.token_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_folder(folder: Folder, experts: int | None = None) -> Plan:
    """The plan of a folder that can be run as it is; `experts` is another K than its own."""
    skeleton = open_skeleton(folder, chosen_experts(folder, experts))
    skeleton.layers()
    return make_plan(skeleton)


def chosen_experts(folder: Folder, experts: int | None) -> int | None:
    """The K that is asked for, or that a pack was made with, or None for the model's own."""
    if experts is None and folder.manifest is not None:
        return folder.manifest.experts_per_token
    return experts


def make_plan(
    skeleton: Skeleton,
    bank_bytes: int = BANK_BYTES,
    layouts: Mapping[str, Layout] | None = None,
    requantized: Requantized | None = None,
    experts: int | None = None,
) -> Plan:
    """Count what a skeleton holds. Works for checkpoints that must be packed first, too; with the
    `layouts` that they are to be packed in, and K, it is the plan of that pack."""
    form = skeleton.folder.form if layouts is None else "pack"
    layouts = layouts or {path: skeleton.layout(path) for path in skeleton.switches}
    counts = {path: skeleton.expert_count(path) for path in skeleton.switches}
    widest = max(layouts.values(), key=lambda layout: layout.nbytes)
    stride = max(layout.stride for layout in layouts.values())
    manifest = skeleton.folder.manifest
    k = experts or skeleton.experts_per_token
    slots = bank_slots(stride, k, max(counts.values()), bank_bytes)
    return Plan(
        architecture=skeleton.folder.architecture,
        form=form,
        layers=len(layouts),
        experts=max(counts.values()),
        experts_per_token=k,
        own_experts_per_token=experts_per_token(skeleton.folder.config) or 1,
        bits=" and ".join(dict.fromkeys(layout.bits for layout in layouts.values())),
        record_bytes=widest.nbytes,
        expert_bytes=sum(layouts[path].nbytes * counts[path] for path in layouts),
        resident_bytes=sum(array.nbytes for array in skeleton.resident().values()),
        bank_slots=slots,
        bank_bytes=slots * stride,
        token_bytes=sum(k * layout.nbytes for layout in layouts.values()),
        requantized=manifest.requantized if manifest else requantized,
        first_plane_bytes=widest.first_plane_bytes if widest.two_planes else None,
    )


def bank_slots(stride: int, k: int, experts: int, budget: int = BANK_BYTES) -> int:
    """Slots for both lanes: within the budget, but never fewer than a token needs."""
    lane = min(experts, max(k, budget // 2 // stride, 1))
    return 2 * lane
