"""`llm` imports the plugin for every command, so the plugin must bring in nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.plugin.terminal import environment

HEAVY = {"mlx", "mlx_lm", "transformers", "torch", "huggingface_hub", "llguidance"}


def imported(*arguments: str) -> set[str]:
    """Every module that `llm` with these arguments imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llm", *arguments],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return set(re.findall(r"^import time:.*\|\s+(\S+)$", done.stderr, re.MULTILINE))


@pytest.mark.parametrize(
    "arguments",
    [("--help",), ("models",), ("flash-moe", "--help"), ("flash-moe", "models"), ("logs", "path")],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments: tuple[str, ...]) -> None:
    modules = imported(*arguments)
    assert "llm_flash_moe.answering.models" in modules, "the plugin was not loaded: install it"
    assert not {name for name in modules if name.partition(".")[0] in HEAVY}


@pytest.mark.parametrize("tools", [(), ("-T", "llm_version")], ids=["plain", "tools"])
def test_a_reply_needs_no_transformers(tools: tuple[str, ...]) -> None:
    modules = imported("-m", "flash-moe-tiny", *tools, "-o", "max_tokens", "3", "Hello")
    assert "mlx_lm.models.qwen3_5" in modules
    assert not {name for name in modules if name.partition(".")[0] in ("transformers", "torch")}
    assert not modules & {"mlx_lm.generate", "huggingface_hub.hf_api"}
