"""For every test an llm user folder of its own; for all of them one small model."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# float32 means float32: CUDA, and Metal on an M5, would round factors to TF32, which has 11 bits.
# MLX reads this at its first product.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

import mlx.core as mx
import pytest
from hypothesis import settings

from flash_moe import hold
from flash_moe.synth.model import Shape, synthesize

# The time that an example takes depends on how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# No matrix of 64 columns: MLX 0.32.4 on CUDA computes those wrongly.
DEMO = Shape(layers=4, experts=8, experts_per_token=4, hidden=256, intermediate=128)


def pytest_report_header() -> str:
    return f"mlx {mx.__version__} on {mx.default_device()}, Metal: {mx.metal.is_available()}"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts() -> None:
    """A shell that starts the tests in the background lets them, and what they start, ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def llm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own models and logs."""
    home = tmp_path / "llm-home"
    monkeypatch.setenv("LLM_USER_PATH", str(home))
    return home


@pytest.fixture(autouse=True)
def runtime_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are: not the user's own, short enough for one, and empty at the end."""
    with runtime() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
        yield folder


@contextmanager
def runtime() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fm-", dir="/tmp"))
    try:
        yield folder
    finally:
        stop_all(folder)
        shutil.rmtree(folder)


def stop_all(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(folder))
        for holder in hold.holders():
            hold.stop(holder)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of random weights. Read it, never change it."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    synthesize(folder, DEMO)
    return folder


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """The CPU, whatever this machine has: for equality to the bit, and for the native kernels."""
    from tests.devices import cpu

    with cpu():
        yield


@pytest.fixture
def not_on_cuda() -> Iterator[None]:
    """The CPU instead of CUDA, where MLX computes narrow quantized matrices wrongly."""
    from tests.devices import CUDA, cpu

    with cpu() if CUDA else nullcontext():
        yield


@contextmanager
def stepped_down() -> Iterator[None]:
    """Permissions mean nothing to root, so root becomes another user for a while. Skips the test
    where it may not."""
    if os.geteuid() != 0:
        yield
        return
    try:
        os.seteuid(65534)
    except OSError as error:
        pytest.skip(f"root cannot step down here: {error.strerror}")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def as_user() -> Iterator[None]:
    with stepped_down():
        yield
