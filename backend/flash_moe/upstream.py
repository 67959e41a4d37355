"""The one door to mlx-lm: every name of it that we use, private ones and patches included.

mlx-lm brings seconds of imports, so each name is looked up when it is first needed. One that a
version no longer has is reported by name; tests/test_upstream.py checks all of them and what we
rely on them to do.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_moe.errors import Remedy, UnsupportedModel

Weights = dict[str, mx.array]

# Less than the likeliest of a million tokens has at least, so that it alone is left, as by any
# smaller share. One that is 0 in float32 makes mlx-lm read beyond the end of the logits.
LEAST_TOP_P = 1e-6

# Module → names. The private ones have no public equivalent in mlx-lm 0.32.
NAMES: dict[str, tuple[str, ...]] = {
    "mlx_lm.utils": ("load_model", "_get_classes", "_encode_tagged_floats"),
    "mlx_lm.tokenizer_utils": ("_infer_tool_parser",),
    "mlx_lm.sample_utils": (
        "apply_top_p",
        "apply_min_p",
        "apply_top_k",
        "make_logits_processors",
    ),
    "mlx_lm.models.cache": ("make_prompt_cache", "KVCache", "ChunkedKVCache"),
    "mlx_lm.models.switch_layers": (
        "SwitchGLU",
        "SwitchMLP",
        "SwiGLU",
        "SwitchLinear",
        "QuantizedSwitchLinear",
    ),
    "mlx_lm.models.qwen3_next": ("Qwen3NextSparseMoeBlock",),
    "mlx_lm.models.qwen3_moe": ("Qwen3MoeSparseMoeBlock",),
    "mlx_lm.models.qwen3_5_moe": ("Model", "ModelArgs"),
}


@cache
def get(module: str, name: str) -> Any:
    """A name of mlx-lm's, or UnsupportedModel that says which one is missing."""
    assert name in NAMES[module], f"{module}.{name} is not declared"
    try:
        with _own_file_limits(), _without_transformers(module):
            return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModel(
            f"mlx-lm {version('mlx-lm')} has no {module}.{name}, which this version of "
            "flash_moe needs. Install mlx-lm 0.32.2 or a newer flash_moe."
        ) from error


class _Package(ModuleType):
    """mlx_lm, whose own code runs when one of its names is first asked for."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec.loader.exec_module(self)
        return getattr(self, name)


@contextmanager
def _without_transformers(module: str) -> Iterator[None]:
    """mlx_lm and mlx_lm.utils import it for tokenizers, which we do not have from them: 0.17 s
    instead of 0.75. Who asks them for a tokenizer still gets one."""
    package, tokenizers = "mlx_lm", "mlx_lm.tokenizer_utils"
    if module == tokenizers or tokenizers in sys.modules:
        yield
        return
    if package not in sys.modules and (spec := find_spec(package)):
        sys.modules[package] = module_from_spec(spec)
        sys.modules[package].__class__ = _Package
    later = ModuleType(tokenizers)
    vars(later).update(
        TokenizerWrapper=Any,  # which mlx_lm.utils has in annotations alone
        load=lambda *args, **options: import_module(tokenizers).load(*args, **options),
    )
    sys.modules[tokenizers] = later
    try:
        yield
    finally:
        if sys.modules.get(tokenizers) is later:
            del sys.modules[tokenizers]


# -- building models ------------------------------------------------------------------------------


def load_model_lazily(
    path: Path, config: dict[str, Any], classes: Callable[..., Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's loader, with `classes` in the place of its own lookup; no weight is read."""
    model, config = get("mlx_lm.utils", "load_model")(
        path, lazy=True, model_config=config, get_model_classes=classes
    )
    return model, config


def model_classes(config: dict[str, Any]) -> tuple[Callable[[Any], nn.Module], type]:
    classes: tuple[Callable[[Any], nn.Module], type] = get("mlx_lm.utils", "_get_classes")(config)
    return classes


def encoded_config(config: dict[str, Any]) -> dict[str, Any]:
    """As mlx-lm writes config.json: infinities as tagged texts."""
    encoded: dict[str, Any] = get("mlx_lm.utils", "_encode_tagged_floats")(config)
    return encoded


@contextmanager
def without_contiguous() -> Iterator[None]:
    """`mx.contiguous` does nothing inside: it cannot be exported, and moves no bytes that a trace
    of `sanitize` looks for. Process-wide, so for one thread and briefly."""
    contiguous = mx.contiguous
    mx.contiguous = lambda array, *_, **__: array
    try:
        yield
    finally:
        mx.contiguous = contiguous


