"""What becomes of every byte of a repository's weights, known before one is fetched.

Shards are read one after the other, each from its beginning to its end, because a hash covers it
in that order. A byte is a *piece* of an expert, which goes into its record at once; or it is
*kept*, in the sparse copy of its shard, until it is needed: weights that are no expert's, and the
scales and biases that a transform takes beside the codes; or it is only hashed, because the model
has no use for it. What a piece needs and has not come yet is fetched ahead of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from flash_moe.checkpoint.locations import ExpertLayer, Run
from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.errors import NotContiguous, Remedy, UnsupportedModel
from flash_moe.format.layout import Layout
from flash_moe.format.safetensors import Tensor
from flash_moe.pack.files import packed_layout
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pull import spans
from flash_moe.pull.spans import Batch, Piece, Position, Span, Use, grouped, parts

# After so many bytes everything is synced and the journal is written. What a kill costs.
CHECKPOINT_BYTES = 256 << 20
# A transform takes this of an expert as it comes, and the projection's other parts from the copy.
STREAMED = "weight"


NOTHING: frozenset[str] = frozenset()


@dataclass(slots=True)
class Route:
    """`shards` in the order they are fetched. `needs`: the tensors that a projection of a layer
    takes beside its codes. `release`: where such a tensor has been used for the last time."""

    shards: list[str]
    layers: list[ExpertLayer]
    layouts: list[Layout]
    transform: ExpertTransform | None
    resident: dict[str, frozenset[str]]
    tensors: dict[str, Tensor]
    pieces: dict[str, list[Piece]] = field(default_factory=dict)
    needs: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)
    release: dict[str, Position] = field(default_factory=dict)
    # The first and the last shard that has something of a layer.
    extent: list[tuple[int, int]] = field(default_factory=list)
    # Where the first piece of each layer ends.
    first_piece: list[Position] = field(default_factory=list)
    _by_shard: dict[str, list[Tensor]] = field(default_factory=dict)
    _kept: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, skeleton: Skeleton, transform: ExpertTransform | None) -> Route:
        """UnsupportedModel for a checkpoint that must lie on disk whole to be packed."""
        try:
            layers = skeleton.layers()
            resident = skeleton.resident_sources()
        except NotContiguous as error:
            raise _must_be_whole(
                f"the experts of this {skeleton.folder.architecture} are not stored one by one"
            ) from error
        route = cls(
            shards=sorted({tensor.file.name for tensor in skeleton.folder.tensors.values()}),
            layers=layers,
            layouts=[packed_layout(skeleton, layer.path, transform) for layer in layers],
            transform=transform,
            resident=resident,
            tensors=skeleton.folder.tensors,
        )
        route._sort_tensors()
        route._find_pieces()
        return route

    def size(self, shard: str) -> int:
        last = self._by_shard[shard][-1]
        return last.offset + last.nbytes

    def header_bytes(self, shard: str) -> int:
        return self._by_shard[shard][0].offset

    def number(self, shard: str) -> int:
        return self.shards.index(shard)

    @property
    def kept_bytes(self) -> int:
        """Of weights that are no expert's, as they are in the repository."""
        names = frozenset().union(*self.resident.values())
        return sum(self.tensors[name].nbytes for name in names)

    def batches(
        self, number: int, start: int, ahead: set[str], done: frozenset[int] = frozenset()
    ) -> Iterator[Batch]:
        """The rest of a shard, from a byte on, with what is to be fetched ahead in between.

        `ahead` has the tensors that were fetched so, and gets those that now are; layers in `done`
        have their records."""
        shard = self.shards[number]
        group: list[Span] = []
        for span in self._spans(shard, start):
            here = span.use is Use.HEADER
            if span.use is Use.KEPT:
                tensor = self._tensor_at(shard, span.start)
                here = tensor.name in ahead
            if span.piece is not None and span.piece.layer in done:
                span = span._replace(use=Use.UNUSED, piece=None)
            waits = self._missing(span, (number, span.start), ahead)
            full = group and group[-1].end - group[0].start >= spans.BATCH_BYTES
            if group and (here or waits or full):
                yield grouped(shard, group)
                group = []
            for name in waits:
                yield from self._ahead(name)
                ahead.add(name)
            if here:
                yield Batch(shard, span.start, span.end, [span], here=True)
            else:
                group.append(span)
        if group:
            yield grouped(shard, group)

    def fetch_bytes(self, number: int = 0, start: int = 0, ahead: frozenset[str] = NOTHING) -> int:
        """What comes over the network from a position on."""
        names, total = set(ahead), 0
        for later in range(number, len(self.shards)):
            batches = self.batches(later, start if later == number else 0, names)
            total += sum(batch.nbytes for batch in batches if not batch.here)
        return total

    def side_peak(self) -> int:
        """The most that tensors kept only for pieces ever take together."""
        names, alive, most, since = set[str](), dict[str, int](), 0, 0
        for number, shard in enumerate(self.shards):
            for batch in self.batches(number, 0, names):
                since += batch.nbytes
                for span in batch.spans:
                    if span.use is Use.KEPT and not batch.here:
                        name = self._tensor_at(batch.shard, span.start).name
                        if name in self.release:
                            alive[name] = alive.get(name, 0) + span.end - span.start
                most = max(most, sum(alive.values()))
                if since >= CHECKPOINT_BYTES or batch.end == self.size(shard):
                    since = 0
                    position = (number, 0 if batch.ahead is not None else batch.end)
                    for name in self.unneeded(position, alive.keys()):
                        del alive[name]
        return most

    def place(self, layer: int, part: int, expert: int) -> tuple[str, int]:
        """The shard and the offset of one part of one expert."""
        return _place(self.layers[layer].runs[part], expert)

    def unneeded(self, position: Position, names: Iterable[str]) -> list[str]:
        """Of tensors kept for pieces, those that nothing after a position asks for."""
        return [name for name in names if self.release[name] <= position]

    # -- made once ---------------------------------------------------------------------------------

    def _sort_tensors(self) -> None:
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            self._by_shard.setdefault(tensor.file.name, []).append(tensor)
        self._kept = set[str]().union(*self.resident.values())

    def _find_pieces(self) -> None:
        pieces: dict[str, list[Piece]] = {shard: [] for shard in self.shards}
        sides: dict[str, Position] = {}
        for number, layer in enumerate(self.layers):
            extent: set[int] = set()
            # One run for each part, because nothing is packed yet.
            for index, (part, run) in enumerate(zip(layer.layout.parts, layer.runs, strict=True)):
                streamed = self.transform is None or part.param == STREAMED
                for expert in range(layer.experts):
                    shard, at = _place(run, expert)
                    extent.add(self.number(shard))
                    if streamed:
                        pieces[shard].append(Piece(at, at + part.nbytes, number, expert, index))
                    else:
                        name = self._tensor_at(shard, at).name
                        key = number, part.projection
                        if name not in self.needs.get(key, ()):
                            self.needs[key] = (*self.needs.get(key, ()), name)
                        sides[name] = (0, 0)
            self.extent.append((min(extent), max(extent)))
        self._kept |= sides.keys()
        for shard, found in pieces.items():
            found.sort()
            self._check_pieces(shard, found)
        self.pieces = pieces
        first: dict[int, Position] = {}
        for number, shard in enumerate(self.shards):
            for piece in pieces[shard]:
                first.setdefault(piece.layer, (number, piece.end))
        self.first_piece = [first[layer] for layer in range(len(self.layers))]
        self.release = self._last_uses(sides)

    def _check_pieces(self, shard: str, pieces: list[Piece]) -> None:
        """No byte has two uses: pieces do not overlap, and nothing else is made of them."""
        end = 0
        for piece in pieces:
            if piece.start < end:
                raise _must_be_whole("two experts share bytes")
            end = piece.end
            tensor = self._tensor_at(shard, piece.start)
            if tensor.name in self._kept:
                raise _must_be_whole(f"{tensor.name!r} serves as an expert and as something else")
            if piece.end > tensor.offset + tensor.nbytes:
                raise _must_be_whole(f"{tensor.name!r} ends within an expert")

    def _last_uses(self, sides: dict[str, Position]) -> dict[str, Position]:
        """Of tensors that nothing but pieces needs."""
        resident = set[str]().union(*self.resident.values())
        last = {name: position for name, position in sides.items() if name not in resident}
        for name in last:
            tensor = self.tensors[name]
            own = self.number(tensor.file.name), tensor.offset + tensor.nbytes
            last[name] = own
        for number, shard in enumerate(self.shards):
            for piece in self.pieces[shard]:
                part = self.layers[piece.layer].layout.parts[piece.part]
                for name in self.needs.get((piece.layer, part.projection), ()):
                    if name in last:
                        last[name] = max(last[name], (number, piece.end))
        return last

    # -- asked again and again ---------------------------------------------------------------------

    def _spans(self, shard: str, start: int) -> Iterator[Span]:
        """A shard from a byte on; kept and unused bytes in parts of a batch at most."""
        tensors = self._by_shard[shard]
        first = tensors[0].offset
        if start < first:
            yield Span(start, first, Use.HEADER)
        pieces = self.pieces[shard]
        at = bisect_right(pieces, start, key=lambda piece: piece.end)
        for tensor in tensors:
            end = tensor.offset + tensor.nbytes
            if end <= start:
                continue
            use = Use.KEPT if tensor.name in self._kept else Use.UNUSED
            here = max(start, tensor.offset)
            while at < len(pieces) and pieces[at].start < end:
                piece = pieces[at]
                yield from parts(here, piece.start, use)
                yield Span(piece.start, piece.end, Use.PIECE, piece)
                here, at = piece.end, at + 1
            yield from parts(here, end, use)

    def _missing(self, span: Span, position: Position, ahead: set[str]) -> list[str]:
        """What a piece needs and is not there: neither passed already nor fetched ahead."""
        if span.piece is None:
            return []
        part = self.layers[span.piece.layer].layout.parts[span.piece.part]
        return [
            name
            for name in self.needs.get((span.piece.layer, part.projection), ())
            if name not in ahead and not self.is_passed(name, position)
        ]

    def is_passed(self, name: str, position: Position) -> bool:
        tensor = self.tensors[name]
        end = self.number(tensor.file.name), tensor.offset + tensor.nbytes
        return end <= position

    def _ahead(self, name: str) -> Iterator[Batch]:
        tensor = self.tensors[name]
        end = tensor.offset + tensor.nbytes
        for span in parts(tensor.offset, end, Use.KEPT):
            finished = name if span.end == end else ""
            yield Batch(tensor.file.name, span.start, span.end, [span], ahead=finished)

    def _tensor_at(self, shard: str, offset: int) -> Tensor:
        tensors = self._by_shard[shard]
        # Empty tensors lie where the next one begins: the last that begins here has the bytes.
        return tensors[bisect_right(tensors, offset, key=lambda tensor: tensor.offset) - 1]


def _place(run: Run, expert: int) -> tuple[str, int]:
    if run.files:
        return run.files[expert].name, run.offsets[expert]
    return run.file.name, run.base + expert * run.step


def _must_be_whole(why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"This checkpoint cannot be packed while it arrives: {why}. Download it whole, then pack "
        "its folder.",
        Remedy.DOWNLOAD_AND_PACK,
    )
