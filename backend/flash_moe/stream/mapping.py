"""Experts computed where the page cache has them: mapped, and neither read nor copied.

The system is asked first, because a page that is not there would be fetched by a page fault, 4 KB
at a time; experts that are not wholly there are read, in parallel. Mapped pages count as memory of
this process, although the system takes them back when it wants to: beyond a limit, those used
longest ago are given up.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flash_moe.kernels.spec import U64, ExpertSpec, part_offsets
from flash_moe.stream.native_reader import NativeReader
from flash_moe.stream.store import AT, FILE, LENGTH, OFFSET, ExpertStore, Pieces

Flags = npt.NDArray[np.bool_]

Block = tuple[int, int]

# What Linux maps at most when one page is touched; memory is counted and given up in these.
BLOCK = 2 << 20


@dataclass(slots=True)
class MappedExperts:
    """`limit`: bytes that may stay mapped. Linux tells only the owner of a file what is in memory,
    and says of the files of others that all is there: those are always read."""

    store: ExpertStore
    reader: NativeReader
    limit: int
    _maps: dict[int, mmap.mmap | None] = field(default_factory=dict)
    # Address and length of each.
    _places: U64 = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    # A layer's pieces [experts, pieces, 4], and where the parts are [experts, parts].
    _pieces: dict[int, Pieces | None] = field(default_factory=dict)
    _parts: dict[int, U64] = field(default_factory=dict)
    # Those of an expert, and all that are in use, least recently first: (file, number).
    _blocks: dict[tuple[int, int], list[Block]] = field(default_factory=dict)
    _used: OrderedDict[Block, None] = field(default_factory=OrderedDict)

    def find(
        self, layer: int, experts: Sequence[int], full: Flags | None = None
    ) -> tuple[Flags, int]:
        """Which experts are in the page cache, with what would be read of them, and how many bytes
        that is; they count as used now."""
        if layer not in self._pieces:
            self._pieces[layer] = self._map(layer)
        table = self._pieces[layer]
        if table is None:
            return np.zeros(len(experts), np.bool_), 0
        pieces = table[experts]
        if full is not None:
            pieces[:, :, LENGTH] *= full[:, None] | ~self.store.second_planes(layer)
        there = self.reader.in_memory(pieces, self._places)
        for expert in np.array(experts)[there].tolist():
            self._use(layer, expert)
        while self.mapped > self.limit:
            (fd, number), _ = self._used.popitem(last=False)
            self._give_up(fd, number * BLOCK)
        return there, int(pieces[there, :, LENGTH].sum())

    def give_up_all(self) -> None:
        """The page cache drops nothing that a process has mapped."""
        while self._used:
            (fd, number), _ = self._used.popitem()
            self._give_up(fd, number * BLOCK)

    def parts(self, layer: int, experts: npt.NDArray[np.int_], spec: ExpertSpec) -> U64:
        """Where the parts of experts are mapped, [experts, parts]."""
        if layer not in self._parts:
            self._parts[layer] = self._part_addresses(self._table(layer), spec)
        return self._parts[layer][experts]

    @property
    def mapped(self) -> int:
        """Bytes of the page cache that may be in this process's memory now."""
        return len(self._used) * BLOCK

    def close(self) -> None:
        """Nothing may be computed from the parts any more."""
        for view in self._maps.values():
            if view is not None:
                view.close()
        self._maps.clear()
        self._used.clear()
        self._blocks.clear()
        self._pieces.clear()
        self._parts.clear()

    def _use(self, layer: int, expert: int) -> None:
        blocks = self._blocks.get((layer, expert))
        if blocks is None:
            pieces = self._table(layer)[expert].tolist()
            blocks = self._blocks[layer, expert] = [
                (fd, number)
                for fd, offset, length, _ in pieces
                for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1)
            ]
        for block in blocks:
            self._used[block] = None
            self._used.move_to_end(block)

    def _give_up(self, fd: int, start: int) -> None:
        """The page cache keeps them."""
        view = self._maps[fd]
        assert view is not None
        view.madvise(mmap.MADV_DONTNEED, start, min(BLOCK, len(view) - start))

    def _table(self, layer: int) -> Pieces:
        table = self._pieces[layer]
        assert table is not None
        return table

    def _map(self, layer: int) -> Pieces | None:
        """The layer's pieces, their files mapped; None where one cannot be."""
        experts = self.store.layers[layer].experts
        pieces = self.store.pieces(layer, range(experts)).reshape(experts, -1, 4)
        files = np.unique(pieces[:, :, FILE]).tolist()
        for fd in files:
            if fd not in self._maps:
                self._maps[fd] = _mapped(fd)
        if any(self._maps[fd] is None for fd in files):
            return None
        self._places = np.zeros((max(self._maps) + 1, 2), np.uint64)
        for fd, view in self._maps.items():
            if view is not None:
                self._places[fd] = np.frombuffer(view, np.uint8).ctypes.data, len(view)
        return pieces

    def _part_addresses(self, pieces: Pieces, spec: ExpertSpec) -> U64:
        starts = pieces[0, :, AT]
        addresses = np.empty((len(pieces), len(part_offsets(spec))), np.uint64)
        for number, offset in enumerate(part_offsets(spec).tolist()):
            # Pieces are in the order of their places in a record.
            piece = pieces[:, int(np.searchsorted(starts, offset, "right")) - 1]
            inside = piece[:, OFFSET] + offset - piece[:, AT]
            addresses[:, number] = self._places[piece[:, FILE], 0] + inside.astype(np.uint64)
        return addresses


def _mapped(fd: int) -> mmap.mmap | None:
    status = os.fstat(fd)
    if os.geteuid() != status.st_uid or not status.st_size:
        return None
    try:
        view = mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ)
    except OSError:
        return None
    # A fault is for a page that has just gone: its neighbours may still be there.
    view.madvise(mmap.MADV_RANDOM)
    return view
