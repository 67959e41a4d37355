"""Puts our kernels into a model of mlx-lm's whose switch layers are streamed: whole mixtures where
the formula is known, linear attention on a GPU, and on a CPU the resident matrices."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from flash_moe.checkpoint.switches import parameters, set_module
from flash_moe.errors import UnsupportedModel
from flash_moe.kernels.native import load_native
from flash_moe.kernels.native_backend import NativeKernels, NativeLinear, multiplies
from flash_moe.kernels.runtime import Runtime
from flash_moe.model.families import family_of
from flash_moe.model.families.linear_attention import fuse
from flash_moe.model.mixture import Mixture
from flash_moe.stream.choice import ExpertChoice
from flash_moe.stream.streamed import StreamedSwitch, Streamer

# Columns of a quantized matrix from which on MLX's CUDA back end computes it right.
NARROWEST_ON_CUDA = 128


def install_kernels(
    model: nn.Module, streamer: Streamer, runtime: Runtime, choice: ExpertChoice
) -> None:
    """All arrays are still lazy. A choice that is the model's own leaves mlx-lm's block alone
    where no kernel computes it."""
    for path, module in list(model.named_modules()):
        family = family_of(module)
        if family is not None:
            mixture = family(module, streamer, choice)
            if mixture.fused or choice.needs_host or choice.routed > choice.k:
                set_module(model, path, mixture)
        elif runtime.name == "native" and type(module) is nn.QuantizedLinear and multiplies(module):
            set_module(model, path, NativeLinear(module, NativeKernels(load_native())))
        elif runtime.name == "cuda" or runtime.name == "metal":
            fuse(module, runtime.name)
    if runtime.widen:
        _widen(model)
    if mx.default_device() == mx.gpu and not mx.metal.is_available():
        refuse_narrow(model)


def knows_formula(model: nn.Module) -> bool:
    """Whether every streamed layer belongs to a block whose formula is known."""
    switches = [m for _, m in model.named_modules() if isinstance(m, StreamedSwitch)]
    return len(switches) == len(_blocks(model))


def renormalises(model: nn.Module) -> bool:
    """Whether the weights of a token's experts sum to one."""
    blocks = _blocks(model)
    return bool(blocks) and all(family.renormalises(block) for family, block in blocks)


def find_heads(model: nn.Module) -> list[NativeLinear]:
    """The native matrices that give logits: as many rows as there are words, and in no layer. A
    matrix inside of a layer may have that many by chance, and the state needs it."""
    modules, words = model.named_modules(), _embedding_rows(model)
    return [
        module
        for path, module in modules
        if isinstance(module, NativeLinear)
        and module.rows in words
        and not any(part.isdigit() for part in path.split("."))
    ]


def count_words(model: nn.Module) -> int:
    """Tokens that the model knows: a token has a row in the largest embedding, or nowhere."""
    return max(_embedding_rows(model), default=2**31)


def _embedding_rows(model: nn.Module) -> set[int]:
    return {
        m.weight.shape[0]
        for _, m in model.named_modules()
        if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))
    }


def refuse_narrow(model: nn.Module) -> None:
    """MLX's CUDA back end (0.32.4, H200) multiplies a quantized matrix of 64 columns with several
    rows wrongly: off by 2 where the CPU is off by 4e-7. From 128 columns on it is right."""
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.QuantizedLinear)
            and module.scales.shape[-1] * module.group_size < NARROWEST_ON_CUDA
        ):
            raise UnsupportedModel(
                f"{path} is too narrow for MLX on an NVIDIA GPU, which would compute it wrongly. "
                "Run the model on the CPU: install llm-flash-moe without its cuda extra."
            )


def _blocks(model: nn.Module) -> list[tuple[type[Mixture], nn.Module]]:
    modules = (module for _, module in model.named_modules())
    return [(family, module) for module in modules if (family := family_of(module))]


def _widen(model: nn.Module) -> None:
    """16-bit weights to float32, and with them all activations; but not what the native kernel
    reads, which takes scales of any type as fast."""
    native = {
        f"{path}.{param}"
        for path, module in model.named_modules()
        if isinstance(module, NativeLinear)
        for param in ("scales", "biases")
    }
    wide = [
        (name, array.astype(mx.float32))
        for name, array in parameters(model).items()
        if array.dtype in (mx.bfloat16, mx.float16) and name not in native
    ]
    model.update(tree_unflatten(wide))
