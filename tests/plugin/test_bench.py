"""`llm flash-moe bench`: by name and by folder, as tables, as JSON and as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flash_moe.measure import bench
from llm_flash_moe.options import SETTINGS
from tests.plugin.terminal import fails, llm, works

QUICK = ("--tokens", 1, "--prompts", "")


def test_tables_and_a_picture(demo_folder: Path, tmp_path: Path) -> None:
    """Nothing cut off, and nothing wider than a terminal."""
    works("flash-moe", "add", demo_folder, "--name", "demo")
    picture = tmp_path / "demo.svg"
    result = works("flash-moe", "bench", "demo", *QUICK[:2], "--prompts", "1,5", "--svg", picture)
    assert result.stdout.startswith("demo: qwen3_5_moe, 4 layers, 4 of 8 experts a token, 4-bit, ")
    assert result.stderr == ""  # progress is for a terminal
    for title in ("A token\n", "\nhot ", "\nnothing read ", "Prompts, read first and again\n"):
        assert title in result.stdout
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert picture.read_text().startswith("<svg ")
    assert "demo: a token by part" in picture.read_text()


def test_json_by_folder_with_options(demo_folder: Path) -> None:
    options = ("-o", "experts", 2, "-o", "runtime", "mlx")
    result = works("flash-moe", "bench", demo_folder, *QUICK, *options, "--json")
    facts = json.loads(result.stdout)
    assert (facts["model"], facts["runtime"]) == (str(demo_folder), "mlx")
    assert facts["experts_per_token"] == 2
    assert facts["tokens"]["hot"]["nbytes"] == facts["token_bytes"]
    assert (facts["prompts"], facts["memory"]) == ([], None)
    assert facts["lossy"] == ["2 experts of 4 a token, with the weights they have among all"]


def test_what_is_refused(demo_folder: Path, tmp_path: Path) -> None:
    ask = ("flash-moe", "bench", demo_folder)
    assert "no model 'nope'" in fails("flash-moe", "bench", "nope")
    assert "its folder does not exist" in fails(*ask, "--svg", tmp_path / "no" / "file.svg")
    assert "which this model takes" in fails(*ask, "--memory", "1M")
    assert "Choose less" in fails(*ask, "--memory", "4000T")
    assert f"Choose {', '.join(SETTINGS)}." in fails(*ask, "-o", "temperature", 1)
    assert "-o experts 0: choose 1 or more" in fails(*ask, "-o", "experts", 0)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [("40G", 40 * 10**9), ("1.5GB", 1_500_000_000), ("16GiB", 2**34), ("512Mi", 2**29)],
)
def test_sizes(size: str, nbytes: int, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []

    def hear(nbytes: int, needed: int, available: int | None) -> None:
        asked.append(nbytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "require_sense", hear)
    llm("flash-moe", "bench", demo_folder, "--memory", size)
    assert asked == [nbytes]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        *(("--memory", text) for text in ("40", "G", "-1G", "40 GB of it", "1e9", "∞G", "40K")),
        *(("--prompts", text) for text in ("0", "-3", "5,", "a", "5;6", "1.5", "9" * 40)),
    ],
)
def test_what_cannot_be_read(option: str, text: str, demo_folder: Path) -> None:
    result = llm("flash-moe", "bench", demo_folder, option, text)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}': {text!r}" in result.stderr


def test_ctrl_c_leaves_nothing_behind(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_prompt", stop)
    ask = ("flash-moe", "bench", demo_folder, "--tokens", 1, "--prompts", 4)
    result = llm(*ask, "--svg", tmp_path / "picture.svg")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.strip() == "Aborted!"
    assert list(tmp_path.glob("*.svg")) == list(tmp_path.glob(".*.svg")) == []
