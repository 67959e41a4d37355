"""Shared by the tests of evaluation: held-out data of every kind, and a model to measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flash_moe.engine import Engine
from flash_moe.options import Settings
from tests.evaluation.data import write_data


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never change it."""
    return write_data(tmp_path_factory.mktemp("data") / "heldout")


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[Engine]:
    engine = Engine.load(demo_folder, Settings(), prefix=None)
    yield engine
    engine.close()
