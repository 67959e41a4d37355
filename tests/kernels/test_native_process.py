"""The native library among threads, forks, and compilers and caches that fail."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flash_moe.errors import NativeUnavailable
from flash_moe.kernels.native import KERNELS, Native
from flash_moe.native import build as native_build
from flash_moe.native.build import find_compiler
from tests.kernels.native_cases import layer

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")


def test_what_is_compiled_is_announced_and_what_is_cached_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.c"
    source.write_text("int one(void) { return 1; }")
    heard: list[str] = []
    for _ in range(2):
        with native_build.announcing(heard.append):
            library = native_build.build(native_build.Library("small", "a small one", (source,)))
        assert library.one() == 1
    assert heard == ["compiling a small one for this processor, once"]
    source.write_text("int one(void) { return 1; } ")
    native_build.build(native_build.Library("small", "a small one", (source,)))
    assert len(heard) == 1


def test_a_library_that_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder, or from a file, that is another user's or that another user may write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "small.c"
    source.write_text("int one(void) { return 1; }")
    heard: list[str] = []

    def compiled() -> bool:
        before = len(heard)
        with native_build.announcing(heard.append):
            library = native_build.build(native_build.Library("small", "a small one", (source,)))
        assert library.one() == 1
        return len(heard) > before

    assert compiled()
    assert not compiled()
    folder = tmp_path / "flash-moe"
    (file,) = folder.glob("*.so")
    for path in (folder, file):
        mode = path.stat().st_mode
        for wider in (0o020, 0o002):
            path.chmod(mode | wider)
            assert compiled(), f"{path.name} with {wider:o}"
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 12345, -1)
            assert compiled(), f"{path.name} of another user"
            os.chown(path, 0, -1)
    assert native_build.cache_folder() == folder
    folder.chmod(0o777)
    assert native_build.cache_folder() is None


def test_a_linker_that_writes_with_the_umasks_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lld does under a umask of 002: what is compiled is still ours alone."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\n{find_compiler()} "$@" || exit\n'
        'while [ "$1" ]; do [ "$1" = -o ] && chmod 775 "$2"; shift; done; exit 0\n'
    )
    compiler.chmod(0o700)
    source = tmp_path / "small.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = native_build.build(native_build.Library("small", "a small one", (source,)))
    assert library.one() == 1
    (file,) = (tmp_path / "cache").rglob("*.so")
    assert not file.stat().st_mode & 0o022


# -- threads and processes ----------------------------------------------------------------------


def test_two_python_threads_at_once(best: Native) -> None:
    best.threads = 3
    want = [layer(best, seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        wrong.extend(seed for _ in range(100) if not np.array_equal(layer(best, seed), want[seed]))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _child(sender: Any, native: Native) -> None:
    result = layer(native).tobytes()
    tasks = Path("/proc/self/task")
    sender.send((result, len(list(tasks.iterdir())) if tasks.exists() else native.threads))


# Python itself warns where a process with threads forks.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_starts_its_own_threads(best: Native) -> None:
    """Also one that comes while another thread is inside a call, and holds what the child needs."""
    best.threads = 4
    want = layer(best).tobytes()
    fork = multiprocessing.get_context("fork")
    done = threading.Event()

    def stay_inside() -> None:
        while not done.is_set():
            layer(best)

    busy = threading.Thread(target=stay_inside)
    busy.start()
    try:
        for _ in range(5):
            receiver, sender = fork.Pipe(duplex=False)
            child = fork.Process(target=_child, args=(sender, best))
            child.start()
            answered = receiver.poll(30)
            if not answered:
                child.kill()
            child.join()
            assert answered
            assert receiver.recv() == (want, 4)
    finally:
        done.set()
        busy.join()
    assert layer(best).tobytes() == want


# -- building -----------------------------------------------------------------------------------


def built(home: Path) -> list[Path]:
    return sorted((home / "flash-moe").glob("*"))


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-O0"))  # 0.6 s, not 4
    return tmp_path


def test_a_damaged_file_is_built_again(fresh: Path) -> None:
    native_build.build(KERNELS)
    (first,) = built(fresh)
    content = first.read_bytes()
    before = first.stat().st_mtime_ns
    native_build.build(KERNELS)
    assert first.stat().st_mtime_ns == before  # used as it is
    for damaged in (content[: len(content) // 2], b"", content[:-1] + b"\x01"):
        first.unlink()  # a mapped file is never written to
        first.write_bytes(damaged)
        native_build.build(KERNELS)
        assert [path.read_bytes() for path in built(fresh)] == [content]


def test_a_cache_that_cannot_be_written(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "flash-moe").write_text("a file where the folder should be")
    native = Native(native_build.build(KERNELS))
    assert layer(native).shape == (3, 256)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no/such")
    assert native_build.build(KERNELS) is not None


def test_no_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CC", raising=False)
    assert find_compiler() is None
    with pytest.raises(NativeUnavailable, match="apt install gcc"):
        native_build.build(KERNELS)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo native.c: the reason >&2; exit 1", "the reason"),
        (
            'while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done; echo x > "${2:-/dev/null}"',
            "not load",
        ),
    ],
)
def test_a_compiler_that_fails(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("CC", script(fresh / "mycc", text))
    with pytest.raises(NativeUnavailable, match=message):
        native_build.build(KERNELS)
    assert not [path for path in built(fresh) if path.suffix == ".tmp"]


def test_a_compiler_that_does_not_run(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fresh / "mycc"
    bad.write_bytes(b"\x7fELF nothing")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    with pytest.raises(NativeUnavailable, match="did not run"):
        native_build.build(KERNELS)


def test_a_compiler_that_knows_no_native(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_compiler()
    refuse = f'case "$*" in *=native*) exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CC", script(fresh / "mycc", refuse))
    assert Native(native_build.build(KERNELS)).simd in ("scalar", "NEON")
