"""Of experts in two planes, every pair is computed in full or from the first plane, as asked: in
full it is mlx-lm's 4-bit expert, otherwise a 2-bit one; on a CPU to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.switches import record_layout
from flash_moe.format.layout import AFFINE, Layout
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.stream.planes import join
from flash_moe.stream.precision import Flags, Precision
from tests.devices import assert_exact_on_cpu
from tests.stream.test_streamed import EXPERTS, HIDDEN, make_switch, serve

Arrays = dict[str, mx.array]


@dataclass
class Case:
    """A layer of 4 bits, its first planes as a layer of 2 bits, and both as records."""

    switch: nn.Module
    first: nn.Module
    layout: Layout
    arrays: Arrays

    def expected(self, x: mx.array, indices: mx.array, full: Flags) -> mx.array:
        both, alone = self.switch(x, indices), self.first(x, indices)
        return mx.where(mx.array(full)[..., None], both, alone)


def make_case(kind: str = "glu", group_size: int = 32, bias: bool = False, seed: int = 0) -> Case:
    mx.random.seed(seed)
    switch = make_switch(kind, ("affine", 4, group_size), bias)
    mx.random.seed(seed)
    first = make_switch(kind, ("affine", 4, group_size), bias)
    transform = TwoPlanes()
    source = record_layout(switch)
    arrays: Arrays = {}
    for name, packing in source.quantization:
        # Rows of all experts at once.
        rows = {param: switch[name][param].flatten(0, 1) for param in AFFINE}
        planes = {
            param: array.reshape(EXPERTS, -1, array.shape[-1])
            for param, array in transform.apply(rows, packing, "switch", name, 0).items()
        }
        planes |= {"bias": switch[name].bias} if bias else {}
        arrays |= {f"{name}.{param}": array for param, array in planes.items()}
        first[name].bits = 2
        first[name].update({param: planes[param] for param in AFFINE})
    return Case(switch, first, transform.layout(source, "switch"), arrays)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["glu", "mlp"]),
    group_size=st.sampled_from([32, 64]),
    bias=st.booleans(),
    lead=st.lists(st.integers(1, 9), max_size=3),
    k=st.integers(1, EXPERTS),
    lane=st.integers(1, EXPERTS),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    asked=st.sampled_from(["full", "first", "by pair", "by rank", "by phase"]),
    seed=st.integers(0, 2**31),
)
def test_every_pair_is_computed_from_its_own_planes(
    kind: str,
    group_size: int,
    bias: bool,
    lead: list[int],
    k: int,
    lane: int,
    dtype: mx.Dtype,
    asked: str,
    seed: int,
) -> None:
    case = make_case(kind, group_size, bias, seed)
    random = np.random.default_rng(seed)
    x = mx.random.normal((*lead, HIDDEN)).astype(dtype)
    indices = mx.random.randint(0, EXPERTS, (*lead, k)).astype(mx.uint32)
    in_prompt = bool(random.integers(2))
    full = {
        "full": np.ones(indices.shape, bool),
        "first": np.zeros(indices.shape, bool),
        "by pair": random.random(indices.shape) < 0.5,
        "by rank": np.broadcast_to(np.arange(k) < (k + 1) // 2, indices.shape),
        "by phase": np.full(indices.shape, in_prompt),
    }[asked]
    with TemporaryDirectory() as folder:
        layer = serve(case.switch, case.layout, case.arrays, Path(folder), 2 * lane).layer
        streamer = layer.streamer
        # Other bytes than a record's, as an earlier expert may have left them there.
        for memory in streamer.bank.lanes:
            memory.buffer[:] = random.bytes(len(memory.buffer))
        streamer.precision = Precision(0, ("prompt",))
        streamer.phase = "prompt" if in_prompt else "reply"
        got = layer.experts(x, indices, None if asked == "by phase" else full)
        assert_exact_on_cpu(got, case.expected(x, indices, full))
        assert streamer.reader.counters.nbytes == bytes_of(case.layout, indices, full)
        streamer.bank.check()
        streamer.store.close()


def bytes_of(layout: Layout, indices: mx.array, full: Flags) -> int:
    """Every expert is read once, and in full only if one of its pairs needs it."""
    ids = np.array(indices)
    both = set(ids[full].tolist())
    alone = set(ids.ravel().tolist()) - both
    return len(both) * layout.stride + len(alone) * layout.first_plane_bytes


def test_an_expert_of_both_kinds_of_pairs_is_read_once(tmp_path: Path) -> None:
    case = make_case()
    layer = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * EXPERTS).layer
    x, indices = mx.random.normal((3, HIDDEN)), mx.array([[4, 7], [4, 2], [7, 4]], mx.uint32)
    full = np.array([[True, False], [False, False], [False, True]])
    assert_exact_on_cpu(layer.experts(x, indices, full), case.expected(x, indices, full))
    counters = layer.streamer.reader.counters
    assert counters.experts == 3
    assert counters.nbytes == case.layout.stride + 2 * case.layout.first_plane_bytes
    assert 0 < case.layout.first_plane_bytes < case.layout.stride


def test_lazy_calls_of_all_kinds_do_not_overwrite_each_other(tmp_path: Path) -> None:
    case = make_case()
    layer = serve(case.switch, case.layout, case.arrays, tmp_path, 4).layer
    random = np.random.default_rng(3)
    xs = [mx.random.normal((3, HIDDEN)) for _ in range(6)]
    picks = [mx.random.randint(0, EXPERTS, (3, 2)) for _ in range(6)]
    flags = [random.random((3, 2)) < 0.5 for _ in range(6)]
    lazy = [layer.experts(*call) for call in zip(xs, picks, flags, strict=True)]
    for got, x, pick, full in zip(lazy, xs, picks, flags, strict=True):
        assert_exact_on_cpu(got, case.expected(x, pick, full))


def test_joined_words_do_not_stay_in_memory(tmp_path: Path) -> None:
    """They are copies, of the size of a lane; a model has a module for each of its layers."""
    case = make_case()
    layer = serve(case.switch, case.layout, case.arrays, tmp_path, 2 * EXPERTS).layer
    mx.eval(layer.experts(mx.zeros((1, HIDDEN)), mx.array([[1, 2]], mx.uint32)))
    words = layer.switch.gate_proj.weight.shape[-1]
    assert words == case.first.gate_proj.weight.shape[-1]
    assert layer.switch.gate_proj.bits == 2


def test_precision_changes_nothing_for_records_of_one_plane(tmp_path: Path) -> None:
    switch = make_switch("glu", ("affine", 4, 32), bias=False)
    layout = record_layout(switch)
    arrays = {part.name: switch[part.projection][part.param] for part in layout.parts}
    layer = serve(switch, layout, arrays, tmp_path, 2 * EXPERTS).layer
    layer.streamer.precision = Precision(0)
    x, indices = mx.random.normal((3, HIDDEN)), mx.random.randint(0, EXPERTS, (3, 4))
    for full in (None, np.zeros((3, 4), bool), np.eye(3, 4, dtype=bool)):
        assert_exact_on_cpu(layer.experts(x, indices, full), switch(x, indices))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_joined_words_are_mlxs(seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (3, 5, 64), np.uint8)
    as_words = [
        mx.array(
            np.packbits(
                (part[..., None] >> np.arange(bits, dtype=np.uint8) & 1).reshape(3, 5, -1),
                axis=-1,
                bitorder="little",
            )
        ).view(mx.uint32)
        for part, bits in ((codes >> 2, 2), (codes & 3, 2), (codes, 4))
    ]
    assert mx.array_equal(join(*as_words[:2]), as_words[2])
