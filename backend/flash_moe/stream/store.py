"""The open files of the experts: layer and experts → the pieces to read. Knows no memory."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flash_moe.checkpoint.locations import ExpertLayer, Run
from flash_moe.errors import OptionError, ReadFailed, Remedy
from flash_moe.format.layout import RECORD_ALIGNMENT
from flash_moe.options import ReadMode

# A row says: so many bytes of an open file, from an offset on, belong so far into a buffer.
Pieces = npt.NDArray[np.int64]
Slots = npt.NDArray[np.intp]
FILE, OFFSET, LENGTH, AT = range(4)

# Of macOS; Python has no name for it.
F_RDAHEAD = 45


class Places(NamedTuple):
    """The pieces of all experts of a layer [experts, pieces, 4], and which are second planes."""

    pieces: Pieces
    second: npt.NDArray[np.bool_]


@dataclass(slots=True)
class ExpertStore:
    """`mode` buffered reads through the page cache, which then serves the experts that are used
    often; direct goes past it (O_DIRECT, F_NOCACHE), to measure a disk or to spare memory.
    `in_order`: experts will be read one after the other, and the system may read ahead.

    Files are opened, and a layer's table is made, when the layer is first used."""

    layers: Sequence[ExpertLayer]
    mode: ReadMode = "buffered"
    in_order: bool = False
    _files: dict[Path, int] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict)

    def pieces(
        self,
        layer: int,
        experts: Sequence[int],
        stride: int = 0,
        full: npt.NDArray[np.bool_] | None = None,
        slots: Slots | None = None,
    ) -> Pieces:
        """What to read for experts, expert i to `slots[i] * stride` of a buffer, or `i * stride`;
        with flags, the second plane only of those that have one set."""
        places = self._places.get(layer) or self._open_layer(layer)
        pieces = places.pieces[experts]
        if stride and (slots is not None or len(experts) > 1):
            numbers = np.arange(len(experts)) if slots is None else slots
            pieces[:, :, AT] += stride * numbers[:, None]
        if full is not None:
            return pieces[full[:, None] | ~places.second]
        return pieces.reshape(-1, 4)

    def second_planes(self, layer: int) -> npt.NDArray[np.bool_]:
        """Which of an expert's pieces are second planes."""
        return (self._places.get(layer) or self._open_layer(layer)).second

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        self._places.clear()

    def _open_layer(self, layer: int) -> Places:
        runs = self.layers[layer].runs
        places = [self._places_of(run, self.layers[layer].experts) for run in runs]
        second = np.array([run.second_plane for run in runs])
        self._places[layer] = Places(np.stack(places, axis=1), second)
        return self._places[layer]

    def _places_of(self, run: Run, experts: int) -> Pieces:
        """One piece an expert."""
        files = [self._file(path) for path in run.files or (run.file,)]
        pieces = np.empty((experts, 4), np.int64)
        pieces[:, FILE] = files
        pieces[:, OFFSET] = run.offsets or run.base + run.step * np.arange(experts)
        pieces[:, LENGTH] = run.length
        pieces[:, AT] = run.at
        return pieces

    def _file(self, path: Path) -> int:
        return self._files[path] if path in self._files else self._open(path)

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
        if not self.in_order:
            _read_nothing_ahead(fd)
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


def _read_nothing_ahead(fd: int) -> None:
    """The experts of a token lie anywhere. Reading ahead fetched 1.87 times what was wanted."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, F_RDAHEAD, 0)
    elif hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
