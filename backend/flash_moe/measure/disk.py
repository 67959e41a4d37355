"""What a model's disk gives: raw reads of its experts, past the page cache."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.plan import chosen_experts, make_plan
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.measure.raw_reads import RawReads
from flash_moe.options import BANK_BYTES
from flash_moe.stream.store import ExpertStore


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes a second (None where the file system has no reads past the page cache), and the bytes
    of a token's experts."""

    rate: float | None
    token_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """At most, with nothing cached."""
        return None if self.rate is None else self.rate / self.token_bytes


def measure_disk(path: Path, experts: int | None = None) -> Disk:
    """Five tokens of experts, at random."""
    folder = open_folder(path)
    skeleton = open_skeleton(folder, chosen_experts(folder, experts))
    plan = make_plan(skeleton, BANK_BYTES)
    with (
        closing(ExpertStore(skeleton.layers())) as store,
        closing(RawReads(store, plan.experts_per_token)) as raw,
    ):
        return Disk(raw.direct(), plan.token_bytes)
