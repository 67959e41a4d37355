"""Reading a text to calibrate with, and the packs that are fitted by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import CheckpointError, FlashMoeError, OptionError, Remedy
from flash_moe.format.manifest import read_manifest
from flash_moe.native.build import find_compiler
from flash_moe.pack.activations import LayerSums
from flash_moe.pack.calibrate import SUMS_FILE, Calibration, Steps, read_calibration
from flash_moe.pack.job import PackJob
from tests.architectures import vendor_layout, write_checkpoint
from tests.pack.packs import as_checkpoint, interrupt, pack, wide_model
from tests.pack.test_activations import assert_same, float64

IDS = np.random.default_rng(5).integers(0, 90, 700).tolist()
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("read", [1, 4, 5])
def test_an_interrupted_reading_resumes(read: int, demo_folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(demo_folder, "", IDS[:100], Steps(window=16, saved_every=2))
    (tmp_path / "whole").mkdir()
    whole = calibration.collect(tmp_path / "whole")
    interrupt(lambda progress: calibration.collect(tmp_path, progress), read)
    amounts: list[int] = []
    rest = calibration.collect(tmp_path, amounts.append)
    assert amounts[0] == read // 2 * 2 * 16
    assert sum(amounts) == 100
    for path, sums in whole.layers.items():
        for name in LayerSums.__slots__:
            assert np.array_equal(getattr(sums, name), getattr(rest.layers[path], name))
    amounts.clear()
    assert_same(calibration.collect(tmp_path, amounts.append).layers, whole.layers, 1e-9)
    assert amounts == [100]


def test_sums_that_cannot_be_read_are_collected_anew(demo_folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(demo_folder, "", IDS[:20])
    whole = calibration.collect(tmp_path)
    file = tmp_path / SUMS_FILE
    for data in (b"", b"PK no zip", file.read_bytes()[:300]):
        file.write_bytes(data)
        assert_same(calibration.collect(tmp_path).layers, whole.layers, 1e-9)


def test_sums_of_older_versions_are_read(demo_folder: Path, tmp_path: Path) -> None:
    """The names of file and arrays are those of packs that were interrupted."""
    Calibration(demo_folder, "", IDS[:20]).collect(tmp_path)
    with np.load(tmp_path / "calibration.npz") as arrays:
        keys = {key for key in arrays.files if key != "position"}
        assert arrays["position"] == 20
    paths = open_skeleton(open_folder(demo_folder)).switches
    names = ("inputs", "inner", "routed")
    assert keys == {json.dumps([path, name]) for path in paths for name in names}


def test_numbers_that_are_not_finite_are_refused(demo_folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(demo_folder, "", IDS[:20])
    calibration.collect(tmp_path)
    with np.load(tmp_path / SUMS_FILE) as arrays:
        saved = {key: arrays[key] for key in arrays.files}
    key = next(key for key in saved if "inner" in key)
    saved[key][0, 0] = np.inf
    np.savez(tmp_path / SUMS_FILE, **saved)
    with pytest.raises(CheckpointError, match="not finite") as refusal:
        calibration.collect(tmp_path)
    assert refusal.value.remedy is Remedy.PACK_WITHOUT_CALIBRATION


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Tokens of which every expert gets some."""
    words = np.random.default_rng(5).integers(97, 123, (1200, 3)).astype(np.uint8)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(bytes(word).decode() for word in words))
    return file


@pytest.mark.skipif(find_compiler() is None, reason="only the fit in C is the optimum")
def test_no_group_fits_worse_what_it_is_multiplied_with(
    demo_folder: Path, text: Path, tmp_path: Path
) -> None:
    """From codes of 4 bits the fit is the optimum, except for the rounding of scale and bias."""
    job = PackJob.plan(demo_folder, tmp_path / "with", bits=2, calibration=text).calibrate()
    job.write()
    pack(demo_folder, tmp_path / "plain", bits=2)
    importance = job.importance
    assert importance is not None
    folders = [as_checkpoint(tmp_path / n, tmp_path / f"{n}-whole") for n in ("with", "plain")]
    source, weighed, plain = (
        open_skeleton(open_folder(folder)).switches for folder in (demo_folder, *folders)
    )
    better = 0
    for path in source:
        for name in PROJECTIONS:
            exact, ours, theirs = (float64(s[path][name]) for s in (source, weighed, plain))
            for expert in range(len(exact)):
                columns = importance.of(path, name, expert)
                if columns is None:
                    assert np.array_equal(ours[expert], theirs[expert])
                    continue
                got, base = (
                    (columns * (fitted[expert] - exact[expert]) ** 2).reshape(-1, 64).sum(axis=1)
                    for fitted in (ours, theirs)
                )
                assert np.all(got <= base * (1 + 1e-4) + 1e-9 * base.mean())
                better += int((got < 0.999 * base).sum())
    assert better > 1000


