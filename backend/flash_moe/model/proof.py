"""On a GPU, kernels prove themselves before they are used: each is compared with MLX's operations
on experts of this very model. One that does not compile, or gives something else, is left out, and
MLX computes in its place.

What has passed is remembered for this GPU, this MLX, these shaders and the way that they are
launched. The first time takes some milliseconds, and what MLX's own kernels need to compile.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe import upstream
from flash_moe.arrays import mlx_dtype
from flash_moe.errors import FlashMoeError
from flash_moe.kernels import gpu, shaders
from flash_moe.kernels.gpu_operations import GpuGatedDelta
from flash_moe.kernels.interface import Shared
from flash_moe.kernels.shaders import GpuKind
from flash_moe.kernels.spec import ExpertSpec
from flash_moe.model.families import linear_attention
from flash_moe.model.mixture import Mixture
from flash_moe.native.build import cache_folder
from flash_moe.stream.streamed import StreamedLayer, StreamedSwitch
from flash_moe.upstream import Replacement

# Of the largest value: 16 bits and NVIDIA's 11-bit factors come to 1e-2, a wrong kernel to 1.
TOLERANCE = 0.05
# Tokens, and experts of each: of a reply, and of a prompt, where tokens share an expert; on Metal,
# MLX computes those of longer ones.
SIZES = ((1, 4), (7, 2))

LAUNCHERS = ("backends", "cuda_build", "gated_delta", "gpu", "gpu_operations")

log = logging.getLogger(__name__)


class NothingToCompare(Exception):
    """MLX itself cannot compute it here."""


Compare = Callable[[], list[tuple[mx.array, mx.array]]]


def prove(
    model: nn.Module,
    make_cache: Callable[[], list[Any]],
    operations: dict[str, Replacement],
    kind: GpuKind,
) -> list[str]:
    """Leaves out what fails, also of the operations of mlx-lm's that our kernels compute; the names
    of what was left out."""
    modules = [module for _, module in model.named_modules()]
    layers = [module.layer for module in modules if isinstance(module, StreamedSwitch)]
    mixtures = [module for module in modules if isinstance(module, Mixture)]
    failed = []
    for spec in dict.fromkeys(layer.spec for layer in layers if layer.spec is not None):
        alike = [layer for layer in layers if layer.spec == spec]
        if not _passes(("experts", spec), lambda: _experts(alike[0])):  # noqa: B023
            failed.append("experts")
            alike[0].streamer.bank.forget()
            for layer in alike:
                layer.spec = None
    fused = [mixture for mixture in mixtures if mixture.fused]
    if fused and not _passes(("router", *_router_key(fused[0])), lambda: _router(fused[0])):
        failed.append("the router")
        for mixture in fused:
            mixture.fused = False
    for mixture in mixtures:
        mixture.fused = mixture.fused and mixture.layer.spec is not None
    attention = [module for module in modules if linear_attention.is_fused(module)]
    if (attention or "gated_delta" in operations) and not (
        _passes(("rule",), lambda: _rule(kind)) and _layer_passes(attention, make_cache)
    ):
        failed.append("linear attention")
        operations.pop("gated_delta", None)
        for module in attention:
            linear_attention.unfuse(module)
    return list(dict.fromkeys(failed))


def _layer_passes(attention: list[nn.Module], make_cache: Callable[[], list[Any]]) -> bool:
    """All of a model's layers of linear attention are alike."""
    if not attention:
        return True
    key = ("linear attention", *_attention_key(attention[0]))
    return _passes(key, lambda: _attention(attention[0], make_cache))


def explain(failed: list[str]) -> str | None:
    """For the user."""
    if not failed:
        return None
    return (
        f"Our kernels for {' and '.join(failed)} do not compute what MLX {version('mlx')} computes "
        f"on this GPU ({_device()}). They are left out, which is slower. Please report it."
    )


def _passes(key: tuple[Any, ...], compare: Compare) -> bool:
    folder = cache_folder()
    mark = folder / f"proven-{_digest(key)}" if folder else None
    if mark is not None and mark.exists():
        return True
    try:
        for got, want in compare():
            _require_close(got, want)
    except FlashMoeError:  # of the disk: nothing is said about kernels
        raise
    except NothingToCompare as error:
        log.warning("kernels for %s are not proven: %s", key[0], error)
        return True
    except Exception as error:
        # A compiler's errors have no type of their own.
        log.warning("kernels for %s: %s", key[0], error)
        return False
    if mark is not None:
        with suppress(OSError):  # then it is compared again at the next start
            mark.touch()
    return True


@contextmanager
def _by_mlx() -> Iterator[None]:
    """What MLX cannot compute on this GPU says nothing about our kernels."""
    try:
        yield
    except FlashMoeError:
        raise
    except Exception as error:
        raise NothingToCompare(str(error)) from error


def _require_close(got: mx.array, want: mx.array) -> None:
    got, want = got.astype(mx.float32), want.astype(mx.float32)
    largest = mx.maximum(mx.abs(want).max(), 1e-6)
    off = np.array(mx.abs(got - want).max() / largest).item()
    if not off <= TOLERANCE:  # also where it is no number
        raise ValueError(f"off by {off:.2g} of the largest value")


