"""What a disk gives: raw reads of a model's experts, past the page cache, or of as large records
where there is no model yet."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.locations import packed_layer
from flash_moe.checkpoint.plan import chosen_experts, make_plan
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.format.layout import make_layout
from flash_moe.measure.raw_reads import RawReads
from flash_moe.options import BANK_BYTES
from flash_moe.stream.store import ExpertStore

# Of a file to measure a disk by, and the records that are read of it at a time.
SCRATCH_BYTES = 256_000_000
RECORDS = 8


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


def measure_place(folder: Path, record_bytes: int) -> float | None:
    """Bytes a second for records of such a size, from a file that is written for it and removed.
    None where that cannot be: no space, no reads past the page cache."""
    count = max(2 * RECORDS, SCRATCH_BYTES // record_bytes)
    layout = make_layout([("all", "weight", "uint8", (record_bytes,))], [("all", None)])
    with tempfile.TemporaryDirectory(prefix=".flash-moe-", dir=folder) as scratch:
        if shutil.disk_usage(folder).free < 2 * count * layout.stride:
            return None
        file = Path(scratch) / "records"
        _fill(file, count * layout.stride)
        layer = packed_layer("all", count, layout, file)
        with (
            closing(ExpertStore([layer])) as store,
            closing(RawReads(store, RECORDS)) as raw,
        ):
            return raw.direct()


def _fill(file: Path, nbytes: int) -> None:
    """With bytes that no file system compresses."""
    block = os.urandom(1 << 22)
    with file.open("wb") as out:
        if hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(out, fcntl.F_NOCACHE, 1)
        for at in range(0, nbytes, len(block)):
            out.write(block[: nbytes - at])
        out.flush()
        os.fsync(out.fileno())