def test_a_first_plane_is_weighed_and_all_bits_stay(
    demo_folder: Path, text: Path, tmp_path: Path
) -> None:
    """The halves of codes are what they were; only scale and bias of the first plane differ."""
    pack(demo_folder, tmp_path / "with", planes=True, calibration=text)
    pack(demo_folder, tmp_path / "plain", planes=True)
    for name, method in (("with", "two planes, calibrated"), ("plain", "two planes")):
        summary = read_manifest(tmp_path / name).requantized
        assert summary is not None
        assert summary.two_planes
        assert str(summary) == f"experts in {method}: 2-bit, or 4-bit as they were"
    layout = open_skeleton(open_folder(tmp_path / "with")).layers()[0].layout
    weighed, plain = (
        np.fromfile(tmp_path / name / "layer_000.experts", np.uint8).reshape(-1, layout.stride)
        for name in ("with", "plain")
    )
    for part in layout.parts:
        here = slice(part.offset, part.offset + part.nbytes)
        same = np.array_equal(weighed[:, here], plain[:, here])
        assert same == (part.param not in ("scales", "biases")), part.name


def test_lines_of_text_and_of_messages(demo_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. " * 600},
    ]
    lines = [json.dumps({"text": "One. "}), "", json.dumps({"messages": messages, "reply": 1})]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    (tmp_path / "some.txt").write_text("\n".join(lines))
    parsed, plain = (
        read_calibration(demo_folder, tmp_path / f"some.{suffix}") for suffix in ("jsonl", "txt")
    )
    chat = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert parsed.ids == [*tokenizer.encode("One. "), *chat]
    assert plain.ids == tokenizer.encode("\n".join(lines))
    assert parsed.digest == plain.digest
    (tmp_path / "some.txt").write_text("\n".join(lines) + " ")
    assert read_calibration(demo_folder, tmp_path / "some.txt").digest != parsed.digest


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "Cannot read"),
        ("empty.txt", b"", "has 0 tokens"),
        ("short.txt", b"Hello there. " * 9, "Give a text of at least 1,000 tokens"),
        ("latin.txt", "Größe ".encode("latin-1") * 999, "is not UTF-8"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": ', "line 2: "),
        ("list.jsonl", b"[]", "line 1: it is neither"),
        ("other.jsonl", b'{"prompt": "a"}', "line 1: it is neither"),
        ("number.jsonl", b'{"text": 1}', "line 1: text is not a text"),
        ("roles.jsonl", b'{"messages": [{"content": "a"}]}', "line 1: text is not a text"),
    ],
)
def test_unusable_files_are_refused_before_anything_is_written(
    name: str, data: bytes | None, message: str, demo_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(FlashMoeError, match=message) as refusal:
        PackJob.plan(demo_folder, tmp_path / "packs" / "pack", bits=2, calibration=file)
    assert str(file) in str(refusal.value)
    assert refusal.value.remedy is Remedy.OTHER_CALIBRATION
    assert not (tmp_path / "packs").exists()


def test_experts_that_cannot_be_streamed_are_refused(
    demo_folder: Path, text: Path, tmp_path: Path
) -> None:
    model, config = wide_model("llama4")
    write_checkpoint(model, config, tmp_path / "vendor")
    vendor = vendor_layout("llama4", dict(tree_flatten(model.parameters())))
    mx.save_safetensors(str(tmp_path / "vendor" / "model.safetensors"), vendor)
    for file in demo_folder.glob("token*"):
        (tmp_path / "vendor" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(OptionError, match="without calibration") as refusal:
        PackJob.plan(tmp_path / "vendor", tmp_path / "pack", bits=2, calibration=text)
    assert refusal.value.remedy is Remedy.PACK_WITHOUT_CALIBRATION


def test_a_job_calibrates_once_and_by_itself(demo_folder: Path, text: Path, tmp_path: Path) -> None:
    job = PackJob.plan(demo_folder, tmp_path / "pack", bits=2, calibration=text)
    amounts: list[int] = []
    calibrated = job.calibrate(amounts.append)
    assert sum(amounts) == job.calibration_tokens > 1000
    assert calibrated.calibrate(amounts.append) is calibrated
    assert job.importance is None
    assert calibrated.importance is not None
    assert (calibrated.importance.missed, calibrated.importance.experts) == (0, 4 * 8)
    assert calibrated.how == f"{job.how}, calibrated"
    manifest = job.write()
    assert manifest.requantized is not None
    assert manifest.requantized.method == calibrated.how
    plain = PackJob.plan(demo_folder, tmp_path / "plain", bits=2)
    assert plain.calibrate() is plain
    assert plain.calibration_tokens == 0


def test_another_text_does_not_resume_a_pack(demo_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 2}
    jobs = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Hello {name} there, how are you? " * 90)
        calibration = tmp_path / f"{name}.txt"
        jobs.append(
            PackJob.plan(demo_folder, tmp_path / "pack", **options, calibration=calibration)
        )
    one, two = jobs
    interrupt(one.calibrate().write, 30)
    for other in (two, PackJob.plan(demo_folder, tmp_path / "pack", **options)):
        with pytest.raises(CheckpointError, match="or another text"):
            other.write()
    one.write()
