"""Files that are damaged, foreign or too many are ignored and removed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.arrays import mlx_dtype
from flash_moe.format.dtypes import BY_NAME
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Settings
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.folder import PromptFolder, file_name
from flash_moe.prefix.state import Snapshot
from tests.prefix.conversations import contents, new_store, reply
from tests.prefix.saved_files import ENDS, IDS, KEY, OTHER, PROMPT, files, small, snapshots


@pytest.fixture
def disk(tmp_path: Path) -> DiskSnapshots:
    disk = snapshots(tmp_path / "prompts")
    disk.put(KEY, small())
    return disk


def test_a_snapshot_is_read_as_it_was_written(disk: DiskSnapshots) -> None:
    snapshot = disk.get(KEY, (*IDS, 8), (*ENDS, 4))
    assert snapshot is not None
    assert contents(snapshot) == contents(small())
    assert disk.get(OTHER, IDS, ENDS) is None
    # Conversations are private.
    assert disk.folder.stat().st_mode & 0o777 == 0o700
    assert (disk.folder / file_name(KEY)).stat().st_mode & 0o777 == 0o600
    # Other tools can read the file.
    arrays, metadata = mx.load(str(disk.folder / file_name(KEY)), return_metadata=True)
    assert arrays["tokens"].tolist() == list(IDS)
    assert metadata["tokens"] == "3"


@pytest.mark.parametrize("dtype", BY_NAME)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1, 1, 1, 5)])
def test_arrays_of_every_type(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with mx.stream(mx.cpu):  # GPUs have no float64
        array = mx.random.randint(0, 2, shape).astype(mlx_dtype(dtype))
        snapshot = Snapshot(IDS, ENDS, [], [array])
        snapshots(tmp_path).put(KEY, snapshot)
        read = snapshots(tmp_path).get(KEY, IDS, ENDS)
        assert read is not None
        assert contents(read) == contents(snapshot)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        disk = snapshots(Path(name))
        disk.put(KEY, small())
        path = disk.folder / file_name(KEY)
        raw = bytearray(path.read_bytes())
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert disk.get(KEY, IDS, ENDS) is None
        assert not path.exists()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_truncated_or_any_other_file(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        disk = snapshots(Path(name))
        disk.put(KEY, small())
        path = disk.folder / file_name(KEY)
        raw = path.read_bytes()
        other = st.integers(0, len(raw) - 1).map(lambda length: raw[:length]) | st.binary()
        path.write_bytes(data.draw(other))
        assert len(PromptFolder(disk.folder).prompts()) == 1
        assert disk.get(KEY, IDS, ENDS) is None
        assert not path.exists()


@pytest.mark.parametrize(
    ("ids", "ends"),
    [((5, 6, 8), ENDS), ((5, 6), ENDS), (IDS, (3,)), (IDS, (1, 2, 3))],
    ids=["another token", "too short", "fewer cuts", "more cuts"],
)
def test_wrong_token_ids_and_cuts(
    disk: DiskSnapshots, ids: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    """Even under the right name, which only a collision of hashes could give them."""
    assert disk.get(KEY, ids, ends) is None
    assert files(disk.folder) == []


def test_a_file_of_another_model_under_our_name(disk: DiskSnapshots) -> None:
    assert snapshots(disk.folder, scope="another").get(KEY, IDS, ENDS) is None
    assert files(disk.folder) == []


def test_a_sound_file_that_does_not_fit_the_model(hybrid: StreamedModel, tmp_path: Path) -> None:
    store = new_store(hybrid, folder=tmp_path)
    whole = reply(hybrid, store, PROMPT, 512)
    (path,) = tmp_path.iterdir()
    key = path.stem.removeprefix("v1-")
    path.unlink()
    assert store.disk is not None
    store.disk.put(key, small(tuple(PROMPT[:90]), (90,)))
    store.clear()
    again = reply(hybrid, store, PROMPT, 512)
    assert (again.cached, again.logprobs) == (0, whole.logprobs)
    # It was removed, and the right one took its place.
    assert reply(hybrid, new_store(hybrid, folder=tmp_path), PROMPT, 512).cached == 90


def test_another_k_runtime_or_weights_do_not_use_the_file(
    hybrid_folder: Path, tmp_path: Path
) -> None:
    """And leave it to the model that it belongs to."""
    folder, prompts = tmp_path / "model", tmp_path / "prompts"
    shutil.copytree(hybrid_folder, folder)
    own, two = Settings(bank_bytes=1), Settings(bank_bytes=1, experts=2)
    weights = sorted(folder.glob("*.safetensors"))[-1]

    def cached(settings: Settings) -> int:
        model = load(folder, settings)
        try:
            return reply(model, new_store(model, folder=prompts), PROMPT, 512).cached
        finally:
            model.close()

    assert cached(own) == 0
    assert cached(own) == 90
    assert cached(two) == 0
    assert cached(Settings(bank_bytes=1, runtime="mlx")) == 0
    assert cached(own) == 90
    os.utime(weights, (1, 1))
    assert cached(own) == 0
    assert cached(own) == 90
    with weights.open("r+b") as file:  # other bytes at the same time and size, as in images
        file.seek(-8, os.SEEK_END)
        file.write(b"\0" * 8)
    os.utime(weights, (1, 1))
    assert cached(own) == 0
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    assert cached(own) == 0
    assert cached(two) == 0
    assert len(files(prompts)) == 7


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    probe = snapshots(tmp_path)
    probe.put(KEY, small())
    size = (tmp_path / file_name(KEY)).stat().st_size
    PromptFolder(tmp_path).clear()
    disk = snapshots(tmp_path, limit=3 * size)
    keys = [f"{n:040}" for n in range(6)]
    for age, key in enumerate(keys[:3]):
        disk.put(key, small())
        os.utime(tmp_path / file_name(key), (age, age))
    assert disk.get(keys[0], IDS, ENDS)  # the oldest, used again
    disk.put(keys[3], small())
    assert files(tmp_path) == sorted(map(file_name, (keys[0], keys[2], keys[3])))
    disk.put(keys[4], small(size=200))  # as large as two
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3 * size
    assert file_name(keys[4]) in files(tmp_path)


def test_an_existing_file_is_not_written_again(disk: DiskSnapshots) -> None:
    path = disk.folder / file_name(KEY)
    os.utime(path, (1, 1))
    inode = path.stat().st_ino
    disk.put(KEY, small())
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 1


def test_only_our_files_are_ever_removed(disk: DiskSnapshots) -> None:
    ours = [f"v0-{KEY}.safetensors", f".v0-{KEY}.safetensors.77.tmp"]
    others = [
        "model.safetensors",
        ".hidden",
        "v1-x.safetensors",
        "notes.txt",
        f"v9-{KEY}.safetensors",
    ]
    for name in (*ours, *others):
        (disk.folder / name).write_text("x" * 5000)
        os.utime(disk.folder / name, (1, 1))
    # Older versions' files and leftovers go at the next write; a newer version keeps its own.
    disk.put(OTHER, small())
    assert files(disk.folder) == sorted([*others, file_name(KEY), file_name(OTHER)])
    freed = sum(
        (disk.folder / name).stat().st_size for name in (others[-1], *map(file_name, (KEY, OTHER)))
    )
    assert PromptFolder(disk.folder).clear() == freed
    assert files(disk.folder) == sorted(others[:-1])
