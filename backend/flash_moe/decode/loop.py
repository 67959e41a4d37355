"""The loop that makes tokens.

mlx-lm's own loop computes one token ahead, which hides the latency of a GPU; with experts on disk
it would cost a whole token of reads before the first word, and another for nothing at the end. So
this one computes a token when it is wanted, and not before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from flash_moe import upstream
from flash_moe.callbacks import Cancelled, Progress, never, no_progress
from flash_moe.clock import part
from flash_moe.decode.constrained import ConstraintStepper
from flash_moe.decode.constraint import Constraint
from flash_moe.decode.loops import Loops
from flash_moe.decode.prefill import Begin, Prefill, from_cache
from flash_moe.decode.sampling import Sampler, used
from flash_moe.decode.statistics import Stats, StopWatch
from flash_moe.errors import FlashMoeError, OptionError, Remedy
from flash_moe.model.load import StreamedModel
from flash_moe.options import Phase, Sampling

# Every routed row of a chunk exists at once, in and out of the experts: 397B at bf16, K=10, has
# 0.3 MB a token. Larger chunks read fewer experts twice; 2048 is where mlx-lm stops, too.
CHUNK_BYTES = 96 << 20
LARGEST_CHUNK, SMALLEST_CHUNK = 2048, 16
# Without Metal, mlx-lm unrolls recurrent layers into a graph a token, 0.15 MB each; 2,000 tokens
# of a small model took 290 MB in one chunk, 90 MB in chunks of 512, at the same speed.
LARGEST_UNROLLED_CHUNK = 512


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What the loop needs of a request: the prompt in tokens, and how to go on from it."""

    prompt: Sequence[int]
    max_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    stop_loops: bool = True
    cancelled: Cancelled = never
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        if not self.prompt:
            raise OptionError("The prompt is empty: there is nothing to continue.")
        if self.max_tokens < 1:
            raise OptionError(f"max_tokens={self.max_tokens}: choose 1 or more.")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token, its log-probability, and the likeliest tokens with theirs, the best first. As the
    sampler was given them: after penalties and masks, before temperature and top-p."""

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


class Generation:
    """Tokens of one reply, computed as they are asked for. Iterate once, in the model's thread.

    `begin` says how the prompt is read; without it, all of it is, from an empty state.
    """

    def __init__(
        self,
        model: StreamedModel,
        request: TokenRequest,
        begin: Begin | None = None,
        chunk: int | None = None,
    ) -> None:
        model.require_known(request.prompt)
        self.stats = Stats(
            prompt_tokens=len(request.prompt),
            load_seconds=model.load_seconds,
            experts_per_token=model.plan.experts_per_token,
            bits=model.plan.bits,
            runtime=model.runtime.name,
            sampling=used(request.sampling),
        )
        # Of every token that was chosen, and not forced, if the request asks for them.
        self.logprobs: list[TokenLogprobs] = []
        self._model = model
        self._request = request
        self._begin = begin
        self._chunk = chunk or prefill_chunk(model)
        self._watch = StopWatch(model.streamer, self.stats)
        self._sample = Sampler(request.sampling)
        self._penalties = upstream.penalties(
            request.sampling.repetition_penalty,
            request.sampling.presence_penalty,
            request.sampling.frequency_penalty,
        )
        self._stepper = ConstraintStepper(request.constraint, self.stats)

    @property
    def allowed_masses(self) -> list[float]:
        """Of every token chosen under a mask: the probability that the mask allowed."""
        return self._stepper.allowed_masses

    def __iter__(self) -> Iterator[int]:
        # Here, so that what it takes to restore a state is part of the reply's time.
        with part("kept prompt"):
            begin = self._begin or from_cache(self._model.make_cache())
            prefill = begin(self._request.prompt, self._chunk)
        self.stats.cached_tokens = prefill.cached
        try:
            yield from self._timed(prefill)
        except GeneratorExit:  # enough was read, so the prompt may well be continued
            self._finish(prefill)
            raise
        self._finish(prefill)

    def _finish(self, prefill: Prefill) -> None:
        start = time.perf_counter()
        warning = prefill.finish()
        self.stats.warning = " ".join(filter(None, (self.stats.warning, warning)))
        self.stats.saving_seconds = time.perf_counter() - start

    def _timed(self, prefill: Prefill) -> Iterator[int]:
        try:
            yield from self._tokens(prefill)
        finally:
            self._watch.stop()

    def _tokens(self, prefill: Prefill) -> Iterator[int]:
        if not self._read_prompt(prefill):
            self.stats.finish_reason = "cancelled"
            return
        tokens, room = list(self._request.prompt), self._request.max_tokens
        computed, loops = prefill.computed, Loops()
        while room:
            if self._request.cancelled():
                self.stats.finish_reason = "cancelled"
                return
            # Tokens without an alternative wait for the next one that has some: they go through
            # the model together with it, and share the experts that are read.
            forced = self._stepper.forced(room)
            step = forced
            if not forced:
                if self._stepper.finished:
                    break
                token = self._next(tokens, computed, prefill.cache)
                computed = len(tokens)
                step = [token] if self._stepper.accept(token) else []
            for token in step:
                tokens.append(token)
                room -= 1
                self._watch.token()
                if token in self._request.stop_tokens:
                    self.stats.finish_reason = "stop"
                    return
                yield token
                # What a grammar leaves no choice about is not the model's doing.
                if loops.closed_by(token) and self._request.stop_loops and not forced:
                    self.stats.finish_reason = "loop"
                    return
        self.stats.finish_reason = "stop" if self._stepper.finished else "length"

    def _read_prompt(self, prefill: Prefill) -> bool:
        """Read the prompt chunk by chunk; False if that was cancelled."""
        prompt, start = self._request.prompt, prefill.cached
        self._model.streamer.phase = "prompt"
        for end in prefill.ends:
            if self._request.cancelled():
                return False
            self._request.progress(start, len(prompt))
            self._model.advance(mx.array(list(prompt[start:end]))[None], prefill.cache)
            prefill.reached(end, prefill.cache)
            mx.clear_cache()
            start = end
        self._request.progress(len(prompt), len(prompt))
        return True

    def _phase(self, computed: int) -> Phase:
        if computed < len(self._request.prompt):
            return "prompt"
        return "grammar" if self._stepper.holds else "reply"

    def _next(self, tokens: list[int], computed: int, cache: list[Any]) -> int:
        """The token after all of `tokens`, of which the first `computed` are in the cache."""
        self._model.streamer.phase = self._phase(computed)
        while len(tokens) - computed > self._chunk:
            part = tokens[computed : computed + self._chunk]
            self._model.advance(mx.array(part)[None], cache)
            computed += self._chunk
        logits = self._model(mx.array(tokens[computed:])[None], cache=cache)[:, -1, :]
        if self._penalties:
            history = mx.array(tokens)
            for penalize in self._penalties:
                logits = penalize(history, logits)
        logits = self._stepper.restrict(logits)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        log_probabilities = logits - total
        chosen = self._sample(log_probabilities)
        mx.eval(chosen, total)
        # A single logit that is no number makes the sum of all none.
        if not math.isfinite(cast(float, total.item())):
            raise FlashMoeError(
                f"The model computed something that is no number, {_first_fault(cache)}. Its files "
                "may be damaged, or what they hold is too large for 16 bits.",
                Remedy.VERIFY,
            )
        token = cast(int, chosen.item())
        if self._request.logprobs is not None:
            self.logprobs.append(_logprobs(log_probabilities[0], token, self._request.logprobs))
        return token


def _first_fault(cache: list[Any]) -> str:
    """Where it began, by what each layer's attention keeps of its input."""
    for number, layer in enumerate(cache):
        leaves: Any = tree_flatten(layer.state)
        arrays = [array for _, array in leaves if isinstance(array, mx.array)]
        if not all(mx.isfinite(array).all().item() for array in arrays):
            before = f"the experts of layer {number - 1}" if number else "the embedding"
            return f"in {before} or the attention of layer {number}"
    return f"in the experts of layer {len(cache) - 1} or after them"


def _logprobs(log_probabilities: mx.array, token: int, count: int) -> TokenLogprobs:
    values = np.array(log_probabilities.astype(mx.float32))
    best = np.argsort(-values, kind="stable")[:count]
    return TokenLogprobs(token, float(values[token]), [(int(i), float(values[i])) for i in best])


def prefill_chunk(model: StreamedModel) -> int:
    """Tokens a chunk so that its routed rows stay within CHUNK_BYTES."""
    layout = model.streamer.store.layers[0].layout
    first = next(part for part in layout.parts if part.param == "weight")
    last = next(part for part in reversed(layout.parts) if part.param == "weight")
    # Rows of the first projection are the inner width, rows of the last the model's.
    row = 4 * (2 * first.shape[0] + 3 * last.shape[0]) * model.plan.experts_per_token
    on_metal = mx.default_device() == mx.gpu and mx.metal.is_available()
    largest = LARGEST_CHUNK if on_metal else LARGEST_UNROLLED_CHUNK
    power_of_two = 1 << max(CHUNK_BYTES // row, 1).bit_length() - 1
    return max(SMALLEST_CHUNK, min(largest, power_of_two))
