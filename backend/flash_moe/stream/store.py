"""Where every expert's bytes are: (layer, expert) → segments of files. Knows no arrays.

Two forms answer the same question. In a pack an expert is one aligned segment; in a checkpoint
as downloaded it is a few, because gate, up, down and their scales are separate tensors. The
reader does not care which. The store owns the open files and closes them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from flash_moe.errors import OptionError, ReadFailed
from flash_moe.format.layout import RECORD_ALIGNMENT, Layout

# buffered: through the OS page cache, which then serves the experts that are asked for often.
# direct: past it (O_DIRECT, F_NOCACHE), for measuring the disk and for memory-starved machines.
Mode = Literal["buffered", "direct"]


class Segment(NamedTuple):
    """`length` bytes of an open file that belong `at` bytes into the expert's slot."""

    fd: int
    offset: int
    length: int
    at: int


@dataclass(frozen=True, slots=True)
class Run:
    """One or more parts of all experts of a layer that lie together: expert e of it starts at
    `offsets[e]`, or at `base + e * step` when they are evenly spaced. `rest` is the second of two
    planes: read only with experts that are wanted whole."""

    file: Path
    base: int
    step: int
    length: int
    at: int
    offsets: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()
    rest: bool = False

    def where(self, expert: int) -> tuple[Path, int]:
        if self.offsets:
            return self.files[expert], self.offsets[expert]
        return self.file, self.base + expert * self.step


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The routed experts of one switch layer of the model."""

    path: str
    experts: int
    layout: Layout
    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return self.experts * self.layout.nbytes


@dataclass(slots=True)
class ExpertStore:
    layers: Sequence[ExpertLayer]
    mode: Mode = "buffered"
    _files: dict[Path, int] = field(default_factory=dict)

    def segments(self, layer: int, expert: int, whole: bool = True) -> list[Segment]:
        """What to read for one expert, or for its first plane; neighbours on disk and in the slot
        joined."""
        found: list[Segment] = []
        for run in self.layers[layer].runs:
            if run.rest and not whole:
                continue
            path, offset = run.where(expert)
            fd = self._files.get(path)
            segment = Segment(self._open(path) if fd is None else fd, offset, run.length, run.at)
            if found and _touch(found[-1], segment):
                last = found[-1]
                segment = last._replace(length=last.length + segment.length)
                found.pop()
            found.append(segment)
        return found

    def path_of(self, fd: int) -> str:
        return next((str(path) for path, known in self._files.items() if known == fd), f"fd {fd}")

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
                f"Cannot open {path}: {error.strerror}. If the model was moved or removed, "
                "add it again: llm flash-moe add PATH"
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
                        "Direct I/O needs aligned records, which a checkpoint used in place does "
                        "not have. Pack it (llm flash-moe pack), or read through the page cache."
                    )


def _touch(left: Segment, right: Segment) -> bool:
    return (
        left.fd == right.fd
        and left.offset + left.length == right.offset
        and left.at + left.length == right.at
    )


def packed_layer(path: str, experts: int, layout: Layout, file: Path) -> ExpertLayer:
    """A layer of a pack: a run a plane, whole strides, so that direct I/O may read it."""
    stride, first = layout.stride, layout.first_bytes
    runs = [Run(file, 0, stride, first, 0)]
    if layout.planes:
        runs.append(Run(file, first, stride, stride - first, first, rest=True))
    return ExpertLayer(path, experts, layout, tuple(runs))
