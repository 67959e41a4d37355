"""Packs of requantized experts against the same weights in memory."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from benchmarks.minmax import by_minmax
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import (
    CheckpointError,
    NativeUnavailable,
    NotContiguous,
    OptionError,
    Remedy,
)
from flash_moe.format.manifest import MANIFEST, read_manifest, verify
from flash_moe.format.safetensors import read_headers
from flash_moe.model.load import load
from flash_moe.pack.fewer_bits import FewerBits, fewer_bits
from flash_moe.pack.job import PackJob
from tests.architectures import random_model, vendor_layout, write_checkpoint
from tests.pack.packs import (
    EXACT,
    PROMPT,
    as_checkpoint,
    hashes,
    interrupt_in_third_layer,
    modified,
    pack,
    wide_model,
)

# What is the same to the bit is so on a CPU.
pytestmark = pytest.mark.usefixtures("on_cpu")


def unavailable() -> object:
    raise NativeUnavailable("there is no compiler")


def fitted(bits: int = 2, group_size: int = 64) -> FewerBits:
    return fewer_bits(bits, group_size)


TRANSFORMS = {"fit": fitted, "minmax": by_minmax}


def pack_by(transform: FewerBits, source: Path, target: Path) -> Path:
    PackJob.with_transform(source, target, transform).write()
    return target


@pytest.fixture(params=TRANSFORMS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (2, 128), (3, 64), (3, 128)])
def test_streamed_as_in_memory(
    bits: int, group_size: int, method: str, demo_folder: Path, tmp_path: Path
) -> None:
    transform = TRANSFORMS[method](bits, group_size)
    packed = pack_by(transform, demo_folder, tmp_path / "pack")
    resident, config = load_model(as_checkpoint(packed, tmp_path / "whole"))
    for path in open_skeleton(open_folder(demo_folder)).switches:
        for name in ("gate_proj", "up_proj", "down_proj"):
            quantization = config["quantization"][f"{path}.{name}"]
            assert quantization == {"bits": bits, "group_size": group_size, "mode": "affine"}
    model = load(packed, EXACT)
    assert model.plan.bits == f"{bits}-bit"
    assert model.lossy == [f"experts requantized from 4-bit to {bits}-bit ({transform.method})"]
    assert np.array_equal(np.array(model(PROMPT)), np.array(resident(PROMPT)))
    model.close()
    assert verify(packed, read_manifest(packed)) == []


def test_without_a_compiler_mlx_fits_and_the_pack_says_so(
    demo_folder: Path, tmp_path: Path
) -> None:
    packed = pack_by(fewer_bits(2, load=unavailable), demo_folder, tmp_path / "pack")
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.lossy == ["experts requantized from 4-bit to 2-bit (fit in MLX)"]
    assert np.array_equal(np.array(model(PROMPT)), np.array(resident(PROMPT)))
    model.close()


def test_packs_of_older_versions_still_load(demo_folder: Path, tmp_path: Path) -> None:
    """They could be made by min/max, and their manifests say so."""
    packed = pack_by(by_minmax(2), demo_folder, tmp_path / "pack")
    manifest = json.loads((packed / MANIFEST).read_bytes())
    assert manifest["requantized"] == {
        "bits": 2,
        "group_size": 64,
        "method": "minmax",
        "source": "4-bit",
    }
    model = load(packed, EXACT)
    assert model.lossy == ["experts requantized from 4-bit to 2-bit (minmax)"]
    model.close()


def test_four_bits_of_floats(tmp_path: Path) -> None:
    write_checkpoint(*wide_model("qwen3_moe", "bfloat16"), tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "pack", bits=4)
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.lossy == [f"experts requantized from bfloat16 to 4-bit ({fitted().method})"]
    assert np.array_equal(
        np.array(model(PROMPT % 100).astype(mx.float32)),
        np.array(resident(PROMPT % 100).astype(mx.float32)),
    )
    model.close()


def test_the_cost_is_counted(demo_folder: Path, tmp_path: Path) -> None:
    """All projections of all experts went in: codes of 4 bits, and two scales for 64 of them."""
    job = PackJob.plan(demo_folder, tmp_path / "pack", bits=2)
    assert job.cost is not None
    assert job.cost.nbytes == 0
    job.write()
    weights = 4 * 8 * 3 * 256 * 128
    assert job.cost.nbytes == weights // 2 + weights // 64 * 8
    assert job.cost.cpu_seconds > 0
    assert job.cost.seconds > 0


def test_experts_are_the_sources_as_near_as_codes_allow(
    method: str, demo_folder: Path, tmp_path: Path
) -> None:
    """And no other weight is changed at all."""
    packed = pack_by(TRANSFORMS[method](2, 64), demo_folder, tmp_path / "pack")
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
        near = np.abs(wide[0] - wide[1]) <= 0.501 * step + 1e-6
        # The fit's outermost levels do not reach the outermost weights.
        within = np.abs(wide[0] - low - 1.5 * step) <= 1.5 * step
        assert np.all(near | ~within if method == "fit" else near)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_unquantized_experts(name: str, tmp_path: Path) -> None:
    """Those of gpt-oss have a bias each, which stays."""
    write_checkpoint(*wide_model(name), tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "pack", bits=2)
    resident, _ = load_model(as_checkpoint(packed, tmp_path / "whole"))
    model = load(packed, EXACT)
    assert model.lossy == [f"experts requantized from float32 to 2-bit ({fitted().method})"]
    assert np.array_equal(np.array(model(PROMPT % 100)), np.array(resident(PROMPT % 100)))
    model.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_of_the_sources_type(dtype: str, tmp_path: Path) -> None:
    write_checkpoint(*wide_model("qwen3_moe", dtype), tmp_path / "source")
    manifest = read_manifest(pack(tmp_path / "source", tmp_path / "pack", bits=2))
    parts = {part.param: part.dtype for part in manifest.layers[0].layout.parts}
    assert parts == {"weight": "uint32", "scales": dtype, "biases": dtype}
    assert manifest.requantized is not None
    assert manifest.requantized.source == dtype


def test_experts_that_cannot_be_read_in_place(tmp_path: Path) -> None:
    """llama4 as its vendor has it, inputs first: the same experts come of it."""
    model, config = wide_model("llama4")
    vendor = vendor_layout("llama4", dict(tree_flatten(model.parameters())))
    for name in ("plain", "vendor"):
        write_checkpoint(model, config, tmp_path / name)
    mx.save_safetensors(str(tmp_path / "vendor" / "model.safetensors"), vendor)
    with pytest.raises(NotContiguous):
        open_skeleton(open_folder(tmp_path / "vendor")).layers()
    plain, turned = (
        hashes(pack(tmp_path / name, tmp_path / f"{name}-pack", bits=2))
        for name in ("plain", "vendor")
    )
    experts = [name for name in plain if name.endswith(".experts")]
    assert experts
    assert [plain[name] for name in experts] == [turned[name] for name in experts]


def test_an_interrupted_pack_resumes_to_the_same_bytes(demo_folder: Path, tmp_path: Path) -> None:
    reference = hashes(pack(demo_folder, tmp_path / "reference", bits=2))
    interrupt_in_third_layer(PackJob.plan(demo_folder, tmp_path / "pack", bits=2))
    before = modified(tmp_path / "pack.partial" / "pack")
    assert len(before) == 2
    packed = pack(demo_folder, tmp_path / "pack", bits=2)
    assert hashes(packed) == reference
    assert before.items() <= modified(packed).items()


@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"bits": 2, "group_size": 128}], ids=str)
def test_another_choice_does_not_resume_it(
    options: dict[str, Any], demo_folder: Path, tmp_path: Path
) -> None:
    interrupt_in_third_layer(PackJob.plan(demo_folder, tmp_path / "pack", bits=2))
    with pytest.raises(CheckpointError, match="with other bits"):
        pack(demo_folder, tmp_path / "pack", **options)


def test_experts_that_cannot_be_requantized_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    refused: list[tuple[str, dict[str, Any], str, Remedy]] = [
        (
            "mxfp4",
            {"bits": 4, "group_size": 32, "mode": "mxfp4"},
            "is mxfp4: only affine",
            Remedy.PACK_WITHOUT_BITS,
        ),
        (
            "two",
            {"bits": 2, "group_size": 32},
            "no more than 2 bits already",
            Remedy.PACK_WITHOUT_BITS,
        ),
        (
            "narrow",
            {"bits": 4, "group_size": 32},
            "which groups of 64 do not divide",
            Remedy.OTHER_GROUP_SIZE,
        ),
    ]
    for name, changes, message, remedy in refused:
        write_checkpoint(*random_model("qwen3_moe", **changes), tmp_path / name)
        with pytest.raises(OptionError, match=message) as refusal:
            pack(tmp_path / name, tmp_path / "pack", bits=2)
        assert refusal.value.remedy is remedy
    assert not list(tmp_path.glob("pack*"))
    for options in ({"bits": 5}, {"bits": 2, "group_size": 32}):
        with pytest.raises(OptionError, match="choose"):
            fewer_bits(**options)


def test_a_transform_is_identified_by_what_it_does() -> None:
    """The keys are in the folders of packs that were interrupted."""
    own = {"bits": 2, "group_size": 64, "method": fitted().method}
    assert fewer_bits(2).to_json() == own
    assert fewer_bits(2, 64, "digest").to_json() == {**own, "calibration": "digest"}
    assert fewer_bits(2, load=unavailable).to_json() == {**own, "method": "fit in MLX"}


def test_how_long_it_takes_is_told_where_it_is_slow(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In proportion to the weights that change: with a clock that moves by one at every look, a
    try takes one second."""
    skeleton = open_skeleton(open_folder(demo_folder))
    layers = {path: (skeleton.layout(path), 8) for path in skeleton.switches}
    slow = fewer_bits(2, load=unavailable)
    assert fitted().slow_seconds(layers) is None
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)
    seconds = slow.slow_seconds(layers)
    monkeypatch.undo()
    # Of 3 matrices of 128 x 256 for 8 experts in 4 layers, in tries of 2^19.
    assert seconds == pytest.approx(3 * 128 * 256 * 8 * 4 / (1 << 19))
    one = dict([next(iter(layers.items()))])
    assert (slow.slow_seconds(one) or 0) > 0
    assert fewer_bits(4, load=unavailable).slow_seconds(layers) == 0


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
    transform = fewer_bits(3)
    bits = {name: q and q.bits for name, q in transform.layout(mixed, path).quantization}
    assert bits == {"gate_proj": 3, "up_proj": 2, "down_proj": 3}
    config = transform.config({"quantization": {"bits": 4, "group_size": 64}}, {path: mixed})
    assert f"{path}.up_proj" not in config["quantization"]
    assert transform.summary([mixed]).source == "4-bit/2-bit"


def test_headers_of_a_requantized_pack_hold_no_expert(demo_folder: Path, tmp_path: Path) -> None:
    packed = pack(demo_folder, tmp_path / "pack", bits=3)
    names = read_headers(sorted(packed.glob("model*.safetensors")))
    assert not any("switch_mlp" in name for name in names)
