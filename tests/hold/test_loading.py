"""Two that would not give the same reply never have the same identity."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.hold import loading as module
from flash_moe.hold.loading import Loading
from flash_moe.options import FULL_PHASES, RUNTIMES, Settings

settings = st.builds(
    Settings,
    experts=st.none() | st.integers(1, 9),
    full_experts_in=st.none() | st.lists(st.sampled_from(FULL_PHASES), max_size=2).map(tuple),
    cache_tolerance=st.none() | st.floats(0, 0.9),
    runtime=st.none() | st.sampled_from(RUNTIMES),
    threads=st.integers(1, 9),
)


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path / "model"))


@given(settings, st.none() | st.just(Path("/prompts")))
def test_it_arrives_in_the_other_process(settings: Settings, prompts: Path | None) -> None:
    loading = Loading(Path("/models/a\udcffb"), settings, prompts)
    assert Loading.from_json(json.loads(json.dumps(loading.to_json()))) == loading


@given(first=settings, second=settings)
def test_other_settings_are_another_one(
    demo_folder: Path, first: Settings, second: Settings
) -> None:
    identities = [Loading(demo_folder, one).identity() for one in (first, second)]
    assert (identities[0] == identities[1]) == (first == second)


def test_other_prompts_are_another_one(folder: Path, tmp_path: Path) -> None:
    assert Loading(folder).identity() != Loading(folder, prompts=tmp_path).identity()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model*.safetensors"])
@pytest.mark.parametrize("change", ["written", "replaced", "with the old time"])
def test_a_file_that_changed_is_another_model(folder: Path, name: str, change: str) -> None:
    before, file = Loading(folder).identity(), min(folder.glob(name))
    assert Loading(folder).identity() == before
    status, content = file.stat(), file.read_bytes()
    if change == "replaced":
        file.with_suffix(".tmp").write_bytes(content)
        file.with_suffix(".tmp").replace(file)
    else:
        file.write_bytes(content[:-1] + b"\n")
    if change == "with the old time":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert Loading(folder).identity() != before


def test_another_environment_is_another_one(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Loading(demo_folder).identity()
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "/anywhere")  # changes no result
    monkeypatch.setenv("EDITOR", "vi")
    assert Loading(demo_folder).identity() == before
    monkeypatch.setenv("MLX_SOMETHING_NEW", "1")
    assert Loading(demo_folder).identity() != before


def test_another_version_is_another_one(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Loading(demo_folder).identity()
    for owner, name, value in (
        (module.flash_moe, "__version__", "0.0.9"),
        (module, "PROTOCOL", 0),
        (module, "version", lambda name: "0"),
        (module, "_code", lambda: iter(())),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert Loading(demo_folder).identity() != before
    assert Loading(demo_folder).identity() == before


def test_a_folder_that_is_gone_has_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Loading(tmp_path / "gone").identity()
