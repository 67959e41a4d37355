"""What MLX compiles for a CPU stays among a user's own files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

REPLY = """
import sys
from pathlib import Path
from flash_moe import BUILT_IN, Engine, Request
engine = Engine.load(BUILT_IN["flash-moe-tiny"], prefix=None)
ask = Request(messages=[{"role": "user", "content": "Hello"}], temperature=1.0, top_p=0.5, seed=1)
print("".join(engine.reply(ask)))
"""


def reply(temporary: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", REPLY],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="MLX compiles with g++")
@pytest.mark.parametrize("place", ["", version("mlx"), f"{version('mlx')}/cpu"])
def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path, place: str) -> None:
    theirs = tmp_path / "mlx" / place
    theirs.mkdir(parents=True)
    theirs.chmod(0o777)
    before = sorted(tmp_path.rglob("*"))
    text = reply(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    own = tmp_path / "own"
    own.mkdir()
    assert reply(own) == text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    theirs = tmp_path / "mlx"
    theirs.mkdir()
    theirs.chmod(0o555)
    assert reply(tmp_path)
