"""Files that are none: whatever lies in a checkpoint's folder, reading it ends."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError
from flash_moe.format.json_files import MAX_JSON_BYTES, read_json, read_text

SMALL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [pipe, device, folder])
@pytest.mark.parametrize("name", [*SMALL_FILES, "model.safetensors"])
def test_what_is_no_file_is_refused(
    make: object, name: str, demo_folder: Path, tmp_path: Path
) -> None:
    """At once: nothing is read from a pipe or a device."""
    model = shutil.copytree(demo_folder, tmp_path / "model")
    for path in model.glob(f"{Path(name).stem}*{Path(name).suffix}"):
        path.unlink()
    assert callable(make)
    make(model / name)
    with pytest.raises(CheckpointError, match=name):
        look_at(model)


def look_at(model: Path) -> None:
    open_folder(model)
    load_tokenizer(model)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="too large"):
        read_json(path)
    os.truncate(path, 20_000_000_000)
    with pytest.raises(CheckpointError, match="too large"):
        read_text(path)
