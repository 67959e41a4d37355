"""An evaluation that was interrupted goes on, and finds what it would have found."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.engine import Engine
from flash_moe.errors import OptionError
from flash_moe.evaluation import replies
from flash_moe.evaluation.evaluate import Wanted, evaluate
from flash_moe.evaluation.findings import Evaluation
from flash_moe.evaluation.held_out import HeldOut, read_held_out
from flash_moe.evaluation.reference import Reference, write_reference
from flash_moe.evaluation.resume import FORGOTTEN_SECONDS, Foreseen, Unfinished, key_of_run
from flash_moe.model.load import Settings
from tests.evaluation.data import write_data
from tests.plugin.terminal import llm, works

ITEMS = 4


@pytest.fixture(scope="module", autouse=True)
def _short() -> Iterator[None]:
    """A random model never stops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replies, "MAX_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[Engine]:
    engine = Engine.load(demo_folder, Settings(), prefix=None)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    data = write_data(tmp_path_factory.mktemp("data") / "heldout")
    found = read_held_out(data, ["text", "questions", "json"], 1)
    assert len(found) == ITEMS
    return found


def figures(found: Evaluation | dict[str, Any]) -> dict[str, Any]:
    """Without seconds, which are never the same."""
    result: dict[str, Any] = found if isinstance(found, dict) else found.to_json()
    del result["seconds"]
    for cost in result["cost"].values():
        del cost["seconds"], cost["tokens_per_second"]
    return result


def interrupted_after(items: int) -> Any:
    """Ctrl-C, after so many items were found or done."""
    seen = iter(range(items))

    def progress(done: int) -> None:
        if next(seen, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.fixture(scope="module")
def kept(
    engine: Engine, held_out: HeldOut, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A reference, and what one uninterrupted run finds against it."""
    file = tmp_path_factory.mktemp("kept") / "kept"
    with Unfinished(file.parent, "key") as unfinished:
        evaluate(engine, held_out, wanted=Wanted(keeping=True), unfinished=unfinished)
        write_reference(file, {}, engine.tokenizer, Foreseen(unfinished, ITEMS))
    wanted = Wanted(constrained=True, against=Reference(file))
    return file, figures(evaluate(engine, held_out, wanted=wanted))


@settings(max_examples=3)
@given(st.lists(st.tuples(st.integers(0, ITEMS - 1), st.booleans()), min_size=1, max_size=2))
def test_going_on_gives_what_one_run_gives(
    engine: Engine,
    held_out: HeldOut,
    kept: tuple[Path, dict[str, Any]],
    tmp_path_factory: pytest.TempPathFactory,
    interrupts: list[tuple[int, bool]],
) -> None:
    """Interrupted anywhere, and again, with the last file cut off or without: the figures and what
    was foreseen are the same, to the bit."""
    folder, (file, whole) = tmp_path_factory.mktemp("unfinished"), kept
    wanted = Wanted(constrained=True, keeping=True, against=Reference(file))
    for items, damaged in interrupts:
        with pytest.raises(KeyboardInterrupt), Unfinished(folder, "key") as unfinished:
            evaluate(engine, held_out, interrupted_after(items), wanted, unfinished)
        assert unfinished.get(items) is not None
        if damaged:
            last = folder / "key" / f"{items:06}.finding"
            last.write_bytes(last.read_bytes()[:-1])
            (folder / "key" / ".000003.finding.tmp.finding").write_bytes(b"half")
            assert unfinished.get(items) is None
    with Unfinished(folder, "key") as unfinished:
        found = evaluate(engine, held_out, wanted=wanted, unfinished=unfinished)
        write_reference(folder / "again", {}, engine.tokenizer, Foreseen(unfinished, ITEMS))
    assert figures(found) == whole
    assert (folder / "again").read_bytes() == file.read_bytes()
    assert not (folder / "key").exists()


def test_what_is_found_is_not_measured_again(
    engine: Engine, held_out: HeldOut, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), Unfinished(tmp_path, "key") as unfinished:
        evaluate(engine, held_out, interrupted_after(2), unfinished=unfinished)
    counters = engine.model.streamer.reader.counters
    last = HeldOut(held_out.folder, [], held_out.dialogues[-1:])
    before = counters.nbytes
    evaluate(engine, last)
    alone = counters.nbytes - before
    with Unfinished(tmp_path, "key") as unfinished:
        assert unfinished.done == 3
        evaluate(engine, held_out, unfinished=unfinished)
    assert counters.nbytes - before == 2 * alone


def test_only_the_same_evaluation_goes_on(
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
    with Unfinished(tmp_path, "key"):
        with pytest.raises(OptionError, match="Another process"), Unfinished(tmp_path, "key"):
            pass
        assert (tmp_path / "key").exists()
    with Unfinished(tmp_path, "key"):
        pass


def test_what_nobody_went_on_with_goes(tmp_path: Path) -> None:
    for name, age in (("old", FORGOTTEN_SECONDS + 60), ("young", FORGOTTEN_SECONDS - 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with Unfinished(tmp_path, "key"):
        assert {path.name for path in tmp_path.iterdir()} == {"young", "key"}


def test_the_command(
    demo_folder: Path, tmp_path: Path, llm_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data")
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text", "--json")
    whole = json.loads(works(*ask).stdout)
    put = Unfinished.put

    def stop(self: Unfinished, number: int, finding: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        put(self, number, finding)

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "put", stop)
        stopped = llm(*ask)
    assert stopped.exit_code == 1
    assert "Stopped after 2 of 3 items: the same command goes on from there." in stopped.stderr
    folder = llm_home / "llm-flash-moe" / "evaluations"
    assert len(list(folder.glob("*/*.finding"))) == 2
    again = works(*ask)
    assert "Going on after 2 of 3 items." in again.stderr
    assert figures(json.loads(again.stdout)) == figures(whole)
    assert list(folder.iterdir()) == []
