"""Kernels prove themselves before they are used: those with a bug planted, or that do not compile,
are left out, and replies are right all the same."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from flash_moe.engine import Engine
from flash_moe.errors import ReadFailed
from flash_moe.kernels import shaders
from flash_moe.kernels.gpu_operations import GpuGatedDelta
from flash_moe.model import proof
from flash_moe.model.load import StreamedModel, load
from flash_moe.model.mixture import Mixture
from flash_moe.options import Settings
from flash_moe.stream.reader import Reader
from flash_moe.upstream import Replacement
from tests.devices import GPU, RUNTIMES, relative_difference
from tests.kernels.devices import KIND, kernels_run
from tests.model.test_runtimes import EMULATED, TOLERANCE, running

NAME = RUNTIMES[0] if GPU else EMULATED
PROMPT = mx.array([[7, 300, 12, 45, 500, 9]])
EXPERTS, ROUTER, ATTENTION = "experts", "the router", "linear attention"

# File, text, what takes its place, and what is left out then.
BUGS = [
    ("expert_gate_up_swiglu.metal", "metal::exp(-g)", "metal::exp(g)", EXPERTS),
    ("expert_down.metal", "ulong(slot) *", "ulong(slot ^ 1u) *", EXPERTS),
    ("expert_down_combine.metal", "weight * v", "v", EXPERTS),
    ("combine.metal", "ulong(place[pair])", "ulong(pair ^ 1u)", EXPERTS),
    ("combine.metal", "metal::exp(-float(shared_gate", "metal::exp(float(shared_gate", EXPERTS),
    ("expert_down_combine.metal", "if (SHARED)", "if (false)", EXPERTS),
    ("moe_common.h", "TWO_PLANES>(v, i);", "TWO_PLANES>(v, i ^ 1);", EXPERTS),
    ("router_topk.metal", "metal::exp(top - high)", "metal::exp(high)", ROUTER),
    ("gated_delta.metal", "ks[i] *= k_scale;", "", ATTENTION),
    ("gated_delta.metal", "value - simd_sum(seen)", "value", ATTENTION),
    ("short_conv.metal", "sum / (1.0f", "1.0f / (1.0f", ATTENTION),
    ("short_conv.metal", "constexpr int BEFORE", "this does not compile", ATTENTION),
    ("expert_down.metal", "constexpr int STEP", "this does not compile", EXPERTS),
    ("expert_gate_up_swiglu.metal", "metal::exp(-g)", "0.0f / 0.0f", EXPERTS),
]


@pytest.fixture(autouse=True)
def forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proof is remembered from elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(model: StreamedModel) -> list[mx.array]:
    """Of a prompt, and of tokens after it."""
    cache = model.make_cache()
    results = [model(PROMPT, cache=cache), *(model(mx.array([[t]]), cache=cache) for t in (5, 8))]
    mx.eval(results)
    return results


@pytest.fixture(scope="module")
def expected(demo_folder: Path) -> list[mx.array]:
    plain = load(demo_folder, Settings(runtime="mlx"))
    results = logits(plain)
    plain.close()
    return results


def assert_right(model: StreamedModel, expected: list[mx.array]) -> None:
    for got, want in zip(logits(model), expected, strict=True):
        assert relative_difference(got, want) <= TOLERANCE


def mixtures(model: StreamedModel) -> list[Mixture]:
    return [module for _, module in model.model.named_modules() if isinstance(module, Mixture)]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug[0]}: {bug[2] or 'nothing'}")
def test_what_is_wrong_is_left_out(
    bug: tuple[str, str, str, str],
    demo_folder: Path,
    expected: list[mx.array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, old, new, what = bug
    text = shaders.text

    def planted(name: str) -> str:
        source = text(name)
        if name == file:
            assert old in source
            source = source.replace(old, new, 1)
        return source

    monkeypatch.setattr(shaders, "text", planted)
    shaders.kernel.cache_clear()
    try:
        with running(NAME, monkeypatch) as settings:
            model = load(demo_folder, settings)
            assert model.warning is not None
            assert f"kernels for {what} do not compute what MLX" in model.warning
            assert_right(model, expected)
            assert all(block.fused == (what == ATTENTION) for block in mixtures(model))
            specs = {block.layer.spec is None for block in mixtures(model)}
            assert specs == {what == EXPERTS}
            model.close()
    finally:
        shaders.kernel.cache_clear()


def test_what_passed_is_remembered(
    demo_folder: Path, expected: list[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For this GPU, MLX and these shaders; not for others."""

    def never(*arguments: Any) -> Any:
        raise AssertionError("asked again")

    with running(NAME, monkeypatch) as settings:
        for again in (False, True):
            if again:
                for name in ("_experts", "_router", "_attention", "_rule"):
                    monkeypatch.setattr(proof, name, never)
            engine = Engine.load(demo_folder, settings, prefix=None)
            assert engine.model.warning is None
            assert all(block.fused for block in mixtures(engine.model))
            assert_right(engine.model, expected)
            engine.close()
        monkeypatch.setattr(proof, "_device", lambda: "another GPU")
        model = load(demo_folder, settings)
        assert model.warning is not None
        assert "experts and the router and linear attention" in model.warning
        assert "another GPU" in model.warning
        assert_right(model, expected)
        model.close()


