"""Loads libraries in C: those that came with the package, else compiled for this very processor,
once; later starts take that from a cache.

A cached file is named after what went in (source, compiler, flags, processor) and what came out, so
a file of another machine is never loaded and a damaged one is built again.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from flash_moe.callbacks import Notice, no_notice
from flash_moe.clock import part
from flash_moe.errors import NativeUnavailable
from flash_moe.native import shipped
from flash_moe.native.libraries import FLAGS, Library

COMPILE_SECONDS = 300

_notice: ContextVar[Notice] = ContextVar("notice", default=no_notice)


@contextmanager
def announcing(notice: Notice) -> Iterator[None]:
    """Inside, `notice` hears what is compiled: the kernels take 6 s."""
    before = _notice.set(notice)
    try:
        yield
    finally:
        _notice.reset(before)


def find_compiler() -> str | None:
    """$CC, else the first of cc, clang and gcc on the PATH."""
    for name in (os.environ.get("CC"), "cc", "clang", "gcc"):
        if name and (path := shutil.which(name)):
            return path
    return None


@part("kernels")
def build(library: Library, extra_flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """As shipped, from the cache, or compiled."""
    if not extra_flags and (ready := shipped.load(library)):
        return ready
    compiler = find_compiler()
    if compiler is None:
        raise NativeUnavailable(
            "No C compiler was found. On Debian: apt install gcc; on macOS: xcode-select --install"
        )
    try:
        source = library.source()
    except OSError as error:
        raise NativeUnavailable(
            f"The source of {library.title} cannot be read: {error}. Install again."
        ) from error
    version = _run([compiler, "--version"]).stdout
    inputs = repr((source, compiler, version, FLAGS, extra_flags, _processor()))
    stem = f"{library.name}-{hashlib.sha256(inputs.encode()).hexdigest()[:24]}"
    folder = cache_folder()
    for path in sorted(folder.glob(f"{stem}-*.so")) if folder else ():
        if loaded := _load(path):
            return loaded
    for target in (folder, _private_folder):
        place = target() if callable(target) else target
        if place and (loaded := _load(_compile(library, compiler, extra_flags, place, stem))):
            return loaded
    raise NativeUnavailable(
        f"What {compiler} made of {library.title} does not load. Set CC to another compiler."
    )


def _compile(
    library: Library, compiler: str, extra_flags: tuple[str, ...], folder: Path, stem: str
) -> Path:
    _notice.get()(f"compiling {library.title} for this processor, once")
    handle, temporary = tempfile.mkstemp(prefix=f"{stem}-", suffix=".tmp", dir=folder)
    os.close(handle)
    try:
        native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
        rest = [*extra_flags, str(library.sources[0]), "-o", temporary, "-lm"]
        done = _run([compiler, *FLAGS, native, *rest])
        if done.returncode:
            done = _run([compiler, *FLAGS, *rest])
        if done.returncode:
            last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise NativeUnavailable(
                f"{compiler} could not compile {library.title}. Set CC to another compiler "
                f"(gcc 9 and clang 12 or newer will do).\n{last}"
            )
        # Some linkers write a file of their own, with the bits that the umask leaves.
        os.chmod(temporary, 0o700)
        path = folder / f"{stem}-{_digest(Path(temporary))}.so"
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise NativeUnavailable(
            f"A library for {library.title} could not be written to {folder}: {error}. "
            "Make room there, or set XDG_CACHE_HOME."
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def _load(path: Path) -> ctypes.CDLL | None:
    """None where the file is damaged: mapping a cut one would end the process with SIGBUS; and
    where somebody else may have written it."""
    try:
        if not is_ours(path):
            return None
        if path.stem.rpartition("-")[2] != _digest(path):
            path.unlink()
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMPILE_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(
            f"{command[0]} did not run: {error}. Set CC to a C compiler that works."
        ) from error


def cache_folder() -> Path | None:
    """Ours to write, or None."""
    try:
        given = os.environ.get("XDG_CACHE_HOME")
        usual = "Library/Caches" if sys.platform == "darwin" else ".cache"
        folder = (Path(given) if given else Path.home() / usual) / "flash-moe"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_ours(folder):
            return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: no home
        return None


def first_time(what: str) -> bool:
    """Whether this was never asked before on this machine, as far as that can be remembered."""
    folder = cache_folder()
    try:
        if folder is not None:
            (folder / f"told-{what}").touch(mode=0o600, exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def is_ours(path: Path) -> bool:
    """Nobody but this user, or root, can have put there what is there. A program loads it."""
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


@cache
def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="flash-moe-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> str:
    """What -march=native looks at: a home folder may be shared by unlike machines."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
    except OSError:
        if sys.platform == "darwin":
            return _run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]).stdout
        return f"{platform.machine()} {platform.processor()}"
