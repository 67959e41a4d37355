"""Let the weights of a repository through: every byte hashed, and put where it belongs.

Nothing counts before the hash of its shard agrees with the repository's. Until then records lie
under a temporary name, and the journal says from where to go on; a shard that disagrees is fetched
again, with all that was made with its help. A layer whose shards agree is sealed: its checksums are
written, and it takes its place in the pack.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from flash_moe.callbacks import Advance, Notice
from flash_moe.errors import FetchFailed, Remedy
from flash_moe.format.atomic import write_at
from flash_moe.pack.records import TransformedRecords, array_of
from flash_moe.pack.transform import Arrays
from flash_moe.pull.journal import PULL, Journal
from flash_moe.pull.layers import Layers
from flash_moe.pull.ranges import Ranges
from flash_moe.pull.repository import RemoteFile
from flash_moe.pull.route import CHECKPOINT_BYTES, Route
from flash_moe.pull.running_hash import RunningHash
from flash_moe.pull.shadow import Shadow
from flash_moe.pull.spans import Batch, Piece, Use
from flash_moe.pull.stream import Segment, stream

# A shard that disagrees so often is wrong where it comes from.
MOST_FAILURES = 2


class _Hash(Protocol):
    @property
    def state(self) -> str | None: ...
    def update(self, data: memoryview) -> None: ...
    def hexdigest(self) -> str: ...


class _Disagrees(Exception):
    pass


class GitHash:
    """Of a file that is not in large-file storage. Those are small, and begun again."""

    state = None

    def __init__(self, size: int) -> None:
        self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


@dataclass(slots=True)
class Receiver:
    """For one thread; `receive` once."""

    workspace: Path
    shadow: Shadow
    route: Route
    ranges: Ranges
    progress: Advance
    notice: Notice
    journal: Journal = field(init=False)
    _files: dict[str, RemoteFile] = field(init=False)
    _records: dict[int, TransformedRecords] = field(default_factory=dict)
    _layers: Layers = field(init=False)
    _failed: dict[int, int] = field(default_factory=dict)
    _ahead: set[str] = field(default_factory=set)
    _sides: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.journal = Journal.read(self.workspace)
        self._layers = Layers(self.workspace, self.route)
        self._files = {file.name: file for file in self.ranges.repository.weights}

    def receive(self) -> None:
        self._ahead = set(self.journal.ahead)
        self._sides = set(self.route.release)
        with closing(self._layers), ThreadPoolExecutor(1) as hasher:
            self._layers.require((self.journal.shard, self.journal.offset))
            self._layers.seal(self.journal.shard)
            if self.journal.offset and RunningHash.resumed(self.journal.hash) is None:
                # Another library's state: the shard begins anew, and what its pieces took from
                # earlier shards may have been given back.
                self._go_back()
            while self.journal.shard < len(self.route.shards):
                try:
                    self._receive_shard(hasher)
                except _Disagrees:
                    self._again()
                self._layers.seal(self.journal.shard)
            self._layers.wait()
            self._layers.require_all()

    # -- a shard -----------------------------------------------------------------------------------

    def _receive_shard(self, hasher: ThreadPoolExecutor) -> None:
        number = self.journal.shard
        shard = self.route.shards[number]
        file = self._files[shard]
        running, start = self._hash(file)
        batches = list(self.route.batches(number, start, set(self._ahead), self._layers.sealed()))
        arriving = stream(
            self.ranges,
            (Segment(self._files[b.shard], b.start, b.end) for b in batches if not b.here),
        )
        # Where everything is in its place, and the hash of so much: one thing, so that Ctrl-C
        # cannot come in between.
        reached, since = (start, running.state), 0
        try:
            for batch in batches:
                if batch.here:
                    data = memoryview(self.shadow.read(batch.shard, batch.start, batch.end))
                else:
                    data = memoryview(next(arriving).buffer)
                if batch.ahead is not None:
                    self._use(batch, data)
                    self._ahead |= {batch.ahead} - {""}
                else:
                    hashing = hasher.submit(running.update, data)
                    try:
                        self._use(batch, data)
                    finally:
                        hashing.result()
                    reached = (batch.end, running.state)
                if not batch.here:
                    self.progress(batch.nbytes)
                since += batch.nbytes
                if since >= CHECKPOINT_BYTES:
                    self._checkpoint(number, *reached)
                    since = 0
            if running.hexdigest() != (file.sha256 or file.blob):
                raise _Disagrees
            self._checkpoint(number + 1, 0, None)
        except (Exception, KeyboardInterrupt) as error:
            # All that has arrived is kept, unless the disk is full, or it is not what it should be.
            if not isinstance(error, _Disagrees | OSError):
                self._checkpoint(number, *reached)
            raise
        finally:
            arriving.close()

    def _hash(self, file: RemoteFile) -> tuple[_Hash, int]:
        """Where to begin with a shard: where it was left, if its hash can go on from there."""
        if file.sha256 is None:
            return GitHash(file.size), 0
        resumed = RunningHash.resumed(self.journal.hash) if self.journal.offset else None
        return (RunningHash(), 0) if resumed is None else (resumed, self.journal.offset)

    def _use(self, batch: Batch, data: memoryview) -> None:
        for span in batch.spans:
            part = data[span.start - batch.start : span.end - batch.start]
            if span.use is Use.KEPT and not batch.here:
                self.shadow.write(batch.shard, part, span.start)
            elif span.piece is not None:
                self._take(span.piece, part)

    def _take(self, piece: Piece, data: memoryview) -> None:
        layer = self.route.layers[piece.layer]
        part = layer.layout.parts[piece.part]
        fd = self._layers.descriptor(piece.layer)
        if self.route.transform is None:
            write_at(fd, data, piece.expert * layer.layout.stride + part.offset)
        else:
            arrays = {part.param: array_of(data, part), **self._beside(piece)}
            self._transformed(piece.layer).write(fd, piece.expert, part.projection, arrays)

    def _beside(self, piece: Piece) -> Arrays:
        """The other parts of a projection of an expert."""
        layer = self.route.layers[piece.layer]
        projection = layer.layout.parts[piece.part].projection
        arrays = {}
        for index, part in enumerate(layer.layout.parts):
            if part.projection == projection and index != piece.part:
                shard, at = self.route.place(piece.layer, index, piece.expert)
                data = self.shadow.read(shard, at, at + part.nbytes)
                arrays[part.param] = array_of(memoryview(data), part)
        return arrays

    def _transformed(self, number: int) -> TransformedRecords:
        if number not in self._records:
            layer, transform = self.route.layers[number], self.route.transform
            assert transform is not None
            self._records[number] = TransformedRecords(layer.layout, layer.path, transform)
        return self._records[number]

    # -- what is written down ----------------------------------------------------------------------

    def _checkpoint(self, shard: int, offset: int, state: str | None) -> None:
        """Everything up to a position is on the disk, and after that the journal that says so."""
        if offset and state is None:
            offset = 0
        self._layers.sync()
        self.shadow.sync()
        unneeded = self.route.unneeded((shard, offset), self._sides)
        self._ahead -= set(unneeded)
        self.journal = Journal(shard, offset, state, sorted(self._ahead))
        self.journal.write(self.workspace)
        for name in unneeded:
            tensor = self.route.tensors[name]
            self.shadow.punch(tensor.file.name, tensor.offset, tensor.offset + tensor.nbytes)
        self._sides -= set(unneeded)

    def _again(self) -> None:
        """A shard disagrees: fetch it again, with all that was made with its help."""
        number = self.journal.shard
        failed = self._failed[number] = self._failed.get(number, 0) + 1
        self._go_back()
        name = self.route.shards[number]
        self._require_header(name)
        if failed >= MOST_FAILURES:
            raise FetchFailed(
                f"{name} differs from the hash that {self.ranges.repository.name} states, "
                f"{failed} times. Nothing of it was used. Try again later."
            )
        self.notice(f"{name} did not arrive as the repository states; fetching it again")

    def _go_back(self) -> None:
        """To where the first layer begins that has something of this shard and no seal."""
        self._layers.wait()
        number, sealed = self.journal.shard, self._layers.sealed()
        begun = [
            first
            for layer, (first, _) in enumerate(self.route.extent)
            if first <= number and layer not in sealed
        ]
        self._ahead, self._sides = set(), set(self.route.release)
        self.journal = Journal(min([number, *begun]))
        self.journal.write(self.workspace)

    def _require_header(self, shard: str) -> None:
        """All was planned by headers, which no hash covers alone. If one is not what it was,
        nothing that was made of it counts."""
        end = self.route.header_bytes(shard)
        again = bytearray(end)
        self.ranges.fill(self._files[shard], 0, memoryview(again))
        if again != self.shadow.read(shard, 0, end):
            (self.workspace / PULL).unlink()
            raise FetchFailed(
                f"The header of {shard} arrived damaged, so nothing made by it was used.",
                Remedy.PULL_AGAIN,
            )
