"""Every mlx-lm architecture with switch layers: streamed logits equal resident ones exactly.

On the CPU, whatever the machine has: there, equal means to the bit. Only the tests of kernels run
on a GPU, and not on CUDA, where MLX computes matrices as narrow as these wrongly. Run with
`pytest -k architectures`; the table at the end names what is not covered, and why.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import (
    experts_per_token,
    with_experts_per_token,
)
from flash_moe.errors import NotContiguous, UnsupportedModel
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Settings
from flash_moe.pack.job import PackJob
from tests.architecture_configs import CONFIGS, UNCOVERED
from tests.architectures import (
    JOINED,
    UNSTACKED,
    random_model,
    vendor_layout,
    write_checkpoint,
)
from tests.devices import relative_difference

exactly = pytest.mark.usefixtures("on_cpu")
nearly = pytest.mark.usefixtures("not_on_cuda")

TOKENS = 23
# Small enough that every prefill works in several groups of experts.
SMALL_BANK = Settings(runtime="mlx", bank_bytes=1, threads=1)
EXACT = Settings(runtime="mlx")
# Kernels against MLX's operations on equal weights in float32, as a share of the largest logit:
# they differ by 1e-5 to 1e-4; a wrong expert or weight would give 0.1 to 2.
TOLERANCE = 1e-3


def prompts(rows: int, length: int = TOKENS) -> mx.array:
    return mx.random.randint(1, 100, (rows, length), key=mx.random.key(rows))


def resident(folder: Path) -> nn.Module:
    model, _ = load_model(folder)
    return model


def assert_same_logits(streamed: StreamedModel, model: nn.Module) -> None:
    """Prefill, a batch of three, and decode after a prefill that is not evaluated yet."""
    for rows in (1, 3):
        assert_equal(streamed(prompts(rows)), model(prompts(rows)), f"prefill of {rows}")
    caches = [streamed.make_cache(), make_prompt_cache(model)]
    tokens = prompts(1)
    lazy = [
        run(tokens[:, :-4], cache=cache)
        for run, cache in zip((streamed, model), caches, strict=True)
    ]
    for at in range(TOKENS - 4, TOKENS):
        got, expected = (
            run(tokens[:, at : at + 1], cache=cache)
            for run, cache in zip((streamed, model), caches, strict=True)
        )
        assert_equal(got, expected, f"decode of token {at}")
    assert_equal(*lazy, "lazy prefill")
    streamed.streamer.bank.check()


def assert_equal(got: mx.array, expected: mx.array, what: str) -> None:
    assert mx.all(mx.isfinite(expected)), f"{what}: the resident model is not finite"
    difference = mx.abs(got - expected).max().item()
    assert difference == 0, f"{what}: differs by {difference}"


@exactly
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_stream_exactly(name: str, tmp_path: Path) -> None:
    model, config = random_model(name)
    write_checkpoint(model, config, tmp_path / "source")
    expected = resident(tmp_path / "source")
    PackJob.plan(tmp_path / "source", tmp_path / "packed").write()
    for form in ("source", "packed"):
        for settings in (EXACT, SMALL_BANK):
            streamed = load(tmp_path / form, settings)
            assert streamed.plan.form == ("pack" if form == "packed" else "in place")
            assert_same_logits(streamed, expected)
            streamed.close()


@exactly
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_quantized(name: str, tmp_path: Path) -> None:
    """4-bit experts, with the routers and the rest as they are."""
    model, config = random_model(name, bits=4)
    write_checkpoint(model, config, tmp_path / "source")
    expected = resident(tmp_path / "source")
    streamed = load(tmp_path / "source", SMALL_BANK)
    assert "4-bit" in streamed.plan.bits
    assert_same_logits(streamed, expected)
    streamed.close()


@nearly
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_with_kernels(name: str, tmp_path: Path) -> None:
    """The fastest runtime of this machine gives plain MLX's logits up to rounding."""
    model, config = random_model(name, bits=4)
    write_checkpoint(model, config, tmp_path / "source")
    expected = resident(tmp_path / "source")
    for settings in (Settings(), Settings(bank_bytes=1, threads=1)):
        streamed = load(tmp_path / "source", settings)
        for rows in (1, 3):
            assert_close(streamed(prompts(rows)), expected(prompts(rows)), f"prefill of {rows}")
        cache = streamed.make_cache()
        tokens = prompts(1)
        steps = [streamed(tokens[:, :-3], cache=cache)]
        steps += [streamed(tokens[:, i : i + 1], cache=cache) for i in range(TOKENS - 3, TOKENS)]
        assert_close(mx.concatenate(steps, axis=1), expected(tokens), "prefill and decode")
        streamed.close()


