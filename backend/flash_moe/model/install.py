"""What of mlx-lm's model our kernels take over, beside the streamed experts.

By exact type everywhere: a subclass may compute something else.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flash_moe.checkpoint.switches import parameters, set_module
from flash_moe.errors import UnsupportedModel
from flash_moe.kernels.gpu import MAX_CHOSEN, MAX_EXPERTS
from flash_moe.kernels.native import load_native
from flash_moe.kernels.runtime import Runtime
from flash_moe.model.mixture import PlainMixture, StreamedMixture
from flash_moe.model.native_linear import NativeLinear, multiplies
from flash_moe.stream.choice import Choice
from flash_moe.stream.streamed import StreamedSwitch, Streamer

NARROWEST = 128


def take_over(model: nn.Module, streamer: Streamer, runtime: Runtime, choice: Choice) -> None:
    """Replace modules of a model whose switch layers are streamed already; all still lazy. A choice
    that is the model's own leaves mlx-lm's block alone where no kernel computes it."""
    for path, module in list(model.named_modules()):
        if _is_block(module) and module.switch_mlp.fused and _fits(module, choice):
            set_module(model, path, StreamedMixture(module, streamer, choice))
        elif _is_block(module) and (choice.needs_host or choice.routed > choice.k):
            set_module(model, path, PlainMixture(module, streamer, choice))
        elif runtime.name == "native" and type(module) is nn.QuantizedLinear and multiplies(module):
            set_module(model, path, NativeLinear(module, load_native()))
    if runtime.widen:
        _widen(model)
    if mx.default_device() == mx.gpu and not mx.metal.is_available():
        refuse_narrow(model)


def heads(model: nn.Module) -> list[NativeLinear]:
    """The native matrices that give logits: as many rows as there are words, and in no layer. A
    matrix inside of a layer may have that many by chance, and the state needs it."""
    modules = model.named_modules()
    words = {
        m.weight.shape[0]
        for _, m in modules
        if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))
    }
    return [
        module
        for path, module in modules
        if isinstance(module, NativeLinear)
        and module.rows in words
        and not any(part.isdigit() for part in path.split("."))
    ]


def refuse_narrow(model: nn.Module) -> None:
    """MLX's CUDA back end (0.32.4, H200) multiplies a quantized matrix of 64 columns with several
    rows wrongly: off by 2 where the CPU is off by 4e-7. From 128 columns on it is right."""
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.QuantizedLinear)
            and module.scales.shape[-1] * module.group_size < NARROWEST
        ):
            raise UnsupportedModel(
                f"{path} is too narrow for MLX on an NVIDIA GPU, which would compute it wrongly. "
                "Run the model on the CPU: install llm-flash-moe without its cuda extra."
            )


def renormalises(model: nn.Module) -> bool:
    """Whether the weights of a token's experts sum to one."""
    blocks = [m for _, m in model.named_modules() if _is_block(m)]
    return bool(blocks) and all(block.norm_topk_prob for block in blocks)


def knows_formula(model: nn.Module) -> bool:
    """Whether every mixture of a model is one that we know the formula of."""
    switches = [path for path, m in model.named_modules() if isinstance(m, StreamedSwitch)]
    blocks = [path for path, m in model.named_modules() if _is_block(m)]
    return len(switches) == len(blocks)


def _is_block(block: nn.Module) -> bool:
    from mlx_lm.models.qwen3_next import Qwen3NextSparseMoeBlock

    return (
        type(block) is Qwen3NextSparseMoeBlock
        and isinstance(block.switch_mlp, StreamedSwitch)
        and block.sharding_group is None
    )


def _fits(block: nn.Module, choice: Choice) -> bool:
    return choice.ranked <= MAX_CHOSEN and block.num_experts <= MAX_EXPERTS


def _widen(model: nn.Module) -> None:
    """16-bit weights to float32, and with them all activations; but not what the native kernel
    reads, which takes scales of any type as fast."""
    kept = {
        f"{path}.{param}"
        for path, module in model.named_modules()
        if isinstance(module, NativeLinear)
        for param in ("scales", "biases")
    }
    wide = [
        (name, array.astype(mx.float32))
        for name, array in parameters(model).items()
        if array.dtype in (mx.bfloat16, mx.float16) and name not in kept
    ]
    model.update(tree_unflatten(wide))
