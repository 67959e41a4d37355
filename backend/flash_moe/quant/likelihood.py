"""How well a model foresees given words: perplexity, teacher-forced.

Sums over tokens; the standard error is over documents, because the tokens of one are not
independent of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.model.decode import prefill_chunk
from flash_moe.model.load import StreamedModel

WINDOW = 1024
# Logits at once, in float32. Of 1,024 tokens of the 397B they would be 1 GB.
LOGIT_BYTES = 64 << 20


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
        return sum(self.nats) / max(sum(self.tokens), 1)

    @property
    def perplexity(self) -> float:
        return _exp(self.mean)

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity: of a ratio of sums over documents, each weighing as it is long."""
        documents = len(self.nats)
        if documents < 2 or not sum(self.tokens):
            return None
        pairs = zip(self.nats, self.tokens, strict=True)
        squares = sum((nats - self.mean * tokens) ** 2 for nats, tokens in pairs)
        mean_tokens = sum(self.tokens) / documents
        error = math.sqrt(squares / (documents * (documents - 1))) / mean_tokens
        return self.perplexity * error

    def to_json(self) -> dict[str, Any]:
        found = {
            "perplexity": _finite(self.perplexity),
            "standard_error": _finite(self.standard_error),
            "documents": len(self.nats),
            "tokens": sum(self.tokens),
        }
        if self.nbytes:
            found["bits_per_byte"] = _finite(sum(self.nats) / math.log(2) / self.nbytes)
            found["bytes"] = self.nbytes
        return found


def text_nats(model: StreamedModel, tokenizer: ChatTokenizer, text: str) -> tuple[float, int, int]:
    """Nats, tokens and bytes of all of a text but its first token, which nothing leads to.

    Windows share one token: the last of one is where the next begins, so none is left out.
    """
    encoded = tokenizer.tokenizer.encode(text)
    ids: list[int] = encoded.ids
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        nats += token_nats(model, tokenizer, ids[start : start + WINDOW + 1], 1)
    if len(ids) < 2:
        return 0.0, 0, 0
    return nats, len(ids) - 1, len(text[encoded.offsets[1][0] :].encode())


def token_nats(model: StreamedModel, tokenizer: ChatTokenizer, ids: list[int], first: int) -> float:
    """Nats of `ids[first:]`, each given all before it; `first` is 1 or more."""
    cache, chunk = model.make_cache(), prefill_chunk(model)
    for start in range(0, first - 1, chunk):
        model.advance(mx.array(ids[start : min(start + chunk, first - 1)])[None], cache)
        mx.clear_cache()
    words = tokenizer.tokenizer.get_vocab_size()
    step = min(chunk, max(1, LOGIT_BYTES // (4 * words)))
    nats = 0.0
    for start in range(first - 1, len(ids) - 1, step):
        end = min(start + step, len(ids) - 1)
        logits = model(mx.array(ids[start:end])[None], cache=cache)[0].astype(mx.float32)
        targets = mx.array(ids[start + 1 : end + 1])[:, None]
        chosen = mx.take_along_axis(logits, targets, axis=-1)[:, 0]
        surprise: Any = (mx.logsumexp(logits, axis=-1) - chosen).sum().item()
        nats += surprise
        mx.clear_cache()
    return nats


def _finite(value: float | None) -> float | None:
    """JSON has no word for what a broken model gives."""
    return value if value is not None and math.isfinite(value) else None


def _exp(nats: float) -> float:
    # Beyond this there is no such number.
    return math.inf if nats > 700 else math.exp(nats)
