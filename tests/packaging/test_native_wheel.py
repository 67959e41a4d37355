"""A wheel with its native libraries: built here, and used where there is no compiler."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flash_moe.kernels.native import Native
from flash_moe.native import shipped
from flash_moe.native.build import find_compiler
from flash_moe.native.libraries import ALL, FIT, KERNELS, PROCESSOR, file_name, variants
from tests.kernels.native_cases import layer

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")

# The tree's own packages must not be found before those of the wheel.
USE = """
import json, sys
import flash_moe, llm_flash_moe
from flash_moe.kernels.runtime import choose_runtime
from flash_moe.pack.fit import load_fit
from flash_moe.stream.native_reader import load_native_reader
from flash_moe.kernels.native import load_native
load_fit(), load_native_reader()
runtime = choose_runtime()
print(json.dumps([flash_moe.__file__, runtime.name, runtime.why, load_native().file]))
"""


def build(folder: Path, **environment: str) -> tuple[Path, str]:
    """The wheel, and what hatchling said."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def built(unpacked: Path) -> Path:
    return unpacked / "flash_moe" / "native" / "built"


def without_compiler(unpacked: Path, home: Path) -> dict[str, str]:
    site = [path for path in sys.path if path.endswith("site-packages")]
    empty = home / "bin"
    empty.mkdir(parents=True, exist_ok=True)
    return {
        "PYTHONPATH": os.pathsep.join([str(unpacked), *site]),
        "PATH": str(empty),
        "HOME": str(home),
        "LLM_USER_PATH": str(home / "llm"),
    }


def test_it_is_for_this_system_and_has_every_variant(wheel: Path, built: Path) -> None:
    system = "macosx" if sys.platform == "darwin" else "linux"
    assert "-py3-none-" in wheel.name
    assert system in wheel.name
    assert wheel.stem.endswith(platform.machine())
    wanted = {file_name(library, variant) for library in ALL for variant in variants(library)}
    assert {file.name for file in built.iterdir()} == wanted


def test_without_a_compiler_they_are_used_and_nothing_is_written(
    unpacked: Path, tmp_path: Path
) -> None:
    environment = without_compiler(unpacked, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f'["{unpacked}/' in done.stdout
    if '"native"' not in done.stdout:
        pytest.skip("a GPU computes here")
    best = variants(KERNELS)[shipped.level(unpacked / "flash_moe/native/built")]
    assert f"built/{file_name(KERNELS, best)}" in done.stdout
    assert "threads, of the package" in done.stdout
    reply = [sys.executable, "-c", "from llm.cli import cli; cli()", "-m", "flash-moe-tiny"]
    reply.append("What is 468 + 357?")
    said = subprocess.run(reply, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("468 + 357 = 825.\n", "")
    assert not list(tmp_path.rglob("*.so"))


def test_every_variant_that_runs_here_computes_the_same(built: Path) -> None:
    results = []
    for variant in variants(KERNELS)[: shipped.level(built) + 1]:
        native = Native(ctypes.CDLL(str(built / file_name(KERNELS, variant))))
        results.append(layer(native))
    assert results
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=1e-5)


def test_a_file_of_other_sources_is_not_loaded(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "fit.c"
    copy.write_bytes(FIT.sources[0].read_bytes())
    sources = (copy, *FIT.sources[1:])
    assert shipped.load(replace(FIT, sources=sources), built) is not None
    copy.write_text(copy.read_text() + "\n")
    assert shipped.load(replace(FIT, sources=sources), built) is None


def test_what_does_not_load_is_compiled(built: Path, tmp_path: Path) -> None:
    """And a processor that cannot be looked at gets what every one can run."""
    plain = file_name(KERNELS, variants(KERNELS)[0])
    sound, broken = tmp_path / "sound", tmp_path / "broken"
    for folder in (sound, broken):
        shutil.copytree(built, folder)
        (folder / file_name(PROCESSOR, variants(PROCESSOR)[0])).unlink()
    loaded = shipped.load(KERNELS, sound)
    assert loaded is not None
    assert Path(loaded._name).name == plain
    (broken / plain).write_bytes(b"not a library")
    assert shipped.load(KERNELS, broken) is None
    assert shipped.load(KERNELS, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("environment", "told"),
    [({"FLASH_MOE_PURE": "1"}, False), ({"PATH": "/none", "CC": ""}, True)],
    ids=["asked for", "no compiler"],
)
def test_a_pure_wheel(tmp_path: Path, environment: dict[str, str], told: bool) -> None:
    wheel, said = build(tmp_path, **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert ("No C compiler was found" in said) == told
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
