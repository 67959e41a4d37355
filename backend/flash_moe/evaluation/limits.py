"""How much an evaluation computes at once, and how long texts and replies may be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Figures depend on `window` and `max_tokens`; the others only bound memory.

    `window` is how many tokens of a text are predicted in a row before the context starts anew,
    `max_tokens` the length at which a reply is cut off. `chunk_tokens` is how many tokens go
    through the model together; None: as many as their logits leave room for.
    """

    window: int = 1024
    # A right reply is far shorter; a random model never stops.
    max_tokens: int = 256
    # Logits of a chunk, in float32: 256 tokens of the 397B. Smaller chunks would reread experts.
    chunk_logit_bytes: int = 256 << 20
    # Of those, what is turned into log-probabilities at once.
    logit_bytes: int = 16 << 20
    chunk_tokens: int | None = None


DEFAULT_LIMITS = Limits()
