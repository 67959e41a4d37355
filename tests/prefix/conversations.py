"""Conversations as bare token ids, and replies to them, to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import strategies as st

from flash_moe.decode.loop import Generation, TokenLogprobs, TokenRequest
from flash_moe.model.load import StreamedModel
from flash_moe.prefix.boundaries import TurnMarks
from flash_moe.prefix.state import Snapshot
from flash_moe.prefix.store import PrefixSettings, PrefixStore

# A turn opens with 1 2 or 1 3 and ends with 4; both marks share a token, as in ChatML.
MARKS = TurnMarks(assistant=(1, 2), user=(1, 3))
# Few words, some of them parts of marks, so that false openings and repetitions occur.
words = st.integers(1, 9) | st.integers(1, 99)
# More than any vocabulary here: the log-probabilities of all tokens.
EVERY_TOKEN = 1 << 20


@st.composite
def conversations(draw: st.DrawFn, longest: int = 70) -> list[list[int]]:
    """The prompts of a chat, each the one before it with a reply and another question; now and then
    something earlier is different, as when a template drops old thoughts."""
    history = draw(st.lists(words, max_size=longest))
    prompts = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 3)) == 0 and history:
            history = list(history)
            history[draw(st.integers(0, len(history) - 1))] = draw(words)
        history = [*history, 1, 3, *draw(st.lists(words, max_size=longest)), 4]
        prompts.append([*history, 1, 2, *draw(st.sampled_from([[], [7], [7, 8]]))])
        history = [*history, 1, 2, *draw(st.lists(words, max_size=longest)), 4]
    return prompts


@dataclass(frozen=True, slots=True)
class Reply:
    """`logprobs` are those of every token in the vocabulary, at every step."""

    tokens: list[int]
    cached: int
    logprobs: list[TokenLogprobs]
    warning: str


def generation(
    model: StreamedModel,
    store: PrefixStore | None,
    prompt: Sequence[int],
    chunk: int | None = None,
    **options: Any,
) -> Generation:
    begin = None if store is None else store.begin
    return Generation(model, TokenRequest(prompt, **options), begin, chunk)


def reply(
    model: StreamedModel, store: PrefixStore | None, prompt: Sequence[int], chunk: int
) -> Reply:
    run = generation(model, store, prompt, chunk, max_tokens=3, logprobs=EVERY_TOKEN)
    tokens = list(run)
    assert len(run.logprobs) == len(tokens)
    return Reply(tokens, run.stats.cached_tokens, run.logprobs, run.stats.warning)


def new_store(model: StreamedModel, **settings: Any) -> PrefixStore:
    return PrefixStore(model, MARKS, PrefixSettings(**settings))


def bits(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def contents(snapshot: Snapshot) -> tuple[Any, ...]:
    """Everything in a snapshot, copied out of MLX."""
    arrays = [(array.shape, array.dtype, bits(array)) for array in snapshot.arrays]
    return snapshot.tokens, snapshot.ends, repr(snapshot.structure), arrays
