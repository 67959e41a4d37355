"""Folders that cannot be written, disks that are full: replies go on, and warn once."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_moe.format import sealed
from flash_moe.format.sealed import SealedArray
from flash_moe.model.load import StreamedModel
from flash_moe.prefix import disk as disk_module
from flash_moe.prefix.disk import KEEP_FREE
from flash_moe.prefix.folder import file_name
from flash_moe.prefix.store import PrefixStore
from tests.conftest import stepped_down
from tests.prefix.conversations import new_store, reply
from tests.prefix.saved_files import ENDS, IDS, KEY, PROMPT, files, small, snapshots


@pytest.fixture
def read_only(hybrid: StreamedModel) -> Iterator[PrefixStore]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reply(hybrid, new_store(hybrid, folder=folder), PROMPT, 512)
        (path,) = folder.iterdir()
        path.chmod(0o644)
        os.utime(path, (1, 1))
        folder.chmod(0o555)
        yield new_store(hybrid, folder=folder)
        folder.chmod(0o755)


def test_a_read_only_folder_is_read(
    hybrid: StreamedModel, read_only: PrefixStore, as_user: None
) -> None:
    store = read_only
    assert store.disk is not None
    assert reply(hybrid, store, PROMPT, 512).cached == 90
    longer = [*PROMPT, *range(100, 160), 1, 2, 7]
    first = reply(hybrid, store, longer, 512)
    assert (first.cached, "Permission denied" in first.warning) == (90, True)
    assert first.warning.startswith(f"The prompt cannot be saved in {store.disk.folder}")
    # One warning is enough; memory still works.
    again = reply(hybrid, store, longer, 512)
    assert (again.cached, again.warning) == (153, "")
    assert len(files(store.disk.folder)) == 1


def test_a_file_in_the_place_of_the_folder(hybrid: StreamedModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "prompts"):
        first = reply(hybrid, new_store(hybrid, folder=folder), PROMPT, 512)
        assert first.cached == 0
        assert "cannot be saved" in first.warning


def test_a_disk_that_is_nearly_full(
    hybrid: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=KEEP_FREE))
    monkeypatch.setattr(disk_module, "shutil", full)
    first = reply(hybrid, new_store(hybrid, folder=tmp_path), PROMPT, 512)
    assert "the disk is nearly full" in first.warning
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_while_writing(
    hybrid: StreamedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = sealed.write

    def fails(file: object, head: bytes, parts: dict[str, SealedArray]) -> None:
        write(file, head, dict(list(parts.items())[:2]))  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sealed, "write", fails)
    store = new_store(hybrid, folder=tmp_path)
    first = reply(hybrid, store, PROMPT, 512)
    assert "No space left on device" in first.warning
    assert files(tmp_path) == []
    assert reply(hybrid, store, PROMPT, 512).cached == 90


def test_a_state_that_is_larger_than_the_limit_of_the_folder(
    hybrid: StreamedModel, tmp_path: Path
) -> None:
    first = reply(hybrid, new_store(hybrid, folder=tmp_path, disk_bytes=1000), PROMPT, 512)
    assert "the limit is 1,000" in first.warning
    assert files(tmp_path) == []


def test_short_prompts_are_not_written(hybrid: StreamedModel, tmp_path: Path) -> None:
    store = new_store(hybrid, folder=tmp_path, disk_tokens=91)
    reply(hybrid, store, PROMPT, 512)
    assert not tmp_path.exists() or files(tmp_path) == []
    assert reply(hybrid, store, PROMPT, 512).cached == 90


def test_a_file_that_we_may_not_read_stays() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        snapshots(folder).put(KEY, small())
        folder.chmod(0o777)
        (folder / file_name(KEY)).chmod(0)
        with stepped_down():
            assert snapshots(folder).get(KEY, IDS, ENDS) is None
        assert files(folder) == [file_name(KEY)]
