"""Which experts a token uses: what skipping light ones and preferring cached ones cost, and save.

    python backend/benchmarks/choices.py PACK [--texts 12] [--dialogues 4] [--tokens 384]

The held-out texts and right replies of the built-in model, word by word as in a reply, by a page
cache that is held to a quarter of the experts: an expert that was not used lately is dropped from
it for real (POSIX_FADV_DONTNEED, so on Linux), and an expert counts as read from the disk if the
system says that it is not cached when it is wanted. PACK is `llm flash-moe pack` of the built-in
model: records on borders of pages can be dropped one by one.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from flash_moe.built_in import HELD_OUT
from flash_moe.engine import Engine
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.replies import expected
from flash_moe.kernels.gpu import U32
from flash_moe.model.load import Settings
from flash_moe.stream.residency import Residency


class SmallCache:
    """A page cache with room for `room` experts of each layer, the last ones that were used."""

    def __init__(self, engine: Engine, room: int) -> None:
        self._streamer = engine.model.streamer
        self._residency = Residency(self._streamer.store)
        self._used = [OrderedDict[int, None]() for _ in self._streamer.store.layers]
        self._room = room
        self.wanted = self.missed = 0
        for number in range(len(self._used)):
            (segment,) = self._streamer.store.segments(number, 0)
            os.fsync(segment.fd)  # what is not written yet is not dropped
            # Random, or the system would read ahead, and keep large pieces.
            os.posix_fadvise(segment.fd, 0, 0, os.POSIX_FADV_RANDOM)
            os.posix_fadvise(segment.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self._streamer.watch = self._use

    def _use(self, layer: int, chosen: U32) -> None:
        """Called before the experts are read; what falls out was read by an earlier call."""
        used = self._used[layer]
        for expert in np.unique(chosen).tolist():
            if self._streamer.occasion == "reply":
                self.wanted += 1
                self.missed += not self._residency.cached(layer, expert)
            used[expert] = None
            used.move_to_end(expert)
        while len(used) > self._room:
            self._drop(layer, used.popitem(last=False)[0])

    def _drop(self, layer: int, expert: int) -> None:
        for segment in self._streamer.store.segments(layer, expert):
            os.posix_fadvise(segment.fd, segment.offset, segment.length, os.POSIX_FADV_DONTNEED)


def documents(engine: Engine, options: argparse.Namespace) -> Iterator[tuple[str, list[int], int]]:
    """What is foreseen: texts, and right replies after their prompts."""
    held_out = read_held_out(HELD_OUT, ("text", "questions", "json", "tools"), None)
    for text in held_out.texts[: options.texts]:
        yield "texts", engine.tokenizer.encode(text.text)[: options.tokens], 1
    seen: dict[str, int] = {}
    for dialogue in held_out.dialogues:
        seen[dialogue.kind] = seen.get(dialogue.kind, 0) + 1
        if seen[dialogue.kind] <= options.dialogues:
            prompt, reply, *_ = expected(engine, dialogue)
            yield "replies", [*prompt, *reply], len(prompt)


def nats(engine: Engine, ids: list[int], first: int) -> float:
    """Of ids[first:], token by token."""
    model, cache, total = engine.model, engine.model.make_cache(), 0.0
    model.streamer.occasion = "prompt"
    if first > 1:
        model.advance(mx.array(ids[: first - 1])[None], cache)
    model.streamer.occasion = "reply"
    for at in range(first, len(ids)):
        logits = model(mx.array([[ids[at - 1]]]), cache=cache)[0, 0].astype(mx.float32)
        total += float((mx.logsumexp(logits) - logits[ids[at]]).item())
    return total


def measure(path: Path, options: argparse.Namespace, **settings: float | int) -> None:
    engine = Engine.load(path, Settings(**settings), prefix=None)  # type: ignore[arg-type]
    room = engine.model.plan.experts // 4
    cache = SmallCache(engine, room)
    sums: dict[str, list[float]] = {}
    for kind, ids, first in documents(engine, options):
        found = sums.setdefault(kind, [0.0, 0])
        found[0] += nats(engine, ids, first)
        found[1] += len(ids) - first
    perplexities = {kind: math.exp(nats / tokens) for kind, (nats, tokens) in sums.items()}
    engine.close()
    print(
        f"| {settings} | {cache.wanted} | {cache.missed} | {perplexities['texts']:.2f} "
        f"| {perplexities['replies']:.4f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pack", type=Path)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--dialogues", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=384)
    options = parser.parse_args()
    print("| settings | experts used | read from the disk | texts | right replies |")
    print("|---|--:|--:|--:|--:|")
    for experts in (10, 4):
        measure(options.pack, options, experts=experts)
        for value in (0.1, 0.2, 0.3, 0.5):
            measure(options.pack, options, experts=experts, prefer_cached=value)
        for value in (0.03, 0.06, 0.1):
            measure(options.pack, options, experts=experts, skip_below=value)


if __name__ == "__main__":
    main()
