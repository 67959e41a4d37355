"""The folder of saved prompts as users see it: listed by model, and cleared."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.folder import ModelPrompts, PromptFolder, SavedPrompt, file_name
from tests.conftest import stepped_down
from tests.prefix.saved_files import ENDS, IDS, files, small

ONE: dict[str, Any] = {"path": "/a", "experts_per_token": 4, "bits": "4-bit", "runtime": "native"}
OTHER = {**ONE, "experts_per_token": 2}


def save(folder: Path, number: int, model: dict[str, Any], last_use: int, tokens: int) -> int:
    """Returns the file's size."""
    key = f"{number:040}"
    ids = (*IDS, *range(tokens - len(IDS)))
    DiskSnapshots(folder, 1 << 20, "scope", model).put(key, small(ids, ENDS))
    path = folder / file_name(key)
    os.utime(path, (last_use, last_use))
    return path.stat().st_size


def test_prompts_are_listed_with_the_last_used_first(tmp_path: Path) -> None:
    sizes = [save(tmp_path, 0, ONE, 100, 3), save(tmp_path, 1, OTHER, 200, 5)]
    assert PromptFolder(tmp_path).prompts() == [
        SavedPrompt(tmp_path / file_name(f"{1:040}"), sizes[1], 200, 5, OTHER),
        SavedPrompt(tmp_path / file_name(f"{0:040}"), sizes[0], 100, 3, ONE),
    ]


def test_prompts_by_model(tmp_path: Path) -> None:
    """Another K is another model: neither can use the other's prompts."""
    sizes = [
        save(tmp_path, number, model, last_use, tokens)
        for number, (model, last_use, tokens) in enumerate(
            [(ONE, 100, 9), (OTHER, 400, 4), (dict(reversed(ONE.items())), 300, 5), (ONE, 200, 7)]
        )
    ]
    assert PromptFolder(tmp_path).by_model() == [
        ModelPrompts(OTHER, 1, 4, sizes[1], 400),
        ModelPrompts(ONE, 3, 9, sizes[0] + sizes[2] + sizes[3], 300),
    ]


def test_a_folder_that_does_not_exist_is_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        folder = PromptFolder(path)
        assert (folder.prompts(), folder.by_model(), folder.clear()) == ([], [], 0)
    assert files(tmp_path) == ["file"]


def test_damaged_files_are_listed_and_cleared(tmp_path: Path) -> None:
    save(tmp_path, 0, ONE, 100, 3)
    path = tmp_path / file_name(f"{0:040}")
    path.write_bytes(b"x")
    os.utime(path, (100, 100))
    assert PromptFolder(tmp_path).by_model() == [ModelPrompts({}, 1, 0, 1, 100)]
    assert PromptFolder(tmp_path).clear() == 1
    assert files(tmp_path) == []


def test_clear_removes_our_files_alone(tmp_path: Path) -> None:
    sizes = [save(tmp_path, number, ONE, 100, 3) for number in range(2)]
    (tmp_path / f".{file_name('a' * 40)}.7.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    assert PromptFolder(tmp_path).clear() == sum(sizes) + 4
    assert files(tmp_path) == ["notes.txt"]


def test_clear_without_permission_is_an_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder, 0, ONE, 100, 3)
        folder.chmod(0o555)
        with stepped_down(), pytest.raises(PermissionError):
            PromptFolder(folder).clear()
        folder.chmod(0o700)
        assert len(files(folder)) == 1


def test_looking_needs_no_mlx(tmp_path: Path) -> None:
    save(tmp_path, 0, ONE, 100, 3)
    script = (
        "import sys; from pathlib import Path\n"
        "from flash_moe.prefix.folder import PromptFolder\n"
        "assert len(PromptFolder(Path(sys.argv[1])).by_model()) == 1\n"
        "assert 'mlx.core' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True, env=environment)
