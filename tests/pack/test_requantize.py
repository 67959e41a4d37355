"""Requantized weights against float64, and packs of them against the same weights in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import CheckpointError, NotContiguous, OptionError
from flash_moe.format.manifest import read_manifest, verify
from flash_moe.format.safetensors import read_headers
from flash_moe.model.load import Settings, load
from flash_moe.native.build import NativeUnavailable
from flash_moe.pack import job as pack_module
from flash_moe.pack import requantize as requantize_module
from flash_moe.pack.affine import pack_codes
from flash_moe.pack.job import plan_pack
from flash_moe.pack.requantize import make_recast, requantize
from tests.architecture_configs import CONFIGS
from tests.architectures import random_model, vendor_layout, write_checkpoint
from tests.pack.test_crash import hashes

EXACT = Settings(runtime="mlx")
PROMPT = mx.array([[7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99]])
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "intermediate_size_mlp")
DTYPES = ["float32", "float16", "bfloat16"]


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([2, 3]),
    group_size=st.sampled_from([64, 128]),
    dtype=st.sampled_from(DTYPES),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
    center=st.sampled_from([0.0, 1.0, -3.0]),
)
@settings(max_examples=60, deadline=None)
def test_minmax_against_float64(
    seed: int, bits: int, group_size: int, dtype: str, spread: float, center: float
) -> None:
    random = np.random.default_rng(seed)
    kind = getattr(mx, dtype)
    given = mx.array((center + spread * random.standard_normal((3, 256))).astype(np.float32))
    given = given.astype(kind)
    values = np.array(given.astype(mx.float32))
    weight, scales, biases = requantize({"weight": given}, None, bits, group_size, "minmax")
    assert (scales.dtype, biases.dtype) == (kind, kind)
    groups = values.astype(np.float64).reshape(3, -1, group_size)
    largest = 2**bits - 1
    low = groups.min(-1)
    step = (groups.max(-1) - low) / largest
    rounding = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    got_scale, got_bias = (np.array(p.astype(mx.float32), np.float64) for p in (scales, biases))
    # Rounded, not cut off: half of a unit of the last place, and what float32 adds to it.
    for got, expected in ((got_scale, step), (got_bias, low)):
        assert np.all(np.abs(got - expected) <= 0.51 * rounding * np.abs(expected) + 1e-6 * spread)
    # Every code is the nearest one under the scale and bias that are stored.
    plain = [mx.ones(scales.shape), mx.zeros(scales.shape)]
    codes = np.array(mx.dequantize(weight, *plain, group_size=group_size, bits=bits))
    codes = codes.reshape(groups.shape)
    wanted = (groups - got_bias[..., None]) / np.where(got_scale == 0, 1, got_scale)[..., None]
    nearest = np.clip(wanted, 0, largest)
    assert np.all(np.abs(codes - nearest) <= 0.5 + 1e-3)
    assert np.all(codes == np.round(codes))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_are_packed_as_mlx_reads_them(bits: int) -> None:
    codes = mx.random.randint(0, 1 << bits, (5, 128), key=mx.random.key(bits))
    if bits == 1:  # MLX has no such width
        expected = np.packbits(np.array(codes, np.uint8), axis=-1, bitorder="little")
        assert np.array_equal(np.array(pack_codes(codes, 1).view(mx.uint8)), expected)
        return
    packed = pack_codes(codes, bits)
    scales, biases = mx.ones((5, 2)), mx.zeros((5, 2))
    found = mx.dequantize(packed, scales, biases, group_size=64, bits=bits)
    assert np.array_equal(np.array(found), np.array(codes))


def pack(
    source: Path, target: Path, bits: int = 2, group_size: int = 64, method: str = "fit"
) -> Path:
    recast = make_recast(bits, group_size, method)
    plan_pack(open_folder(source), target, recast=recast).write()
    return target


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> None:
        raise NativeUnavailable("none here")

    monkeypatch.setattr(requantize_module, "load_fit", unavailable)


def as_checkpoint(folder: Path, target: Path) -> Path:
    """A pack as a plain checkpoint with all experts in it, for mlx-lm's own loader."""
    target.mkdir()
    weights: dict[str, mx.array] = {}
    for shard in folder.glob("model*.safetensors"):
        weights |= mx.load(str(shard))  # type: ignore[arg-type]
    for layer in read_manifest(folder).layers:
        records = np.fromfile(folder / layer.file, np.uint8).reshape(layer.experts, -1)
        for part in layer.layout.parts:
            raw = np.ascontiguousarray(records[:, part.offset : part.offset + part.nbytes])
            array = mx.array(raw).view(getattr(mx, part.dtype))
            weights[f"{layer.path}.{part.name}"] = array.reshape(layer.experts, *part.shape)
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("method", ["fit", "minmax"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (2, 128), (3, 64), (3, 128)])
def test_streamed_as_in_memory(
    bits: int, group_size: int, method: str, demo_folder: Path, tmp_path: Path
) -> None:
    packed = pack(demo_folder, tmp_path / "pack", bits, group_size, method)
    resident, config = load_model(as_checkpoint(packed, tmp_path / "whole"))
    switch = open_skeleton(open_folder(demo_folder)).switches
    for path in switch:
        for name in ("gate_proj", "up_proj", "down_proj"):
            said = config["quantization"][f"{path}.{name}"]
            assert said == {"bits": bits, "group_size": group_size, "mode": "affine"}
    model = load(packed, EXACT)
    assert model.plan.bits == f"{bits}-bit"
    assert model.plan.lossy == [f"experts requantized from 4-bit to {bits}-bit ({method})"]
    assert np.array_equal(np.array(model(PROMPT)), np.array(resident(PROMPT)))
    model.close()
    assert verify(packed, read_manifest(packed)) == []


