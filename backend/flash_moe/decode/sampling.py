"""How the next token is chosen. The mathematics is mlx-lm's; the random generator is the reply's
own, so that a seed gives the same reply whatever other replies are made beside it."""

from __future__ import annotations

import os
from typing import Any

import mlx.core as mx

from flash_moe import upstream
from flash_moe.options import Sampling


def used(sampling: Sampling) -> dict[str, Any]:
    """How tokens are chosen, for the statistics: without what changes nothing."""
    temperature = sampling.temperature or 0.0
    names = ["repetition_penalty", "presence_penalty", "frequency_penalty"]
    if temperature:
        names += ["top_p", "top_k", "min_p", "seed"]
    values = {name: getattr(sampling, name) for name in names}
    return {"temperature": temperature, **{n: v for n, v in values.items() if v is not None}}


class Sampler:
    """Chooses the tokens of one reply: log-probabilities [1, vocabulary] → token [1]."""

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = sampling.temperature or 0.0
        self._filters = upstream.token_filters(sampling.top_p, sampling.min_p, sampling.top_k)
        seed = sampling.seed
        self._key = mx.random.key(int.from_bytes(os.urandom(8)) if seed is None else seed)

    def __call__(self, log_probabilities: mx.array) -> mx.array:
        if not self._temperature:
            return mx.argmax(log_probabilities, axis=-1)
        for keep_likely in self._filters:
            log_probabilities = keep_likely(log_probabilities)
        # As MLX's own generator goes on, so that a seed means what it means in mlx-lm.
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(log_probabilities * (1 / self._temperature), key=key)
