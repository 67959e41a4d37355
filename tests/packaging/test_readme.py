"""The help in the README is that of the commands. `cog -r README.md` writes it anew."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

cogapp = pytest.importorskip("cogapp")
README = Path(__file__).parents[2] / "README.md"


def test_the_help_is_current(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    copy.write_text(README.read_text("utf-8"), "utf-8")
    cog = cogapp.Cog()
    cog.set_output(StringIO(), StringIO())
    assert cog.main(["cog", "-r", str(copy)]) == 0
    assert copy.read_text("utf-8") == README.read_text("utf-8")
