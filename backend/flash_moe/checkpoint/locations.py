"""Where every expert's bytes are: files and offsets, for a pack and for a checkpoint as downloaded.

In a pack an expert is one aligned piece of a file; in a checkpoint it is several, because gate, up,
down and their scales are separate tensors. Nothing is opened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flash_moe.format.layout import Layout


@dataclass(frozen=True, slots=True)
class Run:
    """Parts of a record that lie together for every expert of a layer. Expert e's begin at
    `offsets[e]` of `files[e]`, or at `base + e * step` of `file` when they are evenly spaced, and
    belong `at` bytes into its slot. `second_plane` is read only for experts wanted in full."""

    file: Path
    base: int
    step: int
    length: int
    at: int
    offsets: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()
    second_plane: bool = False


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


def packed_layer(path: str, experts: int, layout: Layout, file: Path) -> ExpertLayer:
    """A layer of a pack: one run for each plane, whole strides, so that direct I/O may read it."""
    stride, first = layout.stride, layout.first_plane_bytes
    runs = [Run(file, 0, stride, first, 0)]
    if layout.two_planes:
        runs.append(Run(file, first, stride, stride - first, first, second_plane=True))
    return ExpertLayer(path, experts, layout, tuple(runs))
