"""Conversations as bare token ids, and what a reply to one was, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from flash_moe.decode.loop import Generation
from flash_moe.model.load import StreamedModel
from flash_moe.prefix.boundaries import Marks
from flash_moe.prefix.state import Snapshot
from flash_moe.prefix.store import PrefixSettings, PrefixStore

# A turn opens with 1 2 or 1 3 and ends with 4; both marks share a token, as in ChatML.
MARKS = Marks(assistant=(1, 2), user=(1, 3))
# Few words, some of them parts of marks, so that there are false openings and repetitions.
words = st.integers(1, 9) | st.integers(1, 99)


@st.composite
def conversations(draw: st.DrawFn, longest: int = 70) -> list[list[int]]:
    """The prompts of a chat, each the one before it with a reply and a question more; now and then
    something earlier is told differently, as when a template drops old thoughts."""
    said = draw(st.lists(words, max_size=longest))
    prompts = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0 and said:
            said = list(said)
            said[draw(st.integers(0, len(said) - 1))] = draw(words)
        said = [*said, 1, 3, *draw(st.lists(words, max_size=longest)), 4]
        prompts.append([*said, 1, 2, *draw(st.sampled_from([[], [7], [7, 8]]))])
        said = [*said, 1, 2, *draw(st.lists(words, max_size=longest)), 4]
    return prompts


@dataclass(frozen=True, slots=True)
class Reply:
    tokens: list[int]
    cached: int
    logits: list[bytes]
    warning: str


def reply(
    model: StreamedModel, store: PrefixStore | None, prompt: Sequence[int], chunk: int
) -> Reply:
    logits = []

    def greedy(log_probabilities: mx.array) -> mx.array:
        logits.append(np.array(log_probabilities.astype(mx.float32)).tobytes())
        return mx.argmax(log_probabilities, axis=-1)

    begin = None if store is None else store.begin
    generation = Generation(model, prompt, max_tokens=3, chunk=chunk, begin=begin)
    generation._sample = greedy
    tokens = list(generation)
    return Reply(tokens, generation.stats.cached_tokens, logits, generation.stats.warning)


def new_store(model: StreamedModel, **settings: Any) -> PrefixStore:
    return PrefixStore(model, MARKS, PrefixSettings(**settings))


def kept(store: PrefixStore) -> dict[str, Snapshot]:
    return dict(store._memory._snapshots)


def bits(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def contents(snapshot: Snapshot) -> tuple[Any, ...]:
    """All that a snapshot holds, copied out of MLX."""
    arrays = [(array.shape, array.dtype, bits(array)) for array in snapshot.arrays]
    return snapshot.tokens, snapshot.ends, repr(snapshot.structure), arrays
