"""The open files of the experts: layer and experts → the pieces to read. Knows no arrays."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from flash_moe.checkpoint.locations import ExpertLayer
from flash_moe.errors import OptionError, ReadFailed, Remedy
from flash_moe.format.layout import RECORD_ALIGNMENT
from flash_moe.options import ReadMode


class Segment(NamedTuple):
    """`length` bytes of an open file that belong `at` bytes into an expert's slot."""

    fd: int
    offset: int
    length: int
    at: int


# A segment, and memory as long as it is.
Target = tuple[Segment, memoryview]
EVERY = repeat(True)


@dataclass(slots=True)
class ExpertStore:
    """`mode` buffered reads through the page cache, which then serves the experts that are used
    often; direct goes past it (O_DIRECT, F_NOCACHE), to measure a disk or to spare memory."""

    layers: Sequence[ExpertLayer]
    mode: ReadMode = "buffered"
    _files: dict[Path, int] = field(default_factory=dict)

    def targets(
        self,
        layer: int,
        experts: Sequence[int],
        buffers: Sequence[memoryview],
        full: Iterable[bool] = EVERY,
    ) -> list[Target]:
        """What to read for experts, in full or for their first planes alone; each has a buffer."""
        return [
            (segment, buffer[segment.at : segment.at + segment.length])
            for expert, buffer, both in zip(experts, buffers, full, strict=False)
            for segment in self.segments(layer, expert, both)
        ]

    def segments(self, layer: int, expert: int, full: bool = True) -> list[Segment]:
        """What to read for one expert; pieces that are neighbours both on disk and in the slot are
        joined."""
        segments: list[Segment] = []
        for run in self.layers[layer].runs:
            if run.second_plane and not full:
                continue
            if run.offsets:
                path, offset = run.files[expert], run.offsets[expert]
            else:
                path, offset = run.file, run.base + expert * run.step
            fd = self._files.get(path)
            if fd is None:
                fd = self._open(path)
            at, length = run.at, run.length
            if segments:
                last = segments[-1]
                ends = (last.fd, last.offset + last.length, last.at + last.length)
                if ends == (fd, offset, at):
                    _, offset, before, at = segments.pop()
                    length += before
            segments.append(Segment(fd, offset, length, at))
        return segments

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.mode == "direct" and hasattr(os, "O_DIRECT"):
            self._require_alignment()
            flags |= os.O_DIRECT
        try:
            fd = os.open(path, flags)
        except OSError as error:
            raise ReadFailed(
                f"Cannot open {path}: {error.strerror}. The model may have been moved or removed.",
                Remedy.ADD_AGAIN,
            ) from error
        if self.mode == "direct" and hasattr(fcntl, "F_NOCACHE"):
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        self._files[path] = fd
        return fd

    def _require_alignment(self) -> None:
        for layer in self.layers:
            for run in layer.runs:
                places = (*run.offsets, run.base, run.step, run.length, run.at)
                if any(n % RECORD_ALIGNMENT for n in places):
                    raise OptionError(
                        "mode=direct needs aligned records, which a checkpoint used in place does "
                        "not have. Pack the checkpoint, or choose mode=buffered.",
                        Remedy.PACK,
                        run.file.parent,
                    )
