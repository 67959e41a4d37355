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
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.format.layout import CODES, RESTS
from flash_moe.format.manifest import MANIFEST, read_manifest, verify
from flash_moe.model.load import StreamedModel, load
from flash_moe.pack.job import plan_pack
from flash_moe.pack.split_planes import make_planes
from tests.architectures import random_model, write_checkpoint
from tests.pack.test_crash import hashes
from tests.pack.test_requantize import EXACT, PROMPT, half_made_by
from tests.plugin.terminal import fails, llm, works
from tests.strategies import edited


def pack(source: Path, target: Path) -> Path:
    plan_pack(open_folder(source), target, recast=make_planes()).write()
    return target


@pytest.fixture(scope="module")
def packed(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(demo_folder, tmp_path_factory.mktemp("planes") / "pack")


def first_planes(folder: Path, target: Path) -> Path:
    """A pack's first planes as a plain checkpoint of 2 bits, for mlx-lm's own loader."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_bytes())
    weights: dict[str, mx.array] = {}
    for shard in folder.glob("model*.safetensors"):
        weights |= mx.load(str(shard))  # type: ignore[arg-type]
    for layer in read_manifest(folder).layers:
        records = np.fromfile(folder / layer.file, np.uint8).reshape(layer.experts, -1)
        for part in layer.layout.parts:
            if part.param not in RESTS:
                raw = np.ascontiguousarray(records[:, part.offset : part.offset + part.nbytes])
                array = mx.array(raw).view(getattr(mx, part.dtype))
                weights[f"{layer.path}.{part.name}"] = array.reshape(layer.experts, *part.shape)
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
    assert np.array_equal(logits(model), np.array(four(PROMPT)))
    whole = model.streamer.reader.counters.nbytes
    model.streamer.whole = False
    assert np.array_equal(logits(model), np.array(two(PROMPT)))
    first = model.streamer.reader.counters.nbytes - whole
    layout = model.streamer.store.layers[0].layout
    assert first * layout.stride == whole * layout.first_bytes
    model.close()
    assert not np.array_equal(np.array(four(PROMPT)), np.array(two(PROMPT)))
    assert verify(packed, read_manifest(packed)) == []


def test_some_ranks_whole(packed: Path, demo_folder: Path, tmp_path: Path) -> None:
    """As a choice of experts asks for it: none and all of four are the two models."""
    two, _ = load_model(first_planes(packed, tmp_path / "two"))
    four, _ = load_model(demo_folder)
    found, read = {}, {}
    for ranks in (0, 2, 4):
        model = load(packed, replace(EXACT, whole=ranks))
        found[ranks] = logits(model)
        read[ranks] = model.streamer.reader.counters.nbytes
        model.close()
    np.testing.assert_allclose(found[0], np.array(two(PROMPT)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[4], np.array(four(PROMPT)), rtol=1e-4, atol=1e-4)
    assert abs(found[2] - found[0]).max() > 1e-2
    assert abs(found[2] - found[4]).max() > 1e-2
    assert read[0] < read[2] <= read[4]


def test_a_plan_tells_what_is_read(packed: Path, demo_folder: Path) -> None:
    model, source = load(packed, EXACT), load(demo_folder, EXACT)
    plan, layout = model.plan, model.streamer.store.layers[0].layout
    assert plan.bits == "4-bit in two planes"
    assert plan.lossy == []
    assert (plan.record_bytes, plan.first_bytes) == (layout.nbytes, layout.first_bytes)
    assert plan.token_bytes == 4 * 4 * layout.nbytes
    assert plan.bank_bytes == plan.bank_slots * layout.stride
    assert source.plan.first_bytes is None
    assert plan.record_bytes > source.plan.record_bytes
    model.close()
    source.close()


def test_a_pack_says_so(packed: Path, demo_folder: Path) -> None:
    made = read_manifest(packed).requantized
    assert made is not None
    assert str(made) == "experts in two planes: 2-bit, or 4-bit as they were"
    assert (made.bits, made.group_size, made.source) == (2, 64, "4-bit")
    before, after = (
        json.loads((folder / "config.json").read_bytes()) for folder in (demo_folder, packed)
    )
    assert before["quantization"] == after["quantization"]


def test_another_choice_is_told_apart() -> None:
    assert make_planes().to_json() == {"method": "two planes"}
    assert make_planes("a text").to_json() != make_planes("another").to_json()


def test_what_was_spent_is_counted(demo_folder: Path, tmp_path: Path) -> None:
    planes = make_planes()
    plan_pack(open_folder(demo_folder), tmp_path / "pack", recast=planes).write()
    weights = 4 * 8 * 3 * 256 * 128
    assert planes.spent.nbytes == weights // 2 + weights // 64 * 8
    assert planes.spent.cpu_seconds > 0


def test_an_interrupted_pack_goes_on_to_the_same_bytes(
    packed: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_made_by(lambda: pack(demo_folder, tmp_path / "pack"), monkeypatch)
    written = list((tmp_path / "pack.partial" / "pack").glob("*.experts"))
    assert len(written) == 2
    before = {file.name: file.stat().st_mtime_ns for file in written}
    with pytest.raises(CheckpointError, match="with other bits"):
        plan_pack(open_folder(demo_folder), tmp_path / "pack").write()
    work = pack(demo_folder, tmp_path / "pack")
    assert hashes(work) == hashes(packed)
    assert {name: (work / name).stat().st_mtime_ns for name in before} == before


def test_scales_of_16_bits_and_biases_beside_them(tmp_path: Path) -> None:
    """gpt-oss has a bias for each matrix, which both kinds of pairs need."""
    model, config = random_model("gpt_oss", bits=4, group_size=32)
    model.set_dtype(mx.bfloat16)
    write_checkpoint(model, config, tmp_path / "source")
    work = pack(tmp_path / "source", tmp_path / "pack")
    layout = read_manifest(work).layers[0].layout
    params = [part.param for part in layout.parts if part.projection == "up_proj"]
    assert params == ["weight", "scales", "biases", "bias", *RESTS]
    assert {p.dtype for p in layout.parts if "weight" not in p.param and p.param != "rest"} == {
        "bfloat16"
    }
    resident, _ = load_model(tmp_path / "source")
    opened = load(work, EXACT)
    got, wanted = (m(PROMPT % 100).astype(mx.float32) for m in (opened, resident))
    assert mx.array_equal(got, wanted)
    opened.close()


def test_other_experts_are_refused_before_anything_is_written(
    demo_folder: Path, tmp_path: Path
) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("mxfp4", {"bits": 4, "group_size": 32, "mode": "mxfp4"}, "gate_proj is mxfp4: only"),
        ("eight", {"bits": 8, "group_size": 32}, "gate_proj is 8-bit: only experts of 4 bits"),
        ("plain", {}, "gate_proj is not quantized: .* leave out --planes"),
    ]
    for name, changes, message in refused:
        write_checkpoint(*random_model("qwen3_moe", **changes), tmp_path / name)
        with pytest.raises(OptionError, match=message):
            pack(tmp_path / name, tmp_path / "pack")
    assert not list(tmp_path.glob("pack*"))
    skeleton = open_skeleton(open_folder(demo_folder))
    path = next(iter(skeleton.switches))
    layout = skeleton.layout(path)
    (first, packing), *others = layout.quantization
    assert packing is not None
    mixed = replace(layout, quantization=((first, packing), *[(n, None) for n, _ in others]))
    with pytest.raises(OptionError, match="up_proj is not quantized"):
        make_planes().layout(mixed, path)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_broken_manifest_never_loads(
    packed: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Or it is a sound one, and what it says of planes is true of the files."""
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
        assert layer.layout.planes
        assert {part.name for part in layer.layout.parts} == {
            f"{name}.{param}"
            for name in ("gate_proj", "up_proj", "down_proj")
            for param in (*CODES, *RESTS)
        }
        assert layer.nbytes <= (packed / "layer_000.experts").stat().st_size


def test_other_packs_are_what_they_were(demo_folder: Path, tmp_path: Path) -> None:
    """A pack in one plane reads whole records, whatever the streamer says."""
    plan_pack(open_folder(demo_folder), tmp_path / "pack").write()
    found = []
    for whole in (True, False):
        model = load(tmp_path / "pack", EXACT)
        model.streamer.whole = whole
        found.append((logits(model).tobytes(), model.streamer.reader.counters.nbytes))
        model.close()
    assert found[0] == found[1]


# The command


def test_pack_and_what_is_said_of_it(demo_folder: Path, tmp_path: Path) -> None:
    said = works("flash-moe", "pack", demo_folder, "--planes", "--to", tmp_path / "pack").stdout
    assert said.startswith("Quantized 2.0 MB of experts (two planes) at ")
    assert "demo-planes: qwen3_5_moe, 4-bit in two planes, pack\n" in said
    assert "\n  experts in two planes: 2-bit, or 4-bit as they were\n" in said
    assert "kB each, of which a first plane is 49 kB\n" in said
    assert "less exact" not in said
    assert said.endswith('Ready: llm -m demo-planes "your prompt"\n')
    listed = works("flash-moe", "models").stdout.splitlines()[-1]
    assert listed.endswith("  (experts in two planes: 2-bit, or 4-bit as they were)")
    plan = json.loads(works("flash-moe", "info", "demo-planes", "--json").stdout)
    assert plan["requantized"]["method"] == "two planes"
    assert 0 < plan["first_bytes"] < plan["record_bytes"]
    sound = works("flash-moe", "info", "demo-planes", "--verify").stdout
    assert sound.endswith("Every file and record is as it was written.\n")


def test_a_packed_model_replies_as_its_source(demo_folder: Path, tmp_path: Path) -> None:
    works("flash-moe", "pack", demo_folder, "--planes", "--to", tmp_path / "pack")
    works("flash-moe", "add", demo_folder)
    ask = ("-o", "max_tokens", 12, "-o", "runtime", "mlx", "Hello")
    replies = {works("-m", name, *ask).stdout for name in ("demo", "demo-planes")}
    assert len(replies) == 1
    logged = json.loads(works("logs", "-n", 1, "--json").stdout)
    assert logged[0]["response_json"]["lossy"] == []


def test_planes_go_without_bits(demo_folder: Path, tmp_path: Path) -> None:
    for more in (("--bits", 2), ("--bits", 3, "--group-size", 128), ("--group-size", 64)):
        refused = llm("flash-moe", "pack", demo_folder, "--planes", *more)
        assert refused.exit_code == 2
        assert "--bits" in refused.stderr
    write_checkpoint(*random_model("qwen3_moe", bits=8, group_size=32), tmp_path / "eight")
    message = fails("flash-moe", "pack", tmp_path / "eight", "--planes")
    assert message.endswith("or pack it as it is: leave out --planes")
