"""The ways to pull a repository, and what each takes and loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from flash_moe.checkpoint.folder import routed_experts
from flash_moe.checkpoint.plan import Plan
from flash_moe.errors import OptionError
from flash_moe.pack.fewer_bits import fewer_bits
from flash_moe.pack.files import resident_shards
from flash_moe.pack.job import PackJob
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.pull.repository import Repository
from flash_moe.pull.route import Route

# (bits, planes) of what a repository of 4 bits can be pulled as.
FORMS = ((None, False), (None, True), (2, False))


@dataclass(frozen=True, slots=True)
class Form:
    """One way to pull a repository. `peak_bytes` is the most that it takes on disk meanwhile,
    `pack_bytes` what stays. `refused` says why it cannot be; the rest is empty then."""

    bits: int | None
    planes: bool
    pack_bytes: int = 0
    peak_bytes: int = 0
    model: Plan | None = None
    refused: str | None = None

    @property
    def lossy(self) -> list[str]:
        """What the model loses by it."""
        plan = self.model
        if plan is None:
            return []
        found = []
        if plan.requantized is not None and not plan.requantized.two_planes:
            found.append(str(plan.requantized))
        if plan.experts_per_token < plan.own_experts_per_token:
            own = plan.own_experts_per_token
            found.append(f"{plan.experts_per_token} of {own} experts a token")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "planes": self.planes,
            "pack_bytes": self.pack_bytes,
            "peak_bytes": self.peak_bytes,
            "lossy": self.lossy,
            "refused": self.refused,
            "model": self.model and self.model.to_json(),
        }


def transform_of(bits: int | None, planes: bool) -> ExpertTransform | None:
    if planes:
        return TwoPlanes()
    return None if bits is None else fewer_bits(bits)


def pack_with(job: PackJob, transform: ExpertTransform | None, experts: int | None) -> PackJob:
    if experts is not None and not 1 <= experts <= routed_experts(job.skeleton.config):
        total = routed_experts(job.skeleton.config)
        raise OptionError(f"experts={experts}: this model has {total}; choose 1 to {total}.")
    return replace(job, transform=transform, experts_per_token=experts).checked()


def form_of(
    job: PackJob, route: Route, repository: Repository, bits: int | None, planes: bool
) -> Form:
    arrays = job.skeleton.resident()
    largest = max(
        (sum(arrays[name].nbytes for name in names) for names in resident_shards(arrays)),
        default=0,
    )
    small = sum(file.size for file in repository.small)
    resident = sum(array.nbytes for array in arrays.values())
    experts = job.nbytes - resident
    # The copy has what is no expert's as the repository has it, and the pack gets it a file at a
    # time, while the copy gives it back.
    peak = experts + max(resident, route.kept_bytes) + 2 * small
    peak += max(largest, route.side_peak())
    return Form(bits, planes, job.nbytes + small, peak, job.as_planned())
