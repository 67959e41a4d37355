"""Synthetic checkpoints are real ones: mlx-lm loads them strictly and computes finite logits."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, NoSpace, OptionError, Remedy
from flash_moe.synth.job import SynthJob
from flash_moe.synth.model import MARK, SHAPES, nbytes, synthesize
from tests.strategies import TINY, tiny_checkpoint


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("bits", "dtype"), [(4, "float32"), (2, "bfloat16"), (3, "float16"), (8, "float32")]
)
def test_mlx_lm_loads_it_strictly(tmp_path: Path, bits: int, dtype: str) -> None:
    folder = tiny_checkpoint(tmp_path / "model", bits=bits, dtype=dtype)
    model, config = load_model(folder, strict=True)
    logits = model(mx.array([[1, 2, 3]])).astype(mx.float32)
    assert config["quantization"]["bits"] == bits
    assert logits.shape == (1, 3, TINY.vocabulary)
    assert mx.isfinite(logits).all().item()
    # Weights of variance 1/inputs: logits neither vanish nor drown, and differ by position.
    assert 0.1 < mx.std(logits).item() < 100
    assert not mx.array_equal(logits[0, 0], logits[0, 2]).item()


def test_the_size_is_known_before(tmp_path: Path) -> None:
    written: list[int] = []
    folder = tiny_checkpoint(tmp_path / "model", progress=written.append)
    assert sum(written) == nbytes(TINY) == open_folder(folder).nbytes


def test_sparse_headers_are_the_real_ones(tmp_path: Path) -> None:
    real = open_folder(tiny_checkpoint(tmp_path / "real"))
    sparse = open_folder(tiny_checkpoint(tmp_path / "sparse", sparse=True))
    assert {name: replace(tensor, file=Path()) for name, tensor in sparse.tensors.items()} == {
        name: replace(tensor, file=Path()) for name, tensor in real.tensors.items()
    }
    for file in real.path.glob("*.safetensors"):
        twin = sparse.path / file.name
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert twin.read_bytes()[:header] == file.read_bytes()[:header]
        assert twin.stat().st_size == file.stat().st_size
        assert not any(twin.read_bytes()[header:])
    assert sparse.config == real.config


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    one = hashes(tiny_checkpoint(tmp_path / "one", seed=5))
    assert one == hashes(tiny_checkpoint(tmp_path / "two", seed=5))
    other = hashes(tiny_checkpoint(tmp_path / "other", seed=6))
    assert {name for name in one if one[name] != other[name]} == {
        name for name in one if name.endswith(".safetensors")
    }


def test_no_two_experts_are_equal(tmp_path: Path) -> None:
    weights = mx.load(str(next(tiny_checkpoint(tmp_path / "model").glob("*.safetensors"))))
    stacks = [
        array for name, array in weights.items() if "switch_mlp" in name and name.endswith("weight")
    ]
    assert len(stacks) == 3 * TINY.layers
    experts = {bytes(memoryview(mx.contiguous(row))) for stack in stacks for row in stack}
    assert len(experts) == len(stacks) * TINY.experts


@pytest.mark.parametrize(("free", "enough"), [(-1, False), (0, True)])
def test_too_little_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, enough: bool
) -> None:
    usage = SimpleNamespace(free=nbytes(TINY) + free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    if enough:
        tiny_checkpoint(tmp_path / "model")
        return
    with pytest.raises(NoSpace) as refusal:
        tiny_checkpoint(tmp_path / "model")
    assert refusal.value.remedy is Remedy.PACK_ELSEWHERE
    assert not list(tmp_path.iterdir())
    tiny_checkpoint(tmp_path / "model", sparse=True)


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        tiny_checkpoint(tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_a_half_made_checkpoint_does_not_load_and_is_begun_anew(tmp_path: Path) -> None:
    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_checkpoint(tmp_path / "model", progress=stop)
    assert not (tmp_path / "model").exists()
    with pytest.raises(CheckpointError):
        open_folder(tmp_path / "model.partial")
    folder = tiny_checkpoint(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert hashes(folder) == hashes(tiny_checkpoint(tmp_path / "again"))


def test_what_others_began_is_left_alone(tmp_path: Path) -> None:
    """A pack's folder, or a user's own; and another process that makes the same model."""
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / "source.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no model of random weights was begun there"):
        tiny_checkpoint(tmp_path / "model")
    assert hashes(partial).keys() == {"source.json"}
    shutil.rmtree(partial)

    def meanwhile(nbytes: int) -> None:
        with pytest.raises(CheckpointError, match="Another model is being written"):
            tiny_checkpoint(tmp_path / "model")

    tiny_checkpoint(tmp_path / "model", progress=meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    partial = tmp_path / "model.partial"
    partial.mkdir()
    (partial / MARK).touch()
    (partial / "model-00007-of-00009.safetensors").write_bytes(b"half")
    folder = tiny_checkpoint(tmp_path / "model")
    assert hashes(folder) == hashes(tiny_checkpoint(tmp_path / "again"))
    assert not partial.exists()


@pytest.mark.parametrize(
    "changes",
    [{"vocabulary": 100}, {"hidden": 100}, {"intermediate": 100}],
    ids=["vocabulary", "hidden", "intermediate"],
)
def test_impossible_shapes(tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        synthesize(tmp_path / "model", replace(TINY, **changes))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"bits": 7}, {"dtype": "int8"}, {"group_size": 48}], ids=str)
def test_impossible_options(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(OptionError):
        tiny_checkpoint(tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_a_job_is_a_named_shape_with_some_numbers_changed(tmp_path: Path) -> None:
    job = SynthJob.plan("small", layers=4, experts=3, bits=2)
    assert job.shape == replace(SHAPES["small"], layers=4, experts=3, experts_per_token=3)
    written: list[int] = []
    job.write(tmp_path / "model", written.append)
    folder = open_folder(tmp_path / "model")
    assert sum(written) == job.nbytes == folder.nbytes
    assert folder.config["quantization"]["bits"] == 2
    assert SynthJob.plan("397b").shape == SHAPES["397b"]
    with pytest.raises(OptionError, match="choose small or 397b"):
        SynthJob.plan("large")