def _experts(layer: StreamedLayer) -> list[tuple[mx.array, mx.array]]:
    spec = layer.spec
    assert spec is not None
    pairs, rng = [], np.random.default_rng(0)
    count = layer.streamer.store.layers[layer.number].experts
    for tokens, k in SIZES:
        chosen = np.tile(np.arange(min(k, count), dtype=np.uint32), (tokens, 1))
        x = _random(rng, (tokens, spec.hidden), mlx_dtype(spec.gate.scale_type))
        weights = mx.full(chosen.shape, 1 / chosen.shape[1])
        gate = _random(rng, (tokens, 1), x.dtype)
        got = layer.mixture(x, chosen, weights, Shared(x, gate))
        mx.eval(got)
        with _without_kernels(layer), _by_mlx():
            rows = layer.experts(x, mx.array(chosen)).astype(mx.float32)
            want = (rows * weights[..., None]).sum(axis=-2) + mx.sigmoid(gate) * x
            mx.eval(want)
        pairs.append((got, want))
    return pairs


@contextmanager
def _without_kernels(layer: StreamedLayer) -> Iterator[None]:
    spec, layer.spec = layer.spec, None
    try:
        yield
    finally:
        layer.spec = spec


def _router_key(mixture: Mixture) -> tuple[Any, ...]:
    experts = mixture.streamer.store.layers[mixture.layer.number].experts
    choice = mixture.choice
    return experts, choice.ranked, choice.router_renormalises, _spec_type(mixture)


def _router(mixture: Mixture) -> list[tuple[mx.array, mx.array]]:
    experts, ranked, renormalise, dtype = _router_key(mixture)
    kernels = mixture.streamer.kernels
    assert kernels is not None
    # Those that count are apart by more than 16 bits round: their order is certain.
    ladder = np.maximum(8 - np.tile(np.arange(experts, dtype=np.float32), (3, 1)) / 4, -8)
    logits = mx.array(np.random.default_rng(0).permuted(ladder, axis=1)).astype(dtype)
    ids, weights = kernels.route(logits, ranked, renormalise, ranked)
    odds = mx.softmax(logits.astype(mx.float32), axis=-1)
    order = mx.argsort(-odds, axis=-1)[:, :ranked]
    want = mx.take_along_axis(odds, order, axis=-1)
    if renormalise:
        want = want / want.sum(axis=-1, keepdims=True)
    return [(ids, order), (weights, want)]


def _attention(
    module: nn.Module, make_cache: Callable[[], list[Any]]
) -> list[tuple[mx.array, mx.array]]:
    """The same token twice: the second time there is a state, which knows it."""
    rng = np.random.default_rng(0)
    rows = [_random(rng, (1, 1, module.hidden_size), module.conv1d.weight.dtype)] * 2

    def run(call: Callable[..., mx.array]) -> list[mx.array]:
        cache = next(cache for cache in make_cache() if hasattr(cache, "lengths"))
        got = [*(call(x, None, cache) for x in rows), cache[0], cache[1]]
        mx.eval(got)
        return got

    got = run(module)
    with _by_mlx():
        want = run(linear_attention.own_call(module))
    return list(zip(got, want, strict=True))


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def _spec_type(mixture: Mixture) -> mx.Dtype:
    spec: ExpertSpec | None = mixture.layer.spec
    return mx.float32 if spec is None else mlx_dtype(spec.gate.scale_type)


def _attention_key(module: nn.Module) -> tuple[Any, ...]:
    weight = module.conv1d.weight
    heads = (module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim)
    return (*heads, weight.shape, weight.dtype, module.dt_bias.dtype)


def _rule(kind: GpuKind) -> list[tuple[mx.array, mx.array]]:
    """The gated delta rule as mlx-lm calls it: a prompt, and a token after it."""
    rng, own = np.random.default_rng(0), upstream.get(upstream.GATED_DELTA, "gated_delta_ops")
    ours, results = GpuGatedDelta(own, kind), []
    state, expected, key = None, None, None
    for tokens in (5, 1):
        sizes = ((1, tokens, 2, 64), (1, tokens, 2, 64), (1, tokens, 4, 40))
        q, k, v = (_random(rng, size, mx.bfloat16) / 8 for size in sizes)
        # Equal keys: what was said before must be taken off.
        k = mx.broadcast_to(key, k.shape) if key is not None else k[:, :1] + mx.zeros_like(k)
        key = k[:, :1]
        g, beta = (mx.sigmoid(_random(rng, (1, tokens, 4), mx.float32)) for _ in "12")
        rows, state = ours(q, k, v, g, beta, state)
        mx.eval(rows, state)
        with _by_mlx():
            want, expected = own(q, k, v, g, beta, expected)
            mx.eval(want, expected)
        results += [(rows, want), (state, expected)]
    return results


def _device() -> str:
    info = mx.device_info(mx.default_device())
    return str(info.get("device_name", info.get("architecture", "unknown")))


def _digest(key: tuple[Any, ...]) -> str:
    texts = [
        shaders.text(path.name)
        for path in sorted(shaders.folder().iterdir())
        if path.suffix in (".metal", ".h")
    ]
    # How they are launched, and with which constants.
    kernels = [Path(gpu.__file__).with_name(f"{name}.py") for name in LAUNCHERS]
    texts += [path.read_text("utf-8") for path in (*kernels, Path(linear_attention.__file__))]
    made = repr((key, version("mlx"), _device(), texts))
    return hashlib.sha256(made.encode()).hexdigest()[:24]
