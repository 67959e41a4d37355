"""`llm flash-moe cache` shows which prompts are saved, and removes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from flash_moe import Engine, PrefixSettings, Request, Settings
from flash_moe.built_in import NAME as BUILT_IN_NAME
from llm_flash_moe.answering.turn import is_logged
from llm_flash_moe.paths import prompts
from llm_flash_moe.registry import Entry, Registry
from tests.plugin.terminal import fails, installed_llm, works
from tests.prefix.saved_files import files
from tests.prefix.test_engine import QUESTION, SYSTEM

# Long enough to be written.
LONG = " ".join(f"Item {n} is kept in box {n * 7 % 90}." for n in range(20))


def printed(*arguments: str) -> str:
    return works("flash-moe", "cache", *arguments).output


def summary(*arguments: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(printed("--json", *arguments))
    return value


@pytest.fixture
def used(demo_folder: Path) -> Path:
    """One conversation with all experts, one with two."""
    Registry.of_user().add("mine", Entry(str(demo_folder)))
    for experts in (None, 2):
        settings = Settings(bank_bytes=1, experts=experts)
        engine = Engine.load(demo_folder, settings, prefix=PrefixSettings(folder=prompts()))
        list(engine.reply(Request(messages=[SYSTEM, QUESTION], max_tokens=1)))
        engine.close()
    return prompts()


def test_when_nothing_is_saved(llm_home: Path) -> None:
    assert printed() == f"No prompts are saved in {llm_home}/llm-flash-moe/prompts.\n"
    assert printed("--clear") == f"Removed 0 kB.\n{printed()}"
    assert summary() == {"folder": str(prompts()), "prompts": 0, "bytes": 0, "models": []}
    assert not prompts().exists()


def test_saved_prompts_are_listed_by_model(used: Path, demo_folder: Path) -> None:
    about = summary()
    assert about["prompts"] == 4
    assert about["bytes"] == sum(path.stat().st_size for path in used.iterdir())
    # The last used first.
    assert [line["experts_per_token"] for line in about["models"]] == [2, 4]
    for line in about["models"]:
        assert (line["model"], line["path"], line["prompts"]) == ("mine", str(demo_folder), 2)
        assert line["bits"] == "4-bit"
    lines = printed().splitlines()
    assert lines[0].startswith("4 prompts, ")
    assert lines[0].endswith(f" MB, in {used}")
    assert lines[1].startswith("mine  K=2, 4-bit, ")
    assert lines[2].startswith("mine  K=4, 4-bit, ")


def test_models_that_are_not_known_any_more(used: Path, demo_folder: Path) -> None:
    Registry.of_user().remove("mine")
    assert {line["model"] for line in summary()["models"]} == {None}
    assert printed().splitlines()[1].startswith(f"{demo_folder}  K=2")


def test_clear_removes_prompts_and_nothing_else(used: Path) -> None:
    (used / "notes.txt").write_text("mine")
    nbytes = summary()["bytes"]
    about = summary("--clear")
    assert (about["freed_bytes"], about["prompts"]) == (nbytes, 0)
    assert files(used) == ["notes.txt"]


def test_clear_with_a_name_removes_that_models(used: Path, demo_folder: Path) -> None:
    """And so does `remove`; its name alone shows them."""
    own = set(files(used))
    other = Registry.of_user().get(BUILT_IN_NAME)
    Registry.of_user().add("other", Entry(other.path))
    said("-m", "other", LONG)
    theirs = set(files(used)) - own
    assert theirs
    assert [line["model"] for line in summary("other")["models"]] == ["other"]
    assert len(summary("mine")["models"]) == 2
    assert summary("other", "--clear")["prompts"] == 0
    assert set(files(used)) == own
    Registry.of_user().add("twin", Entry(str(demo_folder)))
    works("flash-moe", "remove", "mine")
    assert set(files(used)) == own, "another name stands for the same model"
    works("flash-moe", "remove", "twin")
    assert files(used) == []
    assert "There is no model 'nope'" in fails("flash-moe", "cache", "nope")


def test_what_is_not_logged_is_not_saved() -> None:
    """Reading on from an earlier prompt writes nothing either."""

    def saved(*arguments: object) -> int:
        works("flash-moe", "cache", "--clear")
        said("-m", BUILT_IN_NAME, LONG, *arguments)
        return int(summary()["prompts"])

    assert saved() == 1
    said("-c", "And box 14?", "--no-log")
    assert summary()["prompts"] == 1
    assert saved("--no-log") == 0
    works("models", "options", "set", BUILT_IN_NAME, "save_prompts", "false")
    assert saved() == 0
    assert saved("-o", "save_prompts", 1) == 1
    works("models", "options", "clear", BUILT_IN_NAME)
    works("logs", "off")
    assert saved() == 0
    assert saved("--log") == 1


def test_only_llms_own_options_count(llm_home: Path) -> None:
    """Another program that calls a model may have a `--log` of its own."""
    answers = []

    @click.command()
    @click.option("--log")
    @click.option("--no-log", is_flag=True)
    def other(log: str, no_log: bool) -> None:
        answers.append(is_logged())

    for arguments in ([], ["--log", "x"], ["--no-log"]):
        CliRunner().invoke(other, arguments)
    llm_home.mkdir(exist_ok=True)
    (llm_home / "logs-off").touch()
    CliRunner().invoke(other, ["--log", "x"])
    assert answers == [True, True, True, False]


def said(*arguments: object) -> None:
    """In a process of its own: one that has loaded a model goes on saving where it did."""
    done = installed_llm(*arguments, "-o", "max_tokens", 1)
    assert done.returncode == 0, done.stderr


def test_files_that_are_damaged_are_listed_all_the_same(used: Path) -> None:
    for path in used.iterdir():
        path.write_bytes(b"x")
    about = summary()
    assert (about["prompts"], about["bytes"]) == (4, 4)
    assert printed().splitlines()[1].startswith("an unnamed model")


def test_looking_needs_no_mlx(llm_home: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    script = (
        "import sys; from llm_flash_moe.commands.cache import cache\n"
        "cache([], standalone_mode=False); assert 'mlx.core' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