def test_without_a_compiler_mlx_fits_and_the_pack_says_so(
    no_compiler: None, demo_folder: Path, tmp_path: Path
) -> None:
    packed = pack(demo_folder, tmp_path / "pack")
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.plan.lossy == ["experts requantized from 4-bit to 2-bit (fit in MLX)"]
    assert np.array_equal(np.array(model(PROMPT)), np.array(resident(PROMPT)))
    model.close()


def test_four_bits_of_floats(tmp_path: Path) -> None:
    write_checkpoint(*_wide("qwen3_moe", "bfloat16"), tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "pack", 4)
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.plan.lossy == ["experts requantized from bfloat16 to 4-bit (fit)"]
    assert np.array_equal(
        np.array(model(PROMPT % 100).astype(mx.float32)),
        np.array(resident(PROMPT % 100).astype(mx.float32)),
    )
    model.close()


def test_what_was_spent_is_counted(demo_folder: Path, tmp_path: Path) -> None:
    """Whole projections of all experts went in: codes of 4 bits, two scales for 64 of them."""
    recast = make_recast(2)
    plan_pack(open_folder(demo_folder), tmp_path / "pack", recast=recast).write()
    weights = 4 * 8 * 3 * 256 * 128
    assert recast.spent.nbytes == weights // 2 + weights // 64 * 8
    assert recast.spent.cpu_seconds > 0
    assert recast.spent.seconds > 0


@pytest.mark.parametrize("method", ["fit", "minmax"])
def test_experts_are_the_sources_as_near_as_codes_allow(
    method: str, demo_folder: Path, tmp_path: Path
) -> None:
    """And nothing else is changed at all."""
    packed = pack(demo_folder, tmp_path / "pack", method=method)
    packed = as_checkpoint(packed, tmp_path / "whole")
    source, changed = (load_model(folder)[0] for folder in (demo_folder, packed))
    before, after = (dict(tree_flatten(model.parameters())) for model in (source, changed))
    inside = [name for name in before if ".switch_mlp." in name]
    assert inside
    for name, array in before.items():
        if name not in inside:
            assert np.array_equal(np.array(array), np.array(after[name])), name
    for path in {name.rpartition(".")[0] for name in inside}:
        wide = [
            np.array(
                mx.dequantize(
                    *(weights[f"{path}.{part}"] for part in ("weight", "scales", "biases")),
                    group_size=64,
                    bits=bits,
                ),
                np.float64,
            )
            for weights, bits in ((before, 4), (after, 2))
        ]
        step = np.repeat(np.abs(np.array(after[f"{path}.scales"], np.float64)), 64, axis=-1)
        low = np.repeat(np.array(after[f"{path}.biases"], np.float64), 64, axis=-1)
        # The fit's outer levels lie inside of what they stand for.
        inside = np.abs(wide[0] - low - 1.5 * step) <= 1.5 * step
        near = np.abs(wide[0] - wide[1]) <= 0.501 * step + 1e-6
        assert np.all(near | ~inside if method == "fit" else near)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_unquantized_experts(name: str, tmp_path: Path) -> None:
    """Those of gpt-oss have a bias each, which stays."""
    write_checkpoint(*_wide(name), tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "pack")
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.plan.lossy == ["experts requantized from float32 to 2-bit (fit)"]
    assert np.array_equal(np.array(model(PROMPT % 100)), np.array(resident(PROMPT % 100)))
    model.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_of_the_sources_type(dtype: str, tmp_path: Path) -> None:
    write_checkpoint(*_wide("qwen3_moe", dtype), tmp_path / "source")
    manifest = read_manifest(pack(tmp_path / "source", tmp_path / "pack"))
    parts = {part.param: part.dtype for part in manifest.layers[0].layout.parts}
    assert parts == {"weight": "uint32", "scales": dtype, "biases": dtype}
    assert manifest.requantized is not None
    assert manifest.requantized.source == dtype


