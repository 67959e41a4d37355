"""The one door to mlx-lm: every name of it that we use, private ones and patches included.

mlx-lm brings seconds of imports, so each name is looked up when it is first needed. One that a
version no longer has is reported by name; tests/test_upstream.py checks all of them and what we
rely on them to do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from threading import get_ident
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from flash_moe.clock import part
from flash_moe.errors import Remedy, UnsupportedModel
from flash_moe.lean_import import own_file_limits, without_unused

Weights = dict[str, mx.array]
Operation = Callable[..., Any]
# From mlx-lm's own operation, which computes what the new one does not.
Replacement = Callable[[Operation], Operation]

GATED_DELTA = "mlx_lm.models.gated_delta"

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
    GATED_DELTA: ("gated_delta_ops",),
    "mlx_lm.models.qwen3_next": ("Qwen3NextSparseMoeBlock",),
    "mlx_lm.models.qwen3_moe": ("Qwen3MoeSparseMoeBlock",),
    "mlx_lm.models.qwen3_5": ("GatedDeltaNet",),
    "mlx_lm.models.qwen3_5_moe": ("Model", "ModelArgs"),
}


@cache
def get(module: str, name: str) -> Any:
    """A name of mlx-lm's, or UnsupportedModel that says which one is missing."""
    assert name in NAMES[module], f"{module}.{name} is not declared"
    try:
        with part("imports"), own_file_limits(), without_unused(module):
            return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedModel(
            f"mlx-lm {version('mlx-lm')} has no {module}.{name}, which this version of "
            "flash_moe needs. Install mlx-lm 0.32.2 or a newer flash_moe."
        ) from error


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
    classes: tuple[Callable[[Any], nn.Module], type]
    with part("imports"):
        classes = get("mlx_lm.utils", "_get_classes")(config)
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
def operations(
    attention: Replacement | None = None, gated_delta: Replacement | None = None
) -> Iterator[None]:
    """Inside, mlx-lm's models compute these, in this thread, by what is made of their own
    functions: attention, slow in MLX on a CPU, and the gated delta rule, slow in all but Metal."""
    get(GATED_DELTA, "gated_delta_ops")
    with ExitStack() as stack:
        for owner, name, replacement in (
            (mx.fast, "scaled_dot_product_attention", attention),
            (sys.modules[GATED_DELTA], "gated_delta_ops", gated_delta),
        ):
            if replacement is not None:
                stack.enter_context(_in_this_thread(owner, name, replacement))
        yield


@contextmanager
def _in_this_thread(owner: Any, name: str, replacement: Replacement) -> Iterator[None]:
    own, thread = getattr(owner, name), get_ident()
    made = replacement(own)

    def chosen(*args: Any, **options: Any) -> Any:
        return (made if get_ident() == thread else own)(*args, **options)

    setattr(owner, name, chosen)
    try:
        yield
    finally:
        setattr(owner, name, own)


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
    """Which parser mlx-lm takes for a chat template."""
    tokenizer = SimpleNamespace(chat_template=template, get_vocab=vocabulary)
    return get("mlx_lm.tokenizer_utils", "_infer_tool_parser")(tokenizer)


def tool_parser(name: str) -> Any:
    """The module with `tool_call_start`, `tool_call_end` and `parse_tool_call`, or
    UnsupportedModel."""
    try:
        with own_file_limits():
            return import_module(f"mlx_lm.tool_parsers.{name}")
    except ImportError as error:
        raise UnsupportedModel(
            f"This mlx-lm has no parser {name!r} for tool calls. A newer one may have it.",
            Remedy.UPGRADE_MLX_LM,
        ) from error
