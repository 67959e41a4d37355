"""Packs in two planes: one folder that is the 4-bit model and a 2-bit one, both to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.format.layout import AFFINE, SECOND_PLANE
from flash_moe.format.manifest import MANIFEST, read_manifest, verify
from flash_moe.model.load import StreamedModel, load
from flash_moe.pack.job import PackJob
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.stream.precision import Precision
from tests.architectures import random_model, write_checkpoint
from tests.pack.packs import (
    EXACT,
    PROMPT,
    hashes,
    interrupt_in_third_layer,
    modified,
    pack,
    resident_weights,
    stacked,
)
from tests.strategies import edited

# What is the same to the bit is so on a CPU.
pytestmark = pytest.mark.usefixtures("on_cpu")

FIRST_PLANES = Precision(full_experts=0)


@pytest.fixture(scope="module")
def packed(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(demo_folder, tmp_path_factory.mktemp("planes") / "pack", planes=True)


def first_planes(folder: Path, target: Path) -> Path:
    """A pack's first planes as a plain checkpoint of 2 bits, for mlx-lm's own loader."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_bytes())
    weights = resident_weights(folder)
    for layer in read_manifest(folder).layers:
        for part in layer.layout.parts:
            if not part.in_second_plane:
                weights[f"{layer.path}.{part.name}"] = stacked(folder, layer, part)
        for name, packing in layer.layout.quantization:
            assert packing is not None
            own = {"bits": 2, "group_size": packing.group_size, "mode": "affine"}
            config["quantization"][f"{layer.path}.{name}"] = own
    mx.save_safetensors(str(target / "model.safetensors"), weights, {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits(model: StreamedModel) -> np.ndarray:
    return np.array(model(PROMPT))


def test_a_pack_is_both_models_to_the_bit(packed: Path, demo_folder: Path, tmp_path: Path) -> None:
    four, _ = load_model(demo_folder)
    two, _ = load_model(first_planes(packed, tmp_path / "two"))
    model = load(packed, EXACT)
    counters = model.streamer.reader.counters
    assert np.array_equal(logits(model), np.array(four(PROMPT)))
    both = counters.nbytes
    model.streamer.precision = FIRST_PLANES
    assert np.array_equal(logits(model), np.array(two(PROMPT)))
    first = counters.nbytes - both
    layout = model.streamer.store.layers[0].layout
    assert first * layout.stride == both * layout.first_plane_bytes
    model.close()
    assert not np.array_equal(np.array(four(PROMPT)), np.array(two(PROMPT)))
    assert verify(packed, read_manifest(packed)) == []


def test_some_ranks_in_full(packed: Path, demo_folder: Path, tmp_path: Path) -> None:
    """None and all of four experts are the two models; what is between reads less than all."""
    two, _ = load_model(first_planes(packed, tmp_path / "two"))
    four, _ = load_model(demo_folder)
    results, read = {}, {}
    for ranks in (0, 2, 4):
        model = load(packed, replace(EXACT, full_experts=ranks))
        results[ranks] = logits(model)
        read[ranks] = model.streamer.reader.counters.nbytes
        model.close()
    np.testing.assert_allclose(results[0], np.array(two(PROMPT)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(results[4], np.array(four(PROMPT)), rtol=1e-4, atol=1e-4)
    assert abs(results[2] - results[0]).max() > 1e-2
    assert abs(results[2] - results[4]).max() > 1e-2
    assert read[0] < read[2] <= read[4]


def test_the_plan_knows_what_is_read(packed: Path, demo_folder: Path) -> None:
    model, source = load(packed, EXACT), load(demo_folder, EXACT)
    plan, layout = model.plan, model.streamer.store.layers[0].layout
    assert plan.bits == "4-bit in two planes"
    assert model.lossy == []
    assert (plan.record_bytes, plan.first_plane_bytes) == (layout.nbytes, layout.first_plane_bytes)
    assert plan.token_bytes == 4 * 4 * layout.nbytes
    assert plan.bank_bytes == plan.bank_slots * layout.stride
    assert source.plan.first_plane_bytes is None
    assert plan.record_bytes > source.plan.record_bytes
    model.close()
    source.close()


def test_the_manifest_says_so(packed: Path, demo_folder: Path) -> None:
    summary = read_manifest(packed).requantized
    assert summary is not None
    assert str(summary) == "experts in two planes: 2-bit, or 4-bit as they were"
    assert (summary.bits, summary.group_size, summary.source) == (2, 64, "4-bit")
    before, after = (
        json.loads((folder / "config.json").read_bytes()) for folder in (demo_folder, packed)
    )
    assert before["quantization"] == after["quantization"]


def test_a_transform_is_identified_by_what_it_does() -> None:
    """The keys are in the folders of packs that were interrupted."""
    assert TwoPlanes().to_json() == {"method": "two planes"}
    assert TwoPlanes("a text").to_json() == {"method": "two planes", "calibration": "a text"}


def test_the_cost_is_counted(demo_folder: Path, tmp_path: Path) -> None:
    job = PackJob.plan(demo_folder, tmp_path / "pack", planes=True)
    job.write()
    weights = 4 * 8 * 3 * 256 * 128
    assert job.cost is not None
    assert job.cost.nbytes == weights // 2 + weights // 64 * 8
    assert job.cost.cpu_seconds > 0


def test_an_interrupted_pack_resumes_to_the_same_bytes(
    packed: Path, demo_folder: Path, tmp_path: Path
) -> None:
    interrupt_in_third_layer(PackJob.plan(demo_folder, tmp_path / "pack", planes=True))
    before = modified(tmp_path / "pack.partial" / "pack")
    assert len(before) == 2
    with pytest.raises(CheckpointError, match="with other bits"):
        pack(demo_folder, tmp_path / "pack")
    resumed = pack(demo_folder, tmp_path / "pack", planes=True)
    assert hashes(resumed) == hashes(packed)
    assert before.items() <= modified(resumed).items()


def test_scales_of_16_bits_and_biases_beside_them(tmp_path: Path) -> None:
    """gpt-oss has a bias for each matrix, which both kinds of pairs need."""
    model, config = random_model("gpt_oss", bits=4, group_size=32)
    model.set_dtype(mx.bfloat16)
    write_checkpoint(model, config, tmp_path / "source")
    packed = pack(tmp_path / "source", tmp_path / "pack", planes=True)
    layout = read_manifest(packed).layers[0].layout
    params = [part.param for part in layout.parts if part.projection == "up_proj"]
    assert params == ["weight", "scales", "biases", "bias", *SECOND_PLANE]
    assert {p.dtype for p in layout.parts if p.param not in ("weight", "rest")} == {"bfloat16"}
    resident, _ = load_model(tmp_path / "source")
    opened = load(packed, EXACT)
    got, expected = (m(PROMPT % 100).astype(mx.float32) for m in (opened, resident))
    assert mx.array_equal(got, expected)
    opened.close()


def test_other_experts_are_refused_before_anything_is_written(
    demo_folder: Path, tmp_path: Path
) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("mxfp4", {"bits": 4, "group_size": 32, "mode": "mxfp4"}, "gate_proj is mxfp4: only"),
        ("eight", {"bits": 8, "group_size": 32}, "gate_proj is 8-bit: only experts of 4 bits"),
        ("plain", {}, "gate_proj is not quantized: .* or without planes"),
    ]
    for name, changes, message in refused:
        write_checkpoint(*random_model("qwen3_moe", **changes), tmp_path / name)
        with pytest.raises(OptionError, match=message) as refusal:
            pack(tmp_path / name, tmp_path / "pack", planes=True)
        assert refusal.value.remedy is Remedy.PACK_WITHOUT_PLANES
    assert not list(tmp_path.glob("pack*"))
    skeleton = open_skeleton(open_folder(demo_folder))
    path = next(iter(skeleton.switches))
    layout = skeleton.layout(path)
    (first, packing), *others = layout.quantization
    assert packing is not None
    mixed = replace(layout, quantization=((first, packing), *[(n, None) for n, _ in others]))
    with pytest.raises(OptionError, match="up_proj is not quantized"):
        TwoPlanes().layout(mixed, path)


@given(st.data())
@settings(max_examples=100)
def test_a_broken_manifest_never_loads(
    packed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Or it is sound, and what it says about planes is true of the files."""
    scratch = tmp_path_factory.getbasetemp() / "edited-planes"
    scratch.mkdir(exist_ok=True)
    for file in packed.iterdir():
        if not (scratch / file.name).exists():
            (scratch / file.name).symlink_to(file)
    (scratch / MANIFEST).unlink()
    value = json.loads((packed / MANIFEST).read_bytes())
    value["layouts"] = data.draw(edited(value["layouts"]))
    (scratch / MANIFEST).write_text(json.dumps(value))
    try:
        skeleton = open_skeleton(open_folder(scratch))
        layers = skeleton.layers()
    except CheckpointError:
        return
    for layer in layers:
        assert layer.layout.two_planes
        assert {part.name for part in layer.layout.parts} == {
            f"{name}.{param}"
            for name in ("gate_proj", "up_proj", "down_proj")
            for param in (*AFFINE, *SECOND_PLANE)
        }
        assert layer.nbytes <= (packed / "layer_000.experts").stat().st_size


def test_other_packs_are_what_they_were(demo_folder: Path, tmp_path: Path) -> None:
    """A pack in one plane reads whole records, whatever the streamer says."""
    pack(demo_folder, tmp_path / "pack")
    results = []
    for precision in (Precision(), FIRST_PLANES):
        model = load(tmp_path / "pack", EXACT)
        model.streamer.precision = precision
        results.append((logits(model).tobytes(), model.streamer.reader.counters.nbytes))
        model.close()
    assert results[0] == results[1]
