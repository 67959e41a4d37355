from __future__ import annotations

from pathlib import Path

import pytest

from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Settings
from flash_moe.synth.model import Shape, synthesize
from tests.architectures import random_model, write_checkpoint

SHAPE = Shape(layers=4, experts=8, hidden=128, intermediate=128, vocabulary=1100)


@pytest.fixture(scope="session")
def hybrid_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3.5-MoE: three layers of four are recurrent."""
    folder = tmp_path_factory.mktemp("prefix") / "hybrid"
    synthesize(folder, SHAPE)
    return folder


@pytest.fixture(scope="session")
def hybrid(hybrid_folder: Path) -> StreamedModel:
    return load(hybrid_folder, Settings(bank_bytes=1))


@pytest.fixture(scope="session")
def hybrid_mlx(hybrid_folder: Path) -> StreamedModel:
    return load(hybrid_folder, Settings(runtime="mlx", bank_bytes=1))


@pytest.fixture(scope="session")
def attention(tmp_path_factory: pytest.TempPathFactory) -> StreamedModel:
    """Qwen3-MoE: keys and values in every layer, nothing else."""
    folder = tmp_path_factory.mktemp("prefix") / "attention"
    write_checkpoint(*random_model("qwen3_moe"), folder)
    return load(folder, Settings(bank_bytes=1))
