"""What columns are multiplied with, measured while the model is streamed, against mlx-lm's model
with everything in memory and sums in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

from flash_moe.model.load import load
from flash_moe.options import Settings
from flash_moe.pack.activations import Activations, LayerSums
from flash_moe.pack.calibrate import Calibration, Steps
from flash_moe.pack.importance import LEVEL_ROWS, ColumnImportance
from flash_moe.stream.streamed import StreamedLayer
from tests.architectures import write_checkpoint
from tests.pack.packs import wide_model
from tests.strategies import tiny_checkpoint

IDS = np.random.default_rng(5).integers(0, 90, 700).tolist()
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def in_memory(source: Path, ids: list[int], window: int) -> dict[str, LayerSums]:
    """The sums of mlx-lm's own modules, whose inputs and matrices are multiplied in float64."""
    model, _ = load_model(source)
    model.set_dtype(mx.float32)
    sums: dict[str, LayerSums] = {}
    for path, switch in model.named_modules():
        if isinstance(switch, (SwitchGLU, SwitchMLP)):
            sums[path] = _watched(switch)
    for at in range(0, len(ids), window):
        mx.eval(model(mx.array(ids[at : at + window])[None]))
    return sums


def _watched(switch: Any) -> LayerSums:
    first, last = ("fc1", "fc2") if isinstance(switch, SwitchMLP) else ("up_proj", "down_proj")
    w = {name: float64(switch[name]) for name in PROJECTIONS if name in switch} | {
        name: float64(switch[name]) for name in (first, last)
    }
    experts, intermediate, hidden = w[first].shape
    sums = LayerSums.zeros(hidden, intermediate, experts)
    kind = type(switch)

    def product(name: str, expert: int, rows: Any) -> mx.array:
        out = rows @ w[name][expert].T
        return mx.array(out + np.array(switch[name].get("bias", mx.zeros((64, 1)))[expert]))

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            rows, chosen = np.array(x, np.float64).reshape(-1, x.shape[-1]), np.array(indices)
            for row, experts in zip(rows, chosen.reshape(len(rows), -1), strict=True):
                for expert in experts:
                    arguments = [product(first, expert, row)]
                    if kind is SwitchGLU:
                        arguments.append(product("gate_proj", expert, row))
                    inner = np.array(self.activation(*arguments), np.float64)
                    sums.inputs += row**2
                    sums.inner[expert] += inner**2
                    sums.routed[expert] += 1
            output: mx.array = super().__call__(x, indices)
            return output

    switch.__class__ = Watched
    return sums


def float64(matrix: Any) -> Any:
    if "scales" not in matrix:
        return np.array(matrix.weight, np.float64)
    parts = (matrix[name] for name in ("weight", "scales", "biases"))
    wide = mx.dequantize(*parts, group_size=matrix.group_size, bits=matrix.bits)
    return np.array(wide, np.float64)


def assert_same(
    got: dict[str, LayerSums], expected: dict[str, LayerSums], rtol: float = 1e-4
) -> None:
    assert got.keys() == expected.keys()
    for path, sums in expected.items():
        assert np.array_equal(got[path].routed, sums.routed), path
        for name in ("inputs", "inner"):
            a, b = getattr(got[path], name), getattr(sums, name)
            assert np.allclose(a, b, rtol=rtol, atol=rtol * b.mean()), (path, name)


@pytest.fixture(scope="module")
def expected(demo_folder: Path) -> Callable[[int], dict[str, LayerSums]]:
    """The sums of 80 tokens, by the size of windows."""
    return cache(lambda window: in_memory(demo_folder, IDS[:80], window))


@given(st.sampled_from([33, 80]), st.integers(1, 80))
@settings(max_examples=5)
def test_sums_are_those_of_the_model_in_memory(
    expected: Any, demo_folder: Path, tmp_path_factory: Any, window: int, chunk: int
) -> None:
    """However the text is cut into chunks."""
    state = tmp_path_factory.mktemp("state")
    calibration = Calibration(demo_folder, "", IDS[:80], Steps(window, chunk))
    assert_same(calibration.collect(state).layers, expected(window))


