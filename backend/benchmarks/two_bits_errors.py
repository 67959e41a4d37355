"""How far packs are off: root mean squares of weights, of experts and of whole mixtures, relative
to the model as it comes, on the inputs that this has when it reads held-out text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.built_in import HELD_OUT
from flash_moe.engine import Engine
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.format.layout import AFFINE, PLANE_BITS
from flash_moe.model.mixture import Mixture
from flash_moe.options import Settings

TOKENS = 2048


def errors(source: Path, path: Path, settings: dict[str, Any]) -> dict[str, float | None]:
    """Of the model in `path`, and the bytes that a token reads of it."""
    # Where precision depends on the rank, weights have no error of their own.
    plain = not settings.get("full_experts")
    engine = Engine.load(path, Settings(**settings), prefix=None)
    sums = np.zeros((3, 2))
    for (x, ids, outputs, mixed), mixture in zip(inputs(source), mixtures(engine), strict=True):
        rank = np.arange(ids.shape[1])
        full = None
        if "full_experts" in settings:
            full = np.broadcast_to(rank < settings["full_experts"], ids.shape)
        experts = mixture.layer.experts(x, mx.array(ids), full)
        sums[0] += _squares(np.array(experts.astype(mx.float32)), outputs)
        sums[1] += _squares(_routed(mixture, x), mixed)
    if plain:
        own = Engine.load(source, Settings(), prefix=None)
        for ours, theirs in zip(weights(engine), weights(own), strict=True):
            sums[2] += _squares(ours, theirs)
        own.close()
    bytes_read = _bytes_read(engine, settings)
    engine.close()
    expert, mixture_error, matrices = np.sqrt(sums[:, 0] / np.maximum(sums[:, 1], 1e-300))
    return {
        "bytes": bytes_read,
        "weights": matrices if plain else None,
        "expert": expert,
        "mixture": mixture_error,
    }


def _bytes_read(engine: Engine, settings: dict[str, Any]) -> int:
    """A token, without the unused ends of the records' last pages."""
    k, total = engine.plan.experts_per_token, 0
    full = min(settings.get("full_experts", k), k)
    for layer in engine.model.streamer.store.layers:
        parts = layer.layout.parts
        first = sum(part.nbytes for part in parts if not part.in_second_plane)
        total += k * first + full * (sum(part.nbytes for part in parts) - first)
    return total


@cache
def inputs(source: Path) -> list[tuple[mx.array, Any, Any, Any]]:
    """For each layer of the model as it comes, reading held-out text: what goes in, the experts
    that are chosen, the output of each of them, and their weighted sum."""
    engine = Engine.load(source, Settings(), prefix=None)
    ids: list[int] = []
    for text in read_held_out(HELD_OUT, ("text",)).texts:
        ids += engine.tokenizer.encode(text.text)[:128]
    seen = _mixture_inputs(engine, ids[:TOKENS])
    layers = []
    for x, mixture in zip(seen, mixtures(engine), strict=True):
        odds = np.array(mixture.gate(x).astype(mx.float32))
        experts = np.argsort(-odds, axis=1)[:, : engine.plan.experts_per_token]
        outputs = mixture.layer.experts(x, mx.array(experts)).astype(mx.float32)
        layers.append((x, experts, np.array(outputs), _routed(mixture, x)))
    engine.close()
    return layers


def _mixture_inputs(engine: Engine, ids: list[int]) -> list[mx.array]:
    seen: list[mx.array] = []
    own = Mixture.__call__

    def observed(self: Mixture, x: mx.array) -> mx.array:
        seen.append(x.reshape(-1, x.shape[-1]))
        return own(self, x)

    Mixture.__call__ = observed  # type: ignore[method-assign]
    try:
        mx.eval(engine.model(mx.array(ids)[None], cache=engine.model.make_cache()))
    finally:
        Mixture.__call__ = own  # type: ignore[method-assign]
    return seen


def mixtures(engine: Engine) -> list[Mixture]:
    return [m for _, m in engine.model.model.named_modules() if isinstance(m, Mixture)]


def _routed(mixture: Mixture, x: mx.array) -> Any:
    """The weighted sum of the routed experts, without the shared one."""
    shared, output = mixture.shared(x), mixture(x)
    if shared.output is not None and shared.gate is not None:
        output = output - mx.sigmoid(shared.gate) * shared.output
    return np.array(output.astype(mx.float32))


def weights(engine: Engine) -> Iterator[Any]:
    """All expert matrices, one after the other."""
    streamer = engine.model.streamer
    for number, layer in enumerate(streamer.store.layers):
        for expert in range(layer.experts):
            arrays = streamer.load(number, [expert]).arrays(layer.layout)
            for name, packing in layer.layout.quantization:
                assert packing is not None
                codes, scales, biases = (arrays[f"{name}.{part}"][0] for part in AFFINE)
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
                bits = PLANE_BITS if layer.layout.two_planes else packing.bits
                yield np.array(mx.dequantize(codes, scales, biases, packing.group_size, bits))


def _squares(values: Any, right: Any) -> Any:
    """The squared error, and the square, summed."""
    wide = right.astype(np.float64)
    return np.array([((values - wide) ** 2).sum(), (wide**2).sum()])
