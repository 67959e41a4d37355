"""The `llm` command as a user meets it: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from llm.cli import cli

from flash_moe import BUILT_IN

LLM = Path(sys.executable).with_name("llm")


def llm(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], input=stdin)


def works(*arguments: object, stdin: str | None = None) -> Result:
    """For commands that must succeed."""
    result = llm(*arguments, stdin=stdin)
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result


def fails(*arguments: object, stdin: str | None = None) -> str:
    """For commands that must not: the message, which is one line, with nothing beside it."""
    result = llm(*arguments, stdin=stdin)
    # Anything but SystemExit would have been a traceback.
    assert isinstance(result.exception, SystemExit), (arguments, result.output, result.exception)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line.removeprefix("Error: ")


def installed_llm(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LLM), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,  # kernels may be compiled, and the GPU is shared
        env=environment(),
    )


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def known() -> dict[str, Any]:
    """The models that the user has added or made, by name: the built-in one is always there."""
    models: dict[str, Any] = json.loads(works("flash-moe", "models", "--json").stdout)
    assert list(models)[: len(BUILT_IN)] == list(BUILT_IN)
    return {name: model for name, model in models.items() if name not in BUILT_IN}


def logged() -> list[dict[str, Any]]:
    """Every logged turn, oldest first."""
    turns: list[dict[str, Any]] = json.loads(works("logs", "--json", "-n", 0).stdout)
    return turns[::-1] if len(turns) > 1 and turns[0]["id"] > turns[-1]["id"] else turns
