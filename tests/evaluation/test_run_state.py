"""An evaluation that was interrupted is resumed, with the results of an uninterrupted one."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.engine import Engine
from flash_moe.errors import OptionError
from flash_moe.evaluation.held_out import HeldOut, read_held_out
from flash_moe.evaluation.limits import Limits
from flash_moe.evaluation.reference import Reference, write_reference
from flash_moe.evaluation.run_state import (
    STALE_SECONDS,
    SUFFIX,
    RunState,
    SavedPredictions,
    key_of_run,
)
from flash_moe.options import Settings
from tests.evaluation.measuring import figures, measured

ITEMS = 4
SHORT = Limits(max_tokens=4)


@pytest.fixture(scope="module")
def held_out(data: Path) -> HeldOut:
    held_out = read_held_out(data, ["text", "questions", "json"], 1)
    assert len(held_out) == ITEMS
    return held_out


def interrupted(engine: Engine, held_out: HeldOut, items: int, **options: Any) -> None:
    """Ctrl-C after one more than so many items were measured, or were done already."""
    seen = iter(range(items))

    def advance(amount: int) -> None:
        if next(seen, None) is None:
            raise KeyboardInterrupt

    measured(engine, held_out, SHORT, advance=advance, **options)


@pytest.fixture(scope="module")
def uninterrupted(
    engine: Engine, held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A reference, and the figures of one run against it."""
    file = tmp_path_factory.mktemp("reference") / "reference"
    with RunState(file.parent, "key") as state:
        measured(engine, held_out, SHORT, recording=True, state=state)
        write_reference(file, {}, engine.tokenizer, SavedPredictions(state, ITEMS))
        state.clear()
    report = measured(engine, held_out, SHORT, constrained=True, reference=Reference(file))
    return file, figures(report)


@settings(max_examples=3)
@given(st.lists(st.tuples(st.integers(0, ITEMS - 1), st.booleans()), min_size=1, max_size=2))
def test_a_resumed_run_gives_what_one_run_gives(
    engine: Engine,
    held_out: HeldOut,
    uninterrupted: tuple[Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    interrupts: list[tuple[int, bool]],
) -> None:
    """Interrupted anywhere, and again, with the last file cut off or not: figures and predictions
    are the same, to the bit."""
    folder, (file, expected) = tmp_path_factory.mktemp("state"), uninterrupted
    options: dict[str, Any] = {
        "constrained": True,
        "recording": True,
        "reference": Reference(file),
    }
    for items, damaged in interrupts:
        with pytest.raises(KeyboardInterrupt), RunState(folder, "key") as state:
            interrupted(engine, held_out, items, state=state, **options)
        assert state.get(items) is not None
        if damaged:
            last = folder / "key" / f"{items:06}{SUFFIX}"
            last.write_bytes(last.read_bytes()[:-1])
            (folder / "key" / f".000003{SUFFIX}.tmp{SUFFIX}").write_bytes(b"half")
            assert state.get(items) is None
    with RunState(folder, "key") as state:
        report = measured(engine, held_out, SHORT, state=state, **options)
        predictions = SavedPredictions(state, ITEMS)
        write_reference(folder / "again", {}, engine.tokenizer, predictions)
        state.clear()
    assert figures(report) == expected
    assert (folder / "again").read_bytes() == file.read_bytes()
    assert not (folder / "key").exists()


def test_done_items_are_not_measured_again(
    engine: Engine, held_out: HeldOut, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), RunState(tmp_path, "key") as state:
        interrupted(engine, held_out, 2, state=state)
    counters = engine.model.streamer.reader.counters
    last = HeldOut(held_out.folder, [], held_out.dialogues[-1:])
    before = counters.nbytes
    measured(engine, last, SHORT)
    alone = counters.nbytes - before
    with RunState(tmp_path, "key") as state:
        assert state.done == 3
        measured(engine, held_out, SHORT, state=state)
    assert counters.nbytes - before == 2 * alone


def test_only_the_same_evaluation_is_resumed(
    engine: Engine, held_out: HeldOut, demo_folder: Path
) -> None:
    keys = [key_of_run(engine, held_out, False), key_of_run(engine, held_out, True)]
    keys.append(key_of_run(engine, HeldOut(held_out.folder, held_out.texts, []), False))
    fewer = Engine.load(demo_folder, Settings(experts=2), prefix=None)
    keys.append(key_of_run(fewer, held_out, False))
    fewer.close()
    assert len(set(keys)) == len(keys)
    assert key_of_run(engine, held_out, False) == keys[0]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with RunState(tmp_path, "key"):
        with pytest.raises(OptionError, match="Another process"), RunState(tmp_path, "key"):
            pass
        assert (tmp_path / "key").exists()
    with RunState(tmp_path, "key"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_stale_results_are_removed(tmp_path: Path) -> None:
    for name, age in (("old", STALE_SECONDS + 60), ("young", STALE_SECONDS - 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with RunState(tmp_path, "key"):
        assert {path.name for path in tmp_path.iterdir()} == {"young", "key"}