@pytest.mark.parametrize("bug", [None, "value"])
def test_the_rule_of_other_models_is_proven_too(
    bug: str | None, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On NVIDIA our shader stands in mlx-lm's own operation, for every model."""
    text = shaders.text

    def planted(name: str) -> str:
        return text(name).replace("value - simd_sum(seen)", bug or "value - simd_sum(seen)")

    monkeypatch.setattr(shaders, "text", planted)
    shaders.kernel.cache_clear()
    operations: dict[str, Replacement] = {"gated_delta": partial(GpuGatedDelta, kind=KIND)}
    try:
        with kernels_run():
            failed = proof.prove(nn.Module(), list, operations, KIND)
    finally:
        shaders.kernel.cache_clear()
    assert failed == ([ATTENTION] if bug else [])
    assert list(operations) == ([] if bug else ["gated_delta"])


def test_what_mlx_cannot_compute_says_nothing_about_kernels(
    demo_folder: Path, expected: list[mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its CUDA back end cannot for some shapes: our kernels are all there is then."""

    def fail(*arguments: Any, **named: Any) -> mx.array:
        raise RuntimeError("No implementation for problem shape")

    with running(NAME, monkeypatch) as settings:
        with monkeypatch.context() as patch:
            patch.setattr(mx, "gather_qmm", fail)
            model = load(demo_folder, settings)
        assert model.warning is None
        assert all(block.fused for block in mixtures(model))
        assert_right(model, expected)
        model.close()


def test_a_disk_that_fails_says_nothing_about_kernels(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise ReadFailed("The disk failed.")

    monkeypatch.setattr(Reader, "read", fail)
    with running(NAME, monkeypatch) as settings, pytest.raises(ReadFailed):
        load(demo_folder, settings)


def test_a_mark_that_cannot_be_written_is_no_fault(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *arguments: Any, **named: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with running(NAME, monkeypatch) as settings:
        model = load(demo_folder, settings)
        assert model.warning is None
        model.close()


def test_nothing_is_proven_where_nothing_can_be_remembered(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is compared at every start."""
    monkeypatch.setattr(proof, "cache_folder", lambda: None)
    calls = []
    own = proof._experts
    monkeypatch.setattr(proof, "_experts", lambda layer: calls.append(1) or own(layer))
    with running(NAME, monkeypatch) as settings:
        for count in (1, 2):
            model = load(demo_folder, settings)
            assert model.warning is None
            assert len(calls) == count
            model.close()