# mlx-lm's own code cannot run these with plain matrices quantized.
NOT_QUANTIZED = {"kimi_k3", "muse_spark"}


@nearly
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in NOT_QUANTIZED])
def test_architectures_with_all_matrices_quantized(name: str, tmp_path: Path) -> None:
    """Resident matrices too, as published checkpoints have them: on a CPU those are native."""
    model, config = random_model(name)

    def packs(path: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0

    nn.quantize(model, 32, 4, class_predicate=packs)
    config["quantization"] = {"group_size": 32, "bits": 4}
    write_checkpoint(model, config, tmp_path / "source")
    expected = resident(tmp_path / "source")
    streamed = load(tmp_path / "source")
    for rows in (1, 3):
        assert_close(streamed(prompts(rows)), expected(prompts(rows)), f"prefill of {rows}")
    streamed.close()


def assert_close(got: mx.array, expected: mx.array, what: str) -> None:
    assert relative_difference(got, expected) <= TOLERANCE, what


@exactly
@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_take_another_k(name: str, tmp_path: Path) -> None:
    """`experts` gives mlx-lm's logits for a config with another K. Fewer experts than the model was
    trained with would keep their weights where the formula is known: these are more."""
    model, config = random_model(name)
    write_checkpoint(model, config, tmp_path / "source")
    if name == "llama4":
        with pytest.raises(UnsupportedModel, match="1 expert per token"):
            load(tmp_path / "source", replace(EXACT, experts=3))
        return
    own = experts_per_token(config)
    changed = with_experts_per_token(config, 3)
    assert (own, experts_per_token(changed)) == (2, 3)
    expected, _ = load_model(tmp_path / "source", model_config=changed)
    streamed = load(tmp_path / "source", replace(EXACT, experts=3))
    assert streamed.plan.experts_per_token == 3
    assert_equal(streamed(prompts(1)), expected(prompts(1)), "K=3")
    assert not mx.array_equal(streamed(prompts(1)), resident(tmp_path / "source")(prompts(1)))
    streamed.close()


@exactly
@pytest.mark.parametrize("name", [*UNSTACKED, *JOINED])
def test_architectures_from_vendor_layout(name: str, tmp_path: Path) -> None:
    """As vendors publish them; in place where an expert's rows lie together, packed in any case."""
    model, config = random_model(name)
    vendor = vendor_layout(name, dict(tree_flatten(model.parameters())))
    if any(path.endswith("_blocks") for path in vendor):
        config["quantization_config"] = {"quant_method": "mxfp4"}
    write_checkpoint(model, config, tmp_path / "vendor")
    mx.save_safetensors(str(tmp_path / "vendor" / "model.safetensors"), vendor)
    expected = resident(tmp_path / "vendor")
    PackJob.plan(tmp_path / "vendor", tmp_path / "packed").write()
    packed = load(tmp_path / "packed", SMALL_BANK)
    assert_same_logits(packed, expected)
    packed.close()
    try:
        in_place = load(tmp_path / "vendor", SMALL_BANK)
    except NotContiguous:
        assert name in TRANSPOSED_BY_VENDOR, f"{name} could be streamed in place"
    else:
        assert_same_logits(in_place, expected)
        in_place.close()


# Interleaved rows (gpt_oss) and inputs before outputs (the others): no expert's rows lie together.
TRANSPOSED_BY_VENDOR = {"gpt_oss", "llama4", "qwen3_vl_moe"}


def test_architectures_table() -> None:
    """Every model file that builds a switch layer is covered or has a reason."""
    folder = Path(next(iter(mlx_lm.models.__path__)))
    files = {
        file.stem
        for file in folder.glob("*.py")
        if any(f"{name}(" in file.read_text() for name in ("SwitchGLU", "SwitchMLP"))
    } - {"switch_layers"}
    uncovered = sorted(files - CONFIGS.keys())
    for name in uncovered:
        print(f"not covered: {name}: {UNCOVERED.get(name, 'no config yet')}")
    print(f"{len(files) - len(uncovered)} of {len(files)} covered")
    assert len(files) - len(uncovered) >= 38
    assert set(uncovered) <= UNCOVERED.keys()