@contextmanager
def _own_file_limits() -> Iterator[None]:
    """mlx_lm.utils sets the limits of open files to (2048, 4096) when imported, the hard one for
    good. Within, it can only raise the soft one, which checkpoints of many files need on a Mac."""

    def raise_soft_limit(kind: int, limits: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(kind)
        most = limits[0] if hard == resource.RLIM_INFINITY else min(limits[0], hard)
        if soft != resource.RLIM_INFINITY and soft < most:
            setrlimit(kind, (most, hard))

    setrlimit = resource.setrlimit
    resource.setrlimit = raise_soft_limit
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


# -- modules --------------------------------------------------------------------------------------


def switch_types() -> tuple[type, ...]:
    """Layers that hold all routed experts of a block."""
    return tuple(get("mlx_lm.models.switch_layers", n) for n in ("SwitchGLU", "SwitchMLP"))


def projection_types() -> tuple[type, ...]:
    names = ("SwitchLinear", "QuantizedSwitchLinear")
    return tuple(get("mlx_lm.models.switch_layers", name) for name in names)


@cache
def plain_projections() -> tuple[type, type]:
    """SwitchLinear, and one whose output is laid out afresh.

    The sum with an expert's bias may leave a stride of 1 on the axis between pair and row, and a
    sorted `mx.gather_mm` takes its rows to lie that far apart: all but the first of an expert are
    wrong (MLX 0.32.4 on CUDA; ml-explore/mlx#4253). `mx.contiguous` sees nothing to mend."""
    plain = get("mlx_lm.models.switch_layers", "SwitchLinear")

    def call(self: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        rows: mx.array = plain.__call__(self, x, indices, sorted_indices)
        return rows.flatten().reshape(rows.shape)

    return plain, type("BiasedSwitchLinear", (plain,), {"__call__": call})


def swiglu_types() -> tuple[type, type]:
    """SwitchGLU, and the activation that makes it down(silu(gate) * up)."""
    module = "mlx_lm.models.switch_layers"
    return get(module, "SwitchGLU"), get(module, "SwiGLU")


# -- running --------------------------------------------------------------------------------------


def make_cache(model: nn.Module) -> list[Any]:
    """A new conversation's state, one object a layer."""
    made: list[Any] = get("mlx_lm.models.cache", "make_prompt_cache")(model)
    return made


def cache_types() -> tuple[type, type]:
    """KVCache and ChunkedKVCache, which allocate keys and values ahead of their use."""
    return get("mlx_lm.models.cache", "KVCache"), get("mlx_lm.models.cache", "ChunkedKVCache")


def token_filters(
    top_p: float | None, min_p: float | None, top_k: int | None
) -> list[Callable[[mx.array], mx.array]]:
    """Of log-probabilities, in mlx-lm's order."""
    filters: list[Callable[[mx.array], mx.array]] = []
    module = "mlx_lm.sample_utils"
    if top_p and top_p < 1:
        share = max(top_p, LEAST_TOP_P)
        filters.append(lambda logprobs: get(module, "apply_top_p")(logprobs, share))
    if min_p:
        filters.append(lambda logprobs: get(module, "apply_min_p")(logprobs, min_p, 1))
    if top_k:
        # mlx-lm refuses a k that leaves nothing out.
        filters.append(
            lambda logprobs: (
                get(module, "apply_top_k")(logprobs, top_k)
                if top_k < logprobs.shape[-1]
                else logprobs
            )
        )
    return filters


def penalties(
    repetition: float | None, presence: float | None, frequency: float | None
) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """Functions of (tokens so far, logits)."""
    if not (repetition or presence or frequency):
        return []
    made: list[Callable[[mx.array, mx.array], mx.array]] = get(
        "mlx_lm.sample_utils", "make_logits_processors"
    )(
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
    )
    return made


# -- tool calls -----------------------------------------------------------------------------------


def tool_parser_name(template: str | None, vocabulary: Callable[[], Mapping[str, int]]) -> Any:
    """Which parser mlx-lm takes for a chat template. Brings in transformers."""
    tokenizer = SimpleNamespace(chat_template=template, get_vocab=vocabulary)
    return get("mlx_lm.tokenizer_utils", "_infer_tool_parser")(tokenizer)


def tool_parser(name: str) -> Any:
    """The module with `tool_call_start`, `tool_call_end` and `parse_tool_call`, or
    UnsupportedModel."""
    try:
        with _own_file_limits():
            return import_module(f"mlx_lm.tool_parsers.{name}")
    except ImportError as error:
        raise UnsupportedModel(
            f"This mlx-lm has no parser {name!r} for tool calls. A newer one may have it.",
            Remedy.UPGRADE_MLX_LM,
        ) from error
