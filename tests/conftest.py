"""What every test gets: an llm user folder of its own, and one small model made once a session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import settings

from flash_moe.synth.model import Shape, synthesize

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# No matrix of 64 columns: MLX 0.32.4 on CUDA computes those wrongly.
DEMO = Shape(layers=4, experts=8, experts_per_token=4, hidden=256, intermediate=128)


def pytest_report_header() -> str:
    return f"mlx {mx.__version__} on {mx.default_device()}, Metal: {mx.metal.is_available()}"


@pytest.fixture(autouse=True)
def llm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's own models and logs."""
    home = tmp_path / "llm-home"
    monkeypatch.setenv("LLM_USER_PATH", str(home))
    return home


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of random weights. Read it, never change it."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    synthesize(folder, DEMO)
    return folder


@contextmanager
def stepped_down() -> Iterator[None]:
    """Permissions mean nothing to root, so root steps down for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def as_user() -> Iterator[None]:
    with stepped_down():
        yield
