"""How well a model foresees given words: perplexity, teacher-forced.

Sums over tokens; the standard error is over documents, because the tokens of one are not
independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.decode.loop import SMALLEST_CHUNK, prefill_chunk
from flash_moe.evaluation.figures import finite, ratio
from flash_moe.model.load import StreamedModel

WINDOW = 1024
# Logits of a chunk, in float32: 256 tokens of the 397B. Fewer at once would read experts again.
CHUNK_LOGIT_BYTES = 256 << 20
# As many of them are looked at together.
LOGIT_BYTES = 16 << 20

# Told of log-probabilities [tokens, words], and of the tokens that came.
Watch = Callable[[mx.array, Sequence[int]], None]


@dataclass(slots=True)
class Surprise:
    """Nats and tokens, a document each; and the bytes that the tokens stand for."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nbytes: int = 0

    def add(self, nats: float, tokens: int, nbytes: int = 0) -> None:
        self.nats.append(nats)
        self.tokens.append(tokens)
        self.nbytes += nbytes

    @property
    def mean(self) -> float:
        """Nats a token."""
        return ratio(self.nats, self.tokens)[0]

    @property
    def perplexity(self) -> float:
        return _exp(self.mean)

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity."""
        _, error = ratio(self.nats, self.tokens)
        return None if error is None else self.perplexity * error

    def to_json(self) -> dict[str, Any]:
        found = {
            "perplexity": finite(self.perplexity),
            "standard_error": finite(self.standard_error),
            "documents": len(self.nats),
            "tokens": sum(self.tokens),
        }
        if self.nbytes:
            found["bits_per_byte"] = finite(sum(self.nats) / math.log(2) / self.nbytes)
            found["bytes"] = self.nbytes
        return found


def text_nats(
    model: StreamedModel, tokenizer: ChatTokenizer, text: str, watch: Watch | None = None
) -> tuple[float, int, int]:
    """Nats, tokens and bytes of all of a text but its first token, which nothing leads to.

    Windows share one token: the last of one is where the next begins, so none is left out.
    """
    encoded = tokenizer.tokenizer.encode(text)
    ids: list[int] = encoded.ids
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        nats += token_nats(model, ids[start : start + WINDOW + 1], 1, watch)
    if len(ids) < 2:
        return 0.0, 0, 0
    return nats, len(ids) - 1, len(text[encoded.offsets[1][0] :].encode())


def token_nats(
    model: StreamedModel, ids: Sequence[int], first: int, watch: Watch | None = None
) -> float:
    """Nats of `ids[first:]`, each given all before it; `first` is 1 or more."""
    nats = 0.0
    for logits, targets in _logits(model, ids, first):
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        chosen = mx.take_along_axis(log_probabilities, mx.array(list(targets))[:, None], axis=-1)
        nats -= float(np.array(chosen).sum(dtype=np.float64))
        if watch is not None:
            watch(log_probabilities, targets)
    return nats


def _logits(
    model: StreamedModel, ids: Sequence[int], first: int
) -> Iterator[tuple[mx.array, Sequence[int]]]:
    """What is said about `ids[first:]`, a few at a time, and what they are.

    All before goes through the model in the same chunks: an expert that a prompt's end and the
    reply's beginning share is read once for both. Unless they are to use experts differently.
    """
    cache, chunk, choice = model.make_cache(), _chunk(model), model.plan.choice
    apart = choice is not None and choice.needs_host
    for start, end in _chunks(len(ids) - 1, chunk, first - 1 if apart else 0):
        # What is foreseen is what a reply would say, so it is computed as one is.
        model.streamer.occasion = "prompt" if end < first else "reply"
        tokens = mx.array(list(ids[start:end]))[None]
        if end < first:
            model.advance(tokens, cache)
        else:
            logits = model(tokens, cache=cache)[0]
            rows = max(1, LOGIT_BYTES // (4 * logits.shape[-1]))
            for at in range(max(start, first - 1), end, rows):
                to = min(at + rows, end)
                yield logits[at - start : to - start].astype(mx.float32), ids[at + 1 : to + 1]
        mx.clear_cache()


def _chunks(total: int, chunk: int, border: int) -> Iterator[tuple[int, int]]:
    """Of `total` tokens, with none across the border."""
    for begin, stop in ((0, border), (border, total)):
        for start in range(begin, stop, chunk):
            yield start, min(start + chunk, stop)


def _chunk(model: StreamedModel) -> int:
    text = model.config.get("text_config", model.config)
    most = CHUNK_LOGIT_BYTES // (4 * int(text.get("vocab_size") or 1))
    return min(prefill_chunk(model), max(SMALLEST_CHUNK, most))


def _exp(nats: float) -> float:
    # Beyond this there is no such number.
    return math.inf if nats > 700 else math.exp(nats)
