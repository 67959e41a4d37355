"""Which experts a token uses: what preferring cached ones costs, and saves.

    python backend/benchmarks/choices.py PACK [--texts 12] [--dialogues 4] [--tokens 384]

The held-out texts and right replies of the built-in model are computed token by token, as in a
reply, with a page cache that is held to a quarter of the experts: one that was not used lately is
really dropped from it (POSIX_FADV_DONTNEED, so on Linux), and an expert counts as read from the
disk if the system says that it is not cached when it is needed. PACK is `llm flash-moe pack` of the
built-in model: records that begin on pages can be dropped one by one.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from flash_moe.built_in import HELD_OUT
from flash_moe.engine import Engine
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.replies import right_reply
from flash_moe.kernels.spec import U32
from flash_moe.options import Settings
from flash_moe.stream.residency import Residency


class SmallCache:
    """A page cache with room for `room` experts of each layer, the most recently used ones."""

    def __init__(self, engine: Engine, room: int) -> None:
        self._streamer = engine.model.streamer
        self._residency = Residency(self._streamer.store)
        self._used = [OrderedDict[int, None]() for _ in self._streamer.store.layers]
        self._room = room
        self.used = self.missed = 0
        for number in range(len(self._used)):
            ((file, *_),) = self._streamer.store.pieces(number, [0]).tolist()
            os.fsync(file)  # what is not written yet is not dropped
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        self._streamer.observer = self._use

    def _use(self, layer: int, experts: U32) -> None:
        """Called before the experts are read; what is dropped was read by an earlier call."""
        used = self._used[layer]
        for expert in np.unique(experts).tolist():
            if self._streamer.phase == "reply":
                self.used += 1
                self.missed += not self._residency.cached(layer, expert)
            used[expert] = None
            used.move_to_end(expert)
        while len(used) > self._room:
            self._drop(layer, used.popitem(last=False)[0])

    def _drop(self, layer: int, expert: int) -> None:
        for file, offset, length, _ in self._streamer.store.pieces(layer, [expert]).tolist():
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_DONTNEED)


def documents(engine: Engine, options: argparse.Namespace) -> Iterator[tuple[str, list[int], int]]:
    """What is predicted: the ids of texts, and of right replies after their prompts."""
    held_out = read_held_out(HELD_OUT)
    for text in held_out.texts[: options.texts]:
        yield "texts", engine.tokenizer.encode(text.text)[: options.tokens], 1
    seen: dict[str, int] = {}
    for dialogue in held_out.dialogues:
        seen[dialogue.kind] = seen.get(dialogue.kind, 0) + 1
        if seen[dialogue.kind] <= options.dialogues:
            prompt, reply, *_ = right_reply(engine.tokenizer, dialogue)
            yield "replies", [*prompt, *reply], len(prompt)


def nats(engine: Engine, ids: list[int], first: int) -> float:
    """Of ids[first:], token by token."""
    model, cache, total = engine.model, engine.model.make_cache(), 0.0
    model.streamer.phase = "prompt"
    if first > 1:
        model.advance(mx.array(ids[: first - 1])[None], cache)
    model.streamer.phase = "reply"
    for at in range(first, len(ids)):
        logits = model(mx.array([[ids[at - 1]]]), cache=cache)[0, 0].astype(mx.float32)
        total += cast(float, (mx.logsumexp(logits) - logits[ids[at]]).item())
    return total


def measure(path: Path, options: argparse.Namespace, settings: Settings) -> None:
    engine = Engine.load(path, settings, prefix=None)
    cache = SmallCache(engine, engine.plan.experts // 4)
    sums: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for kind, ids, first in documents(engine, options):
        sums[kind] = sums.get(kind, 0.0) + nats(engine, ids, first)
        tokens[kind] = tokens.get(kind, 0) + len(ids) - first
    perplexities = {kind: math.exp(sums[kind] / tokens[kind]) for kind in sums}
    engine.close()
    print(
        f"| K={settings.experts}, cache_tolerance {settings.cache_tolerance or 0} | {cache.used} "
        f"| {cache.missed} | {perplexities['texts']:.2f} | {perplexities['replies']:.4f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("pack", type=Path)
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--dialogues", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=384)
    options = parser.parse_args()
    print("| settings | experts used | from the disk | texts | right replies |")
    print("|---|--:|--:|--:|--:|")
    for experts in (10, 4):
        for tolerance in (None, 0.1, 0.2, 0.3, 0.5):
            settings = Settings(experts=experts, cache_tolerance=tolerance)
            measure(options.pack, options, settings)


if __name__ == "__main__":
    main()
