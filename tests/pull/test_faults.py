"""Whatever the network does, a pull ends in the pack that `pack` makes of a copy, to the byte, or
stops so that it can go on. `pytest -m slow tests/pull` tries a hundred schedules."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import FetchFailed, FlashMoeError
from flash_moe.format.manifest import MANIFEST
from flash_moe.model.load import load
from flash_moe.pull.job import PullJob
from flash_moe.pull.ranges import Patience
from tests.pack.packs import hashes, pack
from tests.pull.conftest import using
from tests.pull.hub import FAULTS, Hub, Trouble, serving

FORMS: list[dict[str, Any]] = [{}, {"bits": 2}, {"planes": True}]
HURRIED = Patience(stall=0.25, pause=0.005, longest=0.05, give_up=0.8, first=0.8)


@pytest.fixture(scope="module")
def packs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What `pack` makes of the checkpoint, for each form."""
    folder = tmp_path_factory.mktemp("packs")
    return [hashes(pack(source, folder / str(number), **form)) for number, form in enumerate(FORMS)]


@contextmanager
def finely() -> Iterator[None]:
    """Small parts, so that a small model takes as many requests and checkpoints as a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flash_moe.pull.stream.RANGE_BYTES", 16 << 10)
        patch.setattr("flash_moe.pull.stream.WINDOW_BYTES", 128 << 10)
        patch.setattr("flash_moe.pull.spans.BATCH_BYTES", 32 << 10)
        for module in ("route", "receive"):
            patch.setattr(f"flash_moe.pull.{module}.CHECKPOINT_BYTES", 100 << 10)
        yield


def one_after_the_other(faults: list[str | None]) -> Trouble:
    lock, left = Lock(), list(faults)

    def trouble() -> str | None:
        with lock:
            return left.pop(0) if left else None

    return trouble


def pull(hub: Hub, target: Path, **form: Any) -> PullJob:
    job = PullJob.plan(hub.name, target, patience=HURRIED, **form)
    job.write()
    return job


def assert_no_model(target: Path) -> None:
    """Neither the target nor anything in its workspace opens as one."""
    assert not target.exists()
    partial = target.with_name(target.name + ".partial")
    with pytest.raises(FlashMoeError):
        open_folder(partial)
    if not (partial / "pack" / MANIFEST).exists():  # with it, only the name is missing
        with pytest.raises(FlashMoeError):
            load(partial / "pack")


def check(hub: Hub, faults: list[str | None], form: int, expected: dict[str, str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="pull-"))
    try:
        hub.trouble, hub.dice = one_after_the_other(faults), Random(len(faults))
        target = folder / "pack"
        for attempt in range(6):
            try:
                pull(hub, target, **FORMS[form])
                break
            except FlashMoeError as error:
                note(f"attempt {attempt}: {error}")
                assert_no_model(target) if target.with_name("pack.partial").exists() else None
        assert hashes(target) == expected
        assert not hub.leaked
        assert [path.name for path in folder.iterdir()] == ["pack"]
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hub(source: Path) -> Iterator[Hub]:
    with serving(source) as hub, using(hub), finely():
        hub.stall_seconds = 0.4
        yield hub


schedules = st.lists(st.sampled_from((None, None, None, *FAULTS)), max_size=40)


@settings(max_examples=4)
@given(schedules, st.integers(0, 2))
def test_any_schedule(
    hub: Hub, packs: list[dict[str, str]], faults: list[str | None], form: int
) -> None:
    check(hub, faults, form, packs[form])


@pytest.mark.slow
@settings(max_examples=100)
@given(schedules, st.integers(0, 2))
def test_a_hundred_schedules(
    hub: Hub, packs: list[dict[str, str]], faults: list[str | None], form: int
) -> None:
    check(hub, faults, form, packs[form])


@pytest.mark.parametrize("first", [0, 1])
def test_every_fault(hub: Hub, packs: list[dict[str, str]], first: int) -> None:
    """Each twice, with good answers before, between and after."""
    faults = [[None, None, None, fault, None, fault] for fault in FAULTS[first::2]]
    check(hub, [None] * 12 + [fault for some in faults for fault in some], 1, packs[1])


@pytest.mark.parametrize("fault", ["500", "429", "403", "corrupt", "redirect", "200"])
def test_a_fault_that_stays(source: Path, hub: Hub, tmp_path: Path, fault: str) -> None:
    """It stops with an error, nothing loads, and when the fault is gone, it goes on."""
    hub.trouble, target = lambda: None, tmp_path / "pack"
    job = PullJob.plan(hub.name, target, patience=HURRIED)
    hub.trouble = one_after_the_other([None] * 25 + [fault] * 3000)
    with pytest.raises(FetchFailed):
        job.write()
    assert_no_model(target)
    hub.trouble = lambda: None
    pull(hub, target)
    assert hashes(target) == hashes(pack(source, tmp_path / "packed"))
