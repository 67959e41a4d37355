"""Finds clang, compiles kernels and the runtime, and caches the libraries for the next run.

They lie in the user's cache under the hash of everything that went into them, so that a warm run
compiles nothing, and two workers that compile the same one at once both end with a complete one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal, NoReturn

import pytest

Build = Literal["plain", "asan", "tsan"]

HERE = Path(__file__).parent
HEADER = HERE.parents[1] / "shaders" / "metal_on_host.h"
OLDEST = 17  # the first clang whose __bf16 does arithmetic
PACKAGES = "clang-19 libclang-rt-19-dev llvm-19"

# Contraction would round differently from the text; the GPU's own is not modelled.
COMMON = ["-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-attributes"]
SANITIZERS = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
# Flat, or the sanitizers would see no buffer at all. O0 keeps reads whose value goes nowhere, and
# compiles in half the time (0.10 s against 0.25 s); at our sizes running is next to nothing.
CHECKED = ["-O0", "-gline-tables-only", "-fdebug-compilation-dir=.", "-DMETAL_FLAT"]
FLAGS = {
    "plain": ["-O2"],
    "asan": [
        *(*CHECKED, SANITIZERS["asan"]),
        *("-fno-sanitize-recover=undefined", "-fno-sanitize=vptr,function"),
    ],
    "tsan": [*CHECKED, SANITIZERS["tsan"]],
}


class CompileError(Exception):
    """The compiler's own words."""


def unavailable(why: str) -> NoReturn:
    """Ends the test: a machine may lack a tool, CI may not."""
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@cache
def find_clang() -> str | None:
    if path := os.environ.get("METAL_EMULATOR_CXX"):
        return path
    for name in ["clang++-19", *(f"clang++-{n}" for n in range(20, OLDEST - 1, -1)), "clang++"]:
        path = shutil.which(name)
        if path and _version(path) >= OLDEST:
            return path
    return None


def _version(clang: str) -> int:
    text = subprocess.run([clang, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"version (\d+)", text)
    return int(match[1]) if match else 0


def clang() -> str:
    return find_clang() or unavailable(NO_CLANG)


NO_CLANG = f"needs clang {OLDEST} or newer for C++: apt install {PACKAGES}"
# In CI nothing is skipped: the test runs, and fails for want of clang.
needs_clang = pytest.mark.skipif(find_clang() is None and not os.environ.get("CI"), reason=NO_CLANG)


@cache
def _machine() -> tuple[str, ...]:
    """F16C and FMA where they are: without, each fma is a call into libm."""
    try:
        known = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    except OSError:
        return ()
    needed = {"avx2", "fma", "f16c", "bmi2"}
    return ("-march=x86-64-v3",) if needed <= set(known) else ()


@cache
def folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "flash-moe-tests"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            _prune(path)
            return path
    except OSError:
        pass
    path = Path(tempfile.gettempdir()) / f"flash-moe-tests-{os.getuid()}"
    path.mkdir(exist_ok=True)
    return path


def _prune(path: Path) -> None:
    """Random shapes leave a library each: away with what a month has not used."""
    for file in path.iterdir():
        with suppress(OSError):  # another worker was faster, or it is that one's scratch folder
            if file.stat().st_mtime < time.time() - 30 * 86400:
                file.unlink()


@cache
def symbolizer() -> str | None:
    """Turns a sanitizer's addresses into lines; Debian's has the version in its name only."""
    beside = Path(clang()).resolve().parent / "llvm-symbolizer"
    return str(beside) if beside.exists() else shutil.which("llvm-symbolizer")


@cache
def _toolchain() -> str:
    version = subprocess.run([clang(), "--version"], capture_output=True, text=True).stdout
    return f"{version}{platform.machine()}"


def _make(name: str, files: dict[str, str], command: list[str]) -> Path:
    """The file that `command` makes of `files`, whose names it may use; from the cache if there."""
    inputs = repr((_toolchain(), sorted(files.items()), command))
    path = folder() / f"{name}-{hashlib.sha256(inputs.encode()).hexdigest()[:24]}"
    if path.exists():
        os.utime(path)
        return path
    with tempfile.TemporaryDirectory(dir=folder()) as scratch:
        for file, text in files.items():
            (Path(scratch) / file).write_text(text)
        done = subprocess.run(
            [clang(), *command, "-o", "output"], cwd=scratch, capture_output=True, text=True
        )
        if "libclang_rt" in done.stderr:
            unavailable(f"needs clang's sanitizers, apt install {PACKAGES}: {done.stderr}")
        if done.returncode:
            raise CompileError(done.stderr)
        os.replace(Path(scratch) / "output", path)
    return path


def kernel(text: str, build: Build) -> Path:
    """A shared library of one kernel."""
    files = {
        "runtime.h": (HERE / "runtime.h").read_text(),
        "metal_on_host.h": HEADER.read_text(),
        "kernel.cpp": text,
    }
    flags = [*COMMON, *_machine(), *FLAGS[build], "-shared", "-I.", "kernel.cpp"]
    return _make(f"kernel-{build}", files, flags)


def check_syntax(text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "kernel.cpp").write_text(text)
        command = [clang(), *COMMON, *_machine(), "-fsyntax-only", "-fno-color-diagnostics", *flags]
        include = ["-I", str(HERE), "-I", str(HEADER.parent)]
        return subprocess.run(
            [*command, *include, f"{scratch}/kernel.cpp"], capture_output=True, text=True
        )


@cache
def runtime(build: Build) -> Path:
    """A library for Python's own process, or for a sanitizer a program."""
    names = ("runtime.cpp", "launch.cpp", "runtime.h", "launch.h", "fibre.h")
    files = {name: (HERE / name).read_text() for name in names}
    files["all.cpp"] = '#include "runtime.cpp"\n#include "launch.cpp"\n'
    flags = [*COMMON, "-O2", "-I.", "all.cpp"]
    if build == "plain":
        return _make("runtime-plain", files, [*flags, "-shared"])
    # Linked with the sanitizer, but not compiled with it.
    macros = ["-DEMULATOR_MAIN", f"-DEMULATOR_{build.upper()}"]
    unit = _make(f"object-{build}", files, [*flags, *macros, "-c"])
    return _make(f"runtime-{build}", {}, [SANITIZERS[build], str(unit)])


@cache
def program(build: Build) -> list[str]:
    """The command that starts a sanitizer's program; TSan wants memory where it always is."""
    path = str(runtime(build))
    for prefix in [["setarch", "-R"], []] if build == "tsan" and shutil.which("setarch") else [[]]:
        if subprocess.run([*prefix, path], capture_output=True).returncode == 0:
            return [*prefix, path]
    unavailable(f"{build} does not start here")
