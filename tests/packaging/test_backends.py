"""Which of MLX's libraries is on disk, told from RECORD alone; and pip asked for CUDA ends with it.

MLX, its back ends and NVIDIA's libraries are stand-ins of a few bytes, with the dependencies that
the real ones have; what we require of them is read from our own pyproject.toml.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flash_moe.mlx_library import Backends, find_backends

ROOT = Path(__file__).parents[2]
LIBRARY = "mlx/lib/libmlx.so"
BACKENDS = ["mlx-cpu", "mlx-cuda-12", "mlx-cuda-13"]
NONE = Backends(installed=(), active=None, wanted=None, mend=None)


def wheel_files(
    name: str,
    version: str,
    requires: Iterable[str] = (),
    extras: Iterable[str] = (),
    files: dict[str, bytes] | None = None,
    *,
    sizes: bool = True,
) -> dict[str, bytes]:
    """What a wheel unpacks to."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    # Requires-Python counts: pip treats it as a dependency when it decides what goes first.
    metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    metadata += ["Requires-Python: >=3", *(f"Provides-Extra: {extra}" for extra in extras)]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    content = dict(files or {})
    content[f"{info}/METADATA"] = "\n".join([*metadata, ""]).encode()
    content[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{at},{digest(data)},{len(data) if sizes else ''}" for at, data in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    return content


def digest(data: bytes) -> str:
    sha = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + sha.rstrip(b"=").decode()


def backend_files(
    name: str, version: str, size: int = 64, *, sizes: bool = True
) -> dict[str, bytes]:
    library = f"{name} {version}".encode().ljust(size)
    return wheel_files(name, version, files={LIBRARY: library}, sizes=sizes)


class Site:
    """A folder of installed packages, changed as an installer does: the last one to write wins."""

    def __init__(self, folder: str | Path, mlx: str | None = "2.0") -> None:
        self.folder = Path(folder)
        self.wheels: dict[str, dict[str, bytes]] = {}
        if mlx:
            self.install("mlx", wheel_files("mlx", mlx))

    def install(self, name: str, files: dict[str, bytes]) -> None:
        self.uninstall(name)
        self.wheels[name] = files
        for at, data in files.items():
            (self.folder / at).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / at).write_bytes(data)

    def uninstall(self, name: str) -> None:
        for at in self.wheels.pop(name, ()):
            (self.folder / at).unlink(missing_ok=True)
            if at.endswith("/RECORD"):
                (self.folder / at).parent.rmdir()

    def look(self) -> Backends:
        return find_backends([str(self.folder)], python="python")


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(BACKENDS),
            st.sampled_from(["1.0", "2.0"]),
            st.sampled_from([64, 65]),
            st.booleans(),
        )
    )
)
@example([(True, "mlx-cpu", "2.0", 64, True), (True, "mlx-cuda-13", "2.0", 65, True)])
@example([(True, "mlx-cuda-13", "2.0", 65, True), (True, "mlx-cpu", "2.0", 64, True)])
@example([(True, "mlx-cuda-13", "2.0", 64, True), (True, "mlx-cpu", "2.0", 64, True)])
@example([(True, "mlx-cuda-13", "1.0", 64, True)])
@example([(True, "mlx-cuda-12", "2.0", 64, True), (True, "mlx-cuda-13", "1.0", 64, True)])
def test_active_is_whoever_wrote_last_and_the_mend_mends(
    steps: list[tuple[bool, str, str, int, bool]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        site, versions, active = Site(folder), dict[str, str](), None
        for install, name, version, size, sizes in steps:
            if install:
                site.install(name, backend_files(name, version, size, sizes=sizes))
                versions[name], active = version, name
            elif name in versions:
                site.uninstall(name)
                del versions[name]
                active = None

        found = site.look()
        assert found.installed == tuple(sorted(versions))
        assert found.active == active
        if not versions:
            assert found == NONE
            return
        cuda = {name: version for name, version in versions.items() if "cuda" in name}
        candidates = cuda or versions
        assert found.wanted in candidates
        assert versions[found.wanted] == "2.0" or "2.0" not in candidates.values()
        sound = found.active == found.wanted and versions[found.wanted] == "2.0"
        assert (found.mend is None) == sound
        if found.mend is not None:
            name, _, version = found.mend.split()[-1].partition("==")
            assert ("--no-deps" in found.mend) == (versions[name] == version)
            site.install(name, backend_files(name, version))
            mended = site.look()
            assert (mended.active, mended.mend) == (name, None)


@pytest.mark.parametrize("names", [["mlx-cpu"], ["mlx-cpu", "mlx-cuda-13"]])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", None])
def test_a_library_that_is_nobodys(tmp_path: Path, names: list[str], change: object) -> None:
    site = Site(tmp_path)
    for name in names:
        site.install(name, backend_files(name, "2.0", size=len(name) + 50))
    library = tmp_path / LIBRARY
    if callable(change):
        library.write_bytes(change(library.read_bytes()))
    else:
        library.unlink()
    assert site.look() == Backends(
        installed=tuple(names),
        active=None,
        wanted=names[-1],
        mend=f"python -m pip install --force-reinstall --no-deps {names[-1]}==2.0",
    )


def test_same_size_is_told_apart_by_content(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.install("mlx-cuda-13", backend_files("mlx-cuda-13", "2.0"))
    site.install("mlx-cpu", backend_files("mlx-cpu", "2.0"))
    assert site.look().active == "mlx-cpu"
    (tmp_path / LIBRARY).write_bytes(b"?" * 64)
    assert site.look().active is None


def test_nothing_to_say_without_mlx_or_without_back_ends(tmp_path: Path) -> None:
    assert find_backends([str(tmp_path)]) == NONE
    site = Site(tmp_path)
    site.install("mlx-lm", wheel_files("mlx-lm", "2.0"))
    assert site.look() == NONE


def test_an_mlx_built_from_source_brings_its_own_library(tmp_path: Path) -> None:
    site = Site(tmp_path, mlx=None)
    site.install("mlx-cpu", backend_files("mlx-cpu", "1.0"))
    site.install("mlx", wheel_files("mlx", "2.0", files={LIBRARY: b"built here"}))
    assert site.look() == Backends(("mlx", "mlx-cpu"), "mlx", "mlx", None)


def test_only_the_folder_that_mlx_is_imported_from_counts(tmp_path: Path) -> None:
    mine, other = Site(tmp_path / "mine"), Site(tmp_path / "other")
    mine.install("mlx-cpu", backend_files("mlx-cpu", "2.0"))
    other.install("mlx-cuda-13", backend_files("mlx-cuda-13", "2.0"))
    found = find_backends([str(tmp_path / "empty"), str(mine.folder), str(other.folder)])
    assert found == Backends(("mlx-cpu",), "mlx-cpu", "mlx-cpu", None)


def test_a_python_with_spaces_in_its_path(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.install("mlx-cpu", backend_files("mlx-cpu", "1.0"))
    mend = find_backends([str(tmp_path)], python="/my apps/python").mend
    assert mend is not None
    assert shlex.split(mend)[:2] == ["/my apps/python", "-m"]


def test_looking_imports_neither_mlx_nor_llm() -> None:
    code = (
        "import sys; from flash_moe.mlx_library import find_backends; find_backends(); "
        "sys.exit(bool({'mlx', 'mlx.core', 'llm'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "backend")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_these_tests_run_on_the_library_that_they_should() -> None:
    assert find_backends().mend is None


class Environment:
    """A virtual environment, and a folder of stand-ins that is all its pip can see."""

    def __init__(self, folder: Path) -> None:
        self.index, venv = folder / "index", folder / "venv"
        self.index.mkdir()
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        self.python = venv / "bin" / "python"
        [self.site] = venv.glob("lib/python*/site-packages")

    def add(self, name: str, files: dict[str, bytes]) -> None:
        wheel = self.index / f"{name.replace('-', '_')}-99.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for at, data in files.items():
                archive.writestr(at, data)

    def pip(self, *arguments: str) -> Backends:
        # Neither the user's configuration nor an index: what is not a stand-in is an error.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
        environment["PIP_CONFIG_FILE"] = os.devnull
        command = [sys.executable, "-m", "pip", "-q", "--python", str(self.python), *arguments]
        command += ["--no-index", "--find-links", str(self.index), "--disable-pip-version-check"]
        subprocess.run(command, check=True, env=environment)
        return find_backends([str(self.site)], python=str(self.python))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    pytest.importorskip("pip")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [r for r in project["dependencies"] if r.startswith("mlx")]
    cuda = {e: rs for e, rs in project["optional-dependencies"].items() if e.startswith("cuda")}
    ours += [f'{r}; extra == "{extra}"' for extra, rs in cuda.items() for r in rs]
    extras = {"cpu": "mlx-cpu", "cuda12": "mlx-cuda-12", "cuda13": "mlx-cuda-13"}
    environment = Environment(tmp_path)
    for name, requires, provides in [
        ("llm-flash-moe", ours, cuda),
        ("mlx", [f'{back}==99.0; extra == "{extra}"' for extra, back in extras.items()], extras),
        ("mlx-lm", [f'mlx[{extra}]; extra == "{extra}"' for extra in extras], extras),
        ("nvidia", [], []),
    ]:
        environment.add(name, wheel_files(name, "99.0", requires, provides))
    for name in BACKENDS:
        requires = [] if name == "mlx-cpu" else ["nvidia"]
        files = {LIBRARY: name.encode()}
        environment.add(name, wheel_files(name, "99.0", requires, files=files))
    return environment


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has one back end")
@pytest.mark.parametrize("extra", ["cuda12", "cuda13"])
def test_pip_with_the_extra_ends_with_cuda(environment: Environment, extra: str) -> None:
    cuda = f"mlx-cuda-{extra[-2:]}"
    expected = Backends(("mlx-cpu", cuda), cuda, cuda, None)
    assert environment.pip("install", f"llm-flash-moe[{extra}]") == expected

    broken = environment.pip("install", "--force-reinstall", "--no-deps", "mlx-cpu")
    assert (broken.active, broken.wanted) == ("mlx-cpu", cuda)
    assert broken.mend is not None
    python, _, _, *arguments = shlex.split(broken.mend)
    assert python == str(environment.python)
    assert environment.pip(*arguments) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has one back end")
def test_pip_without_the_extra_brings_the_cpu_and_a_later_extra_cuda(
    environment: Environment,
) -> None:
    found = environment.pip("install", "llm-flash-moe")
    assert found == Backends(("mlx-cpu",), "mlx-cpu", "mlx-cpu", None)
    assert environment.pip("install", "llm-flash-moe[cuda13]").active == "mlx-cuda-13"