@pytest.mark.usefixtures("on_cpu")  # other roundings may choose other experts
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_moe", "bfloat16"), ("gpt_oss", "float32"), ("phimoe", "float32")]
)
def test_unquantized_experts_and_biases(name: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(*wide_model(name, dtype), tmp_path / "source")
    importance = Calibration(tmp_path / "source", "", IDS[:40]).collect(tmp_path)
    assert_same(importance.layers, in_memory(tmp_path / "source", IDS[:40], 40))


@pytest.mark.parametrize("runtime", ["auto", "mlx"])
def test_replies_stay_the_same_while_recording(
    runtime: str, demo_folder: Path, expected: Any
) -> None:
    """With kernels and without. Afterwards nothing is recorded."""
    model, activations = load(demo_folder, Settings(runtime=runtime)), Activations()
    prompt = mx.array(IDS[:80])[None]
    with activations.recording(model.streamer):
        recorded = np.array(model(prompt))
    assert_same(activations.layers, expected(80))
    before = [sums.routed.copy() for sums in activations.layers.values()]
    assert np.allclose(np.array(model(prompt)), recorded, atol=1e-3 * np.abs(recorded).max())
    after = [sums.routed for sums in activations.layers.values()]
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    model.close()


def test_in_sixteen_bits_as_on_a_gpu(tmp_path: Path) -> None:
    """Nothing is widened then: every layer is off by its own roundings, and mlx-lm's by more."""
    source = tiny_checkpoint(tmp_path / "source", dtype="bfloat16")
    model, activations = load(source, Settings(runtime="mlx")), Activations()
    squares: dict[str, Any] = {}

    def compare(layer: StreamedLayer, experts: list[int], x: mx.array, slots: mx.array) -> mx.array:
        wide = np.array(layer.switch(x.astype(mx.float32), slots))
        output = activations(layer, experts, x, slots)
        assert output.dtype == mx.bfloat16
        assert np.abs(np.array(output.astype(mx.float32)) - wide).max() < 0.02 * wide.max()
        rows = np.array(x.astype(mx.float32), np.float64).reshape(-1, x.shape[-1])
        path = model.streamer.store.layers[layer.number].path
        squares[path] = slots.shape[-1] * (rows**2).sum(axis=0)
        return output

    with activations.recording(model.streamer):
        model.streamer.recorder = compare
        model.advance(mx.array(IDS[:64])[None], model.make_cache())
    assert len(squares) == 4
    for path, inputs in squares.items():
        assert np.allclose(activations.layers[path].inputs, inputs, rtol=1e-5)
    model.close()


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_few_rows_weigh_little(rows: int, many: int) -> None:
    """An expert's own columns count by its rows, beside LEVEL_ROWS in which all are alike."""
    squares = np.array([0.0, 1.0, 5.0])
    layer = LayerSums(
        np.array([2.0, 4.0]) * many,
        np.array([rows * squares, many * squares]),
        np.array([rows, many]),
    )
    importance = ColumnImportance({"a": layer})
    for projection in ("gate_proj", "up_proj", "fc1"):
        columns = importance.of("a", projection, 0)
        assert columns is not None
        assert np.allclose(columns, np.array([2, 4]) * many / (rows + many))
    columns = importance.of("a", "down_proj", 0)
    if not rows:
        assert columns is None
    else:
        assert columns is not None
        assert columns.dtype == np.float32
        own = rows / (rows + LEVEL_ROWS)
        assert np.allclose(columns, own * squares + (1 - own) * 2, rtol=1e-5)
    assert importance.of("b", "down_proj", 1) is None
    assert (importance.missed, importance.experts) == (int(not rows), 2)
