"""How well a model predicts given tokens: log loss and perplexity, with teacher forcing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from flash_moe.decode.loop import SMALLEST_CHUNK, prefill_chunk
from flash_moe.evaluation.figures import Estimate, ratio
from flash_moe.evaluation.limits import DEFAULT_LIMITS, Limits
from flash_moe.model.load import StreamedModel

# Hears the log-probabilities [tokens, vocabulary] and the tokens that really came.
Observer = Callable[[mx.array, Sequence[int]], None]


@dataclass(slots=True)
class LogLoss:
    """Nats and tokens of each document, and the bytes that all the tokens stand for."""

    nats: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    nbytes: int = 0

    def add(self, nats: float, tokens: int, nbytes: int = 0) -> None:
        self.nats.append(nats)
        self.tokens.append(tokens)
        self.nbytes += nbytes

    def extend(self, other: LogLoss) -> None:
        self.nats += other.nats
        self.tokens += other.tokens
        self.nbytes += other.nbytes

    @property
    def perplexity(self) -> Estimate:
        """The exponential of the nats a token; infinity beyond what a float holds."""
        nats, error = ratio(self.nats, self.tokens)
        perplexity = math.inf if nats > 700 else math.exp(nats)
        return Estimate(perplexity, None if error is None else perplexity * error)

    @property
    def bits_per_byte(self) -> float | None:
        return sum(self.nats) / math.log(2) / self.nbytes if self.nbytes else None


def token_nats(
    model: StreamedModel,
    ids: Sequence[int],
    first: int,
    observers: Sequence[Observer] = (),
    limits: Limits = DEFAULT_LIMITS,
) -> float:
    """Nats of `ids[first:]`, each given all before it; `first` is 1 or more."""
    nats = 0.0
    for logits, targets in _logits(model, ids, first, limits):
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        places = mx.array(list(targets))[:, None]
        logprobs = mx.take_along_axis(log_probabilities, places, axis=-1)
        nats -= float(np.array(logprobs).sum(dtype=np.float64))
        for observer in observers:
            observer(log_probabilities, targets)
    return nats


def chunk_tokens(model: StreamedModel, limits: Limits = DEFAULT_LIMITS) -> int:
    """How many tokens go through the model together."""
    if limits.chunk_tokens is not None:
        return limits.chunk_tokens
    text = model.config.get("text_config", model.config)
    most = limits.chunk_logit_bytes // (4 * int(text.get("vocab_size") or 1))
    return min(prefill_chunk(model), max(SMALLEST_CHUNK, most))


def _logits(
    model: StreamedModel, ids: Sequence[int], first: int, limits: Limits
) -> Iterator[tuple[mx.array, Sequence[int]]]:
    """The logits for `ids[first:]`, a few rows at a time, each with its tokens.

    The tokens before go through the model in the same chunks: an expert that the end of a prompt
    and the beginning of a reply share is read once for both. Only where prompts use experts
    differently are they computed apart.
    """
    cache, chunk = model.make_cache(), chunk_tokens(model, limits)
    border = first - 1 if model.choice.needs_host else 0
    for start, end in _chunks(len(ids) - 1, chunk, border):
        # Predictions are those of a reply, so they are computed as one is.
        model.streamer.phase = "prompt" if end < first else "reply"
        tokens = mx.array(list(ids[start:end]))[None]
        if end < first:
            model.advance(tokens, cache)
        else:
            logits = model(tokens, cache=cache)[0]
            rows = max(1, limits.logit_bytes // (4 * logits.shape[-1]))
            for at in range(max(start, first - 1), end, rows):
                to = min(at + rows, end)
                yield logits[at - start : to - start].astype(mx.float32), ids[at + 1 : to + 1]
        mx.clear_cache()


def _chunks(total: int, chunk: int, border: int) -> Iterator[tuple[int, int]]:
    """Of `total` tokens, with none across the border."""
    for begin, stop in ((0, border), (border, total)):
        for start in range(begin, stop, chunk):
            yield start, min(start + chunk, stop)