def test_experts_that_cannot_be_read_in_place(tmp_path: Path) -> None:
    """llama4 as its vendor has it, inputs first: the same experts come of it."""
    model, config = _wide("llama4")
    vendor = vendor_layout("llama4", dict(tree_flatten(model.parameters())))
    for name in ("plain", "vendor"):
        write_checkpoint(model, config, tmp_path / name)
    mx.save_safetensors(str(tmp_path / "vendor" / "model.safetensors"), vendor)
    with pytest.raises(NotContiguous):
        open_skeleton(open_folder(tmp_path / "vendor")).layers()
    plain, turned = (
        hashes(pack(tmp_path / name, tmp_path / f"{name}-pack")) for name in ("plain", "vendor")
    )
    experts = [name for name in plain if name.endswith(".experts")]
    assert experts
    assert [plain[name] for name in experts] == [turned[name] for name in experts]


def _wide(name: str, dtype: str = "float32") -> tuple[nn.Module, dict[str, Any]]:
    """A model of an architecture with widths that groups of 64 divide."""
    config = copy.deepcopy(CONFIGS[name])
    for place in (config, config.get("text_config", {})):
        place.update({key: 64 for key in WIDTHS if key in place})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, name, config)
        model, made = random_model(name)
    model.set_dtype(getattr(mx, dtype))
    return model, made


def test_an_interrupted_pack_goes_on_to_the_same_bytes(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = hashes(pack(demo_folder, tmp_path / "reference"))
    half_made(demo_folder, tmp_path / "pack", monkeypatch)
    written = list((tmp_path / "pack.partial" / "pack").glob("*.experts"))
    assert len(written) == 2
    before = {file.name: file.stat().st_mtime_ns for file in written}
    work = pack(demo_folder, tmp_path / "pack")
    assert hashes(work) == reference
    assert {name: (work / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("choice", [None, (3, 64), (2, 128)])
def test_another_choice_does_not_go_on_with_it(
    choice: tuple[int, int] | None,
    demo_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half_made(demo_folder, tmp_path / "pack", monkeypatch)
    recast = make_recast(*choice) if choice else None
    with pytest.raises(CheckpointError, match="with other bits"):
        plan_pack(open_folder(demo_folder), tmp_path / "pack", recast=recast).write()


def half_made(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_made_by(lambda: pack(source, target), monkeypatch)


def half_made_by(pack: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the third layer."""
    write = pack_module.recast_records
    calls = []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "recast_records", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack()


def test_what_cannot_be_requantized_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("mxfp4", {"bits": 4, "group_size": 32, "mode": "mxfp4"}, "is mxfp4: only affine"),
        ("two", {"bits": 2, "group_size": 32}, "no more than 2 bits already"),
        ("narrow", {"bits": 4, "group_size": 32}, "which groups of 64 do not divide"),
    ]
    for name, changes, message in refused:
        write_checkpoint(*random_model("qwen3_moe", **changes), tmp_path / name)
        with pytest.raises(OptionError, match=message):
            pack(tmp_path / name, tmp_path / "pack")
    assert not list(tmp_path.glob("pack*"))
    for wrong in ({"bits": 5}, {"bits": 2, "group_size": 32}, {"bits": 2, "method": "magic"}):
        with pytest.raises(OptionError, match="choose"):
            make_recast(**wrong)  # type: ignore[arg-type]


def test_matrices_with_few_bits_are_left_alone(demo_folder: Path) -> None:
    skeleton = open_skeleton(open_folder(demo_folder))
    path = next(iter(skeleton.switches))
    layout = skeleton.layout(path)
    few = dict(layout.quantization)["up_proj"]
    assert few is not None
    mixed = replace(
        layout,
        quantization=tuple(
            (name, replace(few, bits=2) if name == "up_proj" else old)
            for name, old in layout.quantization
        ),
    )
    recast = make_recast(3)
    bits = {name: q and q.bits for name, q in recast.layout(mixed, path).quantization}
    assert bits == {"gate_proj": 3, "up_proj": 2, "down_proj": 3}
    config = recast.config({"quantization": {"bits": 4, "group_size": 64}}, {path: mixed})
    assert f"{path}.up_proj" not in config["quantization"]
    assert recast.summary([mixed]).source == "4-bit/2-bit"


def test_headers_of_a_requantized_pack_hold_no_expert(demo_folder: Path, tmp_path: Path) -> None:
    packed = pack(demo_folder, tmp_path / "pack", 3)
    names = read_headers(sorted(packed.glob("model*.safetensors")))
    assert not any("switch_mlp" in name for name in names)
