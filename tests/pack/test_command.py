"""`llm flash-moe pack`, for what it passes to the engine and says about the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash_moe.pack.fewer_bits import fewer_bits
from flash_moe.pack.job import PackJob
from tests.architectures import random_model, write_checkpoint
from tests.plugin.terminal import fails, llm, works

TEXT = "Hello there, how are you? " * 90


def test_planes_and_what_is_said_about_them(demo_folder: Path, tmp_path: Path) -> None:
    text = works("flash-moe", "pack", demo_folder, "--planes", "--to", tmp_path / "pack").stdout
    assert text.startswith("Quantized 2.0 MB of experts (two planes) at ")
    assert "demo-planes: qwen3_5_moe, 4-bit in two planes, pack\n" in text
    assert "\n  experts in two planes: 2-bit, or 4-bit as they were\n" in text
    assert "kB each, of which a first plane is 49 kB\n" in text
    assert "less exact" not in text
    assert text.endswith('Ready: llm -m demo-planes "your prompt"\n')
    listed = works("flash-moe", "models").stdout.splitlines()[-1]
    assert listed.endswith("  (experts in two planes: 2-bit, or 4-bit as they were)")
    plan = json.loads(works("flash-moe", "info", "demo-planes", "--json").stdout)
    assert plan["requantized"]["method"] == "two planes"
    assert 0 < plan["first_plane_bytes"] < plan["record_bytes"]
    sound = works("flash-moe", "info", "demo-planes", "--verify").stdout
    assert sound.endswith("Every file and record is as it was written.\n")


@pytest.mark.usefixtures("on_cpu")
def test_a_pack_in_planes_replies_as_its_source(demo_folder: Path, tmp_path: Path) -> None:
    works("flash-moe", "pack", demo_folder, "--planes", "--to", tmp_path / "pack")
    works("flash-moe", "add", demo_folder)
    ask = ("-o", "max_tokens", 12, "-o", "runtime", "mlx", "Hello")
    replies = {works("-m", name, *ask).stdout for name in ("demo", "demo-planes")}
    assert len(replies) == 1
    logged = json.loads(works("logs", "-n", 1, "--json").stdout)
    assert logged[0]["response_json"]["lossy"] == []


def test_options_that_contradict_each_other(demo_folder: Path, tmp_path: Path) -> None:
    for more in (("--bits", 2), ("--bits", 3, "--group-size", 128), ("--group-size", 64)):
        refused = llm("flash-moe", "pack", demo_folder, "--planes", *more)
        assert refused.exit_code == 2
        assert "--bits" in refused.stderr
    refused = llm("flash-moe", "pack", demo_folder, "--calibrate", "text.txt")
    assert refused.exit_code == 2
    assert "--calibrate goes with --" in refused.stderr
    write_checkpoint(*random_model("qwen3_moe", bits=8, group_size=32), tmp_path / "eight")
    assert "eave out --planes" in fails("flash-moe", "pack", tmp_path / "eight", "--planes")


@pytest.mark.parametrize(
    ("seconds", "told"), [(20.0, "about 1 min."), (1800.0, "about 30 min."), (9000.0, "2.5 hours.")]
)
def test_a_slow_pack_says_so_before_it_begins(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, told: str
) -> None:
    begun = []
    monkeypatch.setattr(PackJob, "slow_seconds", lambda job: seconds)
    monkeypatch.setattr(PackJob, "write", lambda job, progress: begun.append(1) or 1 / 0)
    refused = llm("flash-moe", "pack", demo_folder, "--bits", 2)
    assert isinstance(refused.exception, ZeroDivisionError)
    assert refused.stderr.startswith("Warning: There is no C compiler, so MLX fits the experts: ")
    assert told in refused.stderr
    assert begun


def test_a_calibrated_pack_says_so(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("flash-moe", "pack", demo_folder, "--bits", 2, "--name", "small")
    result = works(*command, "--calibrate", tmp_path / "text.txt")
    assert "Calibrated with " in result.stdout
    summary = f"experts requantized from 4-bit to 2-bit ({fewer_bits(2).method}, calibrated)"
    assert f"less exact: {summary}" in result.stdout
    assert summary in works("flash-moe", "info", "small").stdout
    assert summary in works("flash-moe", "models").stdout
    assert works("-m", "small", "-o", "max_tokens", 3, "Hello").stdout.strip()


def test_a_text_that_cannot_be_used_is_refused(demo_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    for data in (None, "Hello there. " * 9):
        if data is not None:
            file.write_text(data)
        message = fails(
            *("flash-moe", "pack", demo_folder, "--bits", 2),
            *("--calibrate", file, "--to", tmp_path / "made"),
        )
        assert str(file) in message
        assert "--calibrate" in message
    assert not list(tmp_path.glob("made*"))


def test_a_changed_command_does_not_resume_a_pack(demo_folder: Path, tmp_path: Path) -> None:
    """With another text or without one: the message says what to do."""
    (tmp_path / "text.txt").write_text(TEXT)
    command = ("flash-moe", "pack", demo_folder, "--bits", 2, "--to", tmp_path / "pack")
    workspace = tmp_path / "pack" / "demo-2bit.partial"
    workspace.mkdir(parents=True)
    (workspace / "source.json").write_text('{"source": "another"}')
    for more in ((), ("--calibrate", tmp_path / "text.txt")):
        assert "or another text. Remove it" in fails(*command, *more)
