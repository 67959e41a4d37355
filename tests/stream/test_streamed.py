"""A streamed switch layer gives mlx-lm's own numbers for any input, on a CPU to the bit."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from flash_moe.checkpoint.locations import packed_layer
from flash_moe.checkpoint.switches import record_layout, shell
from flash_moe.format.layout import Layout
from flash_moe.kernels.interface import Kernels
from flash_moe.stream.bank import Bank
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import ExpertStore
from flash_moe.stream.streamed import StreamedLayer, StreamedSwitch, Streamer
from tests.devices import CUDA, assert_exact_on_cpu

# Every mode that mlx-lm can load: (mode, bits, group size).
QUANTIZATIONS = [
    None,
    *(("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
# No matrix of 64 columns: MLX 0.32.4 on CUDA computes those wrongly.
EXPERTS, HIDDEN, INNER = 12, 128, 128


def make_switch(kind: str, quantization: tuple[str, int, int] | None, bias: bool) -> nn.Module:
    build = {"glu": SwitchGLU, "mlp": SwitchMLP}[kind]
    switch = build(HIDDEN, INNER, EXPERTS, bias=bias)
    for projection in switch.children().values():
        if "bias" in projection:
            projection["bias"] = mx.random.normal(projection["bias"].shape)
    if quantization is not None:
        mode, bits, group_size = quantization
        nn.quantize(switch, group_size, bits, mode=mode)
    mx.eval(switch.parameters())
    return shell(switch, record_layout(switch))


def stream(switch: nn.Module, folder: Path, slots: int) -> StreamedSwitch:
    """The same layer, its experts in a file."""
    layout = record_layout(switch)
    arrays = {part.name: switch[part.projection][part.param] for part in layout.parts}
    return serve(switch, layout, arrays, folder, slots)


def serve(
    switch: nn.Module,
    layout: Layout,
    arrays: dict[str, mx.array],
    folder: Path,
    slots: int,
    kernels: Kernels | None = None,
) -> StreamedSwitch:
    """A layer like `switch`, its records made of `arrays`: those of all experts, by part."""
    records = np.zeros((EXPERTS, layout.stride), np.uint8)
    for part in layout.parts:
        array = arrays[part.name]
        raw = np.array(mx.contiguous(array).reshape(EXPERTS, -1).view(mx.uint8))
        records[:, part.offset : part.offset + part.nbytes] = raw
    (folder / "layer").write_bytes(records.tobytes())
    store = ExpertStore([packed_layer("switch", EXPERTS, layout, folder / "layer")])
    streamer = Streamer(store, Reader(threads=2), Bank(slots, layout.stride), kernels)
    fresh = SwitchGLU if isinstance(switch, SwitchGLU) else SwitchMLP
    bias = any(part.param == "bias" for part in layout.parts)
    lane_switch = shell(fresh(HIDDEN, INNER, EXPERTS, bias=bias), layout)
    lane_switch.activation = switch.activation
    return StreamedSwitch(StreamedLayer(streamer, 0, lane_switch))


def computed(expected: mx.array) -> mx.array:
    """mlx-lm's own output. Rejects the example where MLX's CUDA back end has no kernel for it."""
    try:
        mx.eval(expected)
    except RuntimeError:
        if not CUDA:
            raise
        reject()
    return expected


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(["glu", "mlp"]),
    quantization=st.sampled_from(QUANTIZATIONS),
    bias=st.booleans(),
    lead=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    k=st.integers(1, EXPERTS),
    lane=st.integers(1, EXPERTS),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_streamed_equals_resident(
    kind: str,
    quantization: tuple[str, int, int] | None,
    bias: bool,
    lead: list[int],
    k: int,
    lane: int,
    dtype: mx.Dtype,
    seed: int,
) -> None:
    mx.random.seed(seed)
    switch = make_switch(kind, quantization, bias)
    x = mx.random.normal((*lead, HIDDEN)).astype(dtype)
    indices = mx.random.randint(0, EXPERTS, (*lead, k)).astype(mx.uint32)
    expected = computed(switch(x, indices))
    with TemporaryDirectory() as folder:
        streamed = stream(switch, Path(folder), 2 * lane)
        streamer = streamed.layer.streamer
        assert_exact_on_cpu(streamed(x, indices), expected)
        distinct = len(np.unique(np.array(indices)))
        assert streamer.reader.counters.experts == distinct, "an expert was read twice"
        streamer.bank.check()
        streamer.store.close()


@pytest.mark.parametrize("lane", [2, EXPERTS])
def test_two_lazy_calls_do_not_overwrite_each_other(tmp_path: Path, lane: int) -> None:
    """Regression: outputs that are not evaluated yet must survive later reads."""
    mx.random.seed(1)
    switch = make_switch("glu", ("affine", 4, 32), bias=False)
    streamed = stream(switch, tmp_path, 2 * lane)
    xs = [mx.random.normal((3, HIDDEN)) for _ in range(6)]
    picks = [mx.random.randint(0, EXPERTS, (3, 2)) for _ in range(6)]
    lazy = [streamed(x, pick) for x, pick in zip(xs, picks, strict=True)]
    for got, x, pick in zip(lazy, xs, picks, strict=True):
        assert_exact_on_cpu(got, switch(x, pick))


def test_streamed_layer_has_no_parameters(tmp_path: Path) -> None:
    """mlx-lm must not load, count or quantize experts that are on disk."""
    streamed = stream(make_switch("glu", None, bias=False), tmp_path, 4)
    assert not streamed.parameters()
    assert not list(streamed.leaf_modules())
