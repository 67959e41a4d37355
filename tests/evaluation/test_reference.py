"""References come back as they were saved, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.errors import CheckpointError, Remedy
from flash_moe.evaluation.documents import key_of
from flash_moe.evaluation.predictions import PredictionRecorder
from flash_moe.evaluation.reference import Reference, write_reference
from tests.evaluation.test_predictions import Rows, observed, random_logits


def record(rows: int) -> dict[str, Rows]:
    return observed(random_logits(1, 300, 3, 0)[0][:rows], PredictionRecorder(), [])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference"
    records = {key_of([rows, 2], 1): record(rows) for rows in (1, 7)}
    arrays = {f"{key}.{name}": array for key, r in records.items() for name, array in r.items()}
    write_reference(path, {"model": "one"}, load_tokenizer(demo_folder), arrays)
    return path


def test_documents_come_back_as_they_were(file: Path) -> None:
    reference = Reference(file)
    document = reference.find(key_of([7, 2], 1))
    assert document is not None
    assert {name: array.tolist() for name, array in document.items()} == {
        name: array.tolist() for name, array in record(7).items()
    }
    assert reference.find(key_of([7, 2], 2)) is None
    assert reference.model == {"model": "one"}
    assert [path.name for path in file.parent.iterdir()] == ["reference"]


@settings(max_examples=40)
@given(st.data())
def test_no_damage_goes_unnoticed(file: Path, data: st.DataObject) -> None:
    sound = file.read_bytes()
    broken = file.with_name("broken")
    if data.draw(st.booleans()):
        broken.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 1))])
    else:
        at = data.draw(st.integers(0, len(sound) - 1))
        broken.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    with pytest.raises(CheckpointError, match="not a reference, or it is damaged") as caught:
        Reference(broken)
    assert caught.value.remedy is Remedy.SAVE_REFERENCE
    broken.unlink()


def test_few_files_are_open(demo_folder: Path, tmp_path: Path) -> None:
    """There may be a thousand documents, and macOS gives 256 files to a process."""
    row = record(1)
    arrays = {f"{at}.{name}": array for at in range(60) for name, array in row.items()}
    write_reference(tmp_path / "many", {}, load_tokenizer(demo_folder), arrays)
    before = len(os.listdir("/dev/fd"))
    reference = Reference(tmp_path / "many")
    assert reference.find("59") is not None
    assert len(os.listdir("/dev/fd")) <= before + 1


def test_recorded_columns_have_stable_names_and_types() -> None:
    """References of earlier versions stay readable."""
    types = {name: array.dtype for name, array in record(7).items()}
    assert types == {
        "ids": np.uint16,
        "values": np.float32,
        "rest": np.float32,
        "best": np.uint32,
        "chosen": np.float32,
    }
