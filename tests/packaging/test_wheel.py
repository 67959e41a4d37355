"""What is shipped is what is in the tree: both packages, all their files, every shader."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"llm_flash_moe": ROOT / "llm_flash_moe", "flash_moe": ROOT / "backend" / "flash_moe"}

for needed in ("hatchling", "pip"):
    pytest.importorskip(needed)


def files(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.suffix != ".pyc" and not file.name.startswith(".")
    }


def build_wheel(source: Path, folder: Path) -> dict[str, bytes]:
    # Without isolation: the build must not need a network.
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "-w", str(folder), str(source)]
    # What is compiled has tests of its own, in test_native_wheel.py.
    subprocess.run(command, check=True, env={**os.environ, "FLASH_MOE_PURE": "1"})
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


def inside(wheel: dict[str, bytes], folder: str) -> set[str]:
    return {name.removeprefix(folder) for name in wheel if name.startswith(folder)}


def test_packages_are_whole_and_alone(wheel: dict[str, bytes]) -> None:
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        shipped = {n for n in inside(wheel, f"{package}/") if not n.startswith("shaders/")}
        assert shipped == files(folder)
        assert "py.typed" in shipped


def test_shaders_are_those_of_the_tree(wheel: dict[str, bytes]) -> None:
    shaders = files(ROOT / "shaders")
    assert shaders
    assert inside(wheel, "flash_moe/shaders/") == shaders


def test_llm_finds_the_plugin(wheel: dict[str, bytes]) -> None:
    [entry_points] = (wheel[name] for name in wheel if name.endswith("/entry_points.txt"))
    assert "[llm]\nflash_moe = llm_flash_moe" in entry_points.decode()


def test_the_sdist_builds_the_same_wheel(wheel: dict[str, bytes], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    [sdist] = tmp_path.glob("*.tar.gz")
    assert build_wheel(sdist, tmp_path) == wheel
