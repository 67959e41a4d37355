"""`llm flash-moe eval`: by name and by folder, as JSON and as tables, interrupted and resumed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from flash_moe.evaluation.run_state import RunState
from llm_flash_moe.options import SETTINGS
from tests.evaluation.data import write_data
from tests.plugin.terminal import fails, llm, logged, works

FEWER = "2 experts of 4 a token, with the weights they have among all"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "heldout")


def without_seconds(result: dict[str, Any]) -> dict[str, Any]:
    assert result.pop("seconds") > 0
    for cost in result["cost"].values():
        del cost["seconds"], cost["tokens_per_second"]
    return result


def test_by_name_and_by_folder(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    as_json = ("--data", data, "--only", "text", "--json")
    first, by_folder, fewer = (
        without_seconds(json.loads(works("flash-moe", "eval", *which, *as_json).stdout))
        for which in (("demo",), (demo_folder,), ("demo", "-o", "experts", 2))
    )
    assert {**by_folder, "model": "demo"} == first
    assert (first["experts_per_token"], first["bits"], first["items"]) == (4, "4-bit", 3)
    assert (first["lossy"], fewer["lossy"]) == ([], [FEWER])
    assert (first["options"], fewer["options"]) == ({}, {"experts": 2})
    assert first["text"]["perplexity"] != fewer["text"]["perplexity"]
    assert "no model 'nope'" in fails("flash-moe", "eval", "nope", "--data", data)
    assert "--data" in fails("flash-moe", "eval", "demo", "--data", tmp_path)


def test_tables_and_routing(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    routing = tmp_path / "routing.json"
    ask = ("--data", data, "--only", "text", "--routing", routing)
    output = works("flash-moe", "eval", demo_folder, *ask).stdout
    assert "perplexity" in output
    assert re.search(r"Predicting: [\d,]+ tokens at [\d,.]+/s, [\d.]+ MB of experts", output)
    assert "Replying" not in output
    assert "replies" not in output
    written = json.loads(routing.read_text())
    assert written["model"] == str(demo_folder)
    assert [len(layer["counts"]) for layer in written["layers"]] == [8] * 4


def test_against_predictions_saved_before(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    """As a table: nothing cut off, and nothing wider than a terminal."""
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text")
    works(*ask, "--save", tmp_path / "saved")
    output = works(*ask, "-o", "experts", 2, "--against", tmp_path / "saved").stdout
    assert "3 of 3 items are in both." in output
    assert "…" not in output
    tables = [line for line in output.splitlines()[2:] if not line.startswith("Against ")]
    assert max(map(len, tables)) <= 80


def test_what_is_refused(demo_folder: Path, data: Path, tmp_path: Path, llm_home: Path) -> None:
    saved = tmp_path / "saved"
    ask = ("flash-moe", "eval", demo_folder, "--data", data)
    works(*ask, "--only", "text", "--limit", 1, "--save", saved)
    message = fails(*ask, "--only", "json", "--against", saved)
    assert "has none of these texts and dialogues. Give --data, --only and --limit as" in message
    assert "another tokenizer" in fails(
        "flash-moe", "eval", "flash-moe-tiny", "--limit", 1, "--against", saved
    )
    assert "No such file" in fails(*ask, "--against", tmp_path / "nothing")
    assert "--save FILE" in fails(*ask, "--against", data / "text.jsonl")
    assert "is a folder" in fails(*ask, "--save", tmp_path)
    assert "its folder does not exist" in fails(*ask, "--routing", tmp_path / "no" / "file")
    # Nothing was measured, so there is nothing to resume.
    assert list((llm_home / "llm-flash-moe" / "evaluations").iterdir()) == []


def test_options_are_those_of_llm(demo_folder: Path, data: Path) -> None:
    """Of loading: others would change nothing, and are refused with those that do."""
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text", "--limit", 1)
    options = ("-o", "experts", 2, "-o", "runtime", "mlx")
    result = json.loads(works(*ask, *options, "--json").stdout)
    assert result["options"] == {"experts": 2, "runtime": "mlx"}
    assert (result["experts_per_token"], result["runtime"]) == (2, "mlx")
    assert result["lossy"] == [FEWER]
    known = ", ".join(SETTINGS)
    for option, message in (
        (("temperature", 1), f"-o temperature changes nothing here. Choose {known}."),
        (("nope", 1), f"-o nope is no option. Choose {known}."),
        (("experts", 0), "-o experts 0: choose 1 or more"),
        (("experts", "few"), "-o experts few: Input should be a valid integer"),
        (("runtime", "abacus"), "-o runtime abacus: choose auto, metal, cuda, native, mlx"),
    ):
        assert message in fails(*ask, "-o", *option)


def test_fewer_bits_are_named(demo_folder: Path, data: Path) -> None:
    """By pack, info, models, replies and eval alike."""
    packed = works("flash-moe", "pack", demo_folder, "--bits", 2, "--group-size", 128)
    lossy = "experts requantized from 4-bit to 2-bit (fit)"
    assert f"less exact: {lossy}" in packed.stdout
    assert lossy in works("flash-moe", "info", "demo-2bit").stdout
    assert lossy in works("flash-moe", "models").stdout
    works("-m", "demo-2bit", "-o", "max_tokens", 3, "-o", "experts", 2, "Hello")
    (turn,) = logged()
    assert turn["response_json"]["lossy"] == [FEWER, lossy]
    ask = ("--data", data, "--only", "text", "--json")
    assert json.loads(works("flash-moe", "eval", "demo-2bit", *ask).stdout)["lossy"] == [lossy]


def test_interrupted_and_resumed(
    demo_folder: Path, data: Path, llm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text", "--json")
    whole = without_seconds(json.loads(works(*ask).stdout))
    put = RunState.put

    def stop(self: RunState, number: int, result: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        put(self, number, result)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "put", stop)
        stopped = llm(*ask)
    assert stopped.exit_code == 1
    assert "Stopped after 2 of 3 items: the same command continues from there." in stopped.stderr
    folder = llm_home / "llm-flash-moe" / "evaluations"
    assert len(list(folder.glob("*/[0-9]*"))) == 2
    again = works(*ask)
    assert "Continuing after 2 of 3 items." in again.stderr
    assert without_seconds(json.loads(again.stdout)) == whole
    assert list(folder.iterdir()) == []
