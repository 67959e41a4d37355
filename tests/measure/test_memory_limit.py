"""Holding the machine to less memory: by a control group where one can be made, else by a ballast;
undone in every case. Files in a folder stand in for control groups where there are none."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import OptionError
from flash_moe.machine import Machine
from flash_moe.measure import memory_limit
from flash_moe.measure.memory_limit import BESIDES, CGROUPS, OWN_GROUP, held_to, require_sense

MB = 10**6
ME = str(os.getpid())
sizes = st.integers(0, 10**12)


# What makes sense ---------------------------------------------------------------------------------


@given(sizes, sizes, sizes)
def test_too_little_and_no_limit_at_all_are_refused(
    nbytes: int, needed: int, available: int
) -> None:
    if needed + BESIDES <= nbytes < available:
        require_sense(nbytes, needed, available)
    else:
        with pytest.raises(OptionError, match=f"memory={nbytes:,}: "):
            require_sense(nbytes, needed, available)


@given(sizes, sizes)
def test_the_size_that_is_proposed_is_enough(nbytes: int, needed: int) -> None:
    try:
        require_sense(nbytes, needed, 2 * 10**12)
    except OptionError as error:
        proposed = int(str(error).split("choose ")[1].split()[0].replace(",", ""))
        require_sense(proposed, needed, 2 * 10**12)


def test_where_the_system_does_not_tell() -> None:
    with pytest.raises(OptionError, match="does not say how much"):
        require_sense(10**9, 0, None)


# Control groups -----------------------------------------------------------------------------------


class Groups:
    """Folders like those of a system with control groups, version 2; this process is in `own`."""

    def __init__(self, root: Path, own: str) -> None:
        self.root, self.own, self.membership = root / "groups", root / "groups" / own, root / "own"
        self.own.mkdir(parents=True)
        for folder in (self.own, *self.own.parents):
            if folder.is_relative_to(self.root):
                (folder / "cgroup.subtree_control").write_text("cpu\n")
        (self.root / "cgroup.controllers").write_text("cpu memory\n")
        self.membership.write_text(f"5:name=other:/elsewhere\n0::/{own}\n")

    def grant(self, folder: Path) -> None:
        (folder / "cgroup.subtree_control").write_text("cpu memory\n")

    def children(self) -> list[Path]:
        return list(self.root.rglob("flash-moe-*"))


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    # The files in a real group go with it.
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)
    return Groups(tmp_path, "user/session")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_group_is_entered_and_left(groups: Groups, error: type[BaseException] | None) -> None:
    parent = groups.own.parent
    groups.grant(parent)
    with (
        pytest.raises(error) if error else nullcontext(),
        held_to(700 * MB, root=groups.root, own_group=groups.membership) as held,
    ):
        assert held is not None
        assert (held.by, held.nbytes, held.ballast) == ("group", 700 * MB, 0)
        (child,) = groups.children()
        assert child.parent == parent
        assert (child / "memory.max").read_text() == str(700 * MB)
        assert (child / "cgroup.procs").read_text() == ME
        assert not (groups.own / "cgroup.procs").exists()
        if error:
            raise error
    assert groups.children() == []
    assert (groups.own / "cgroup.procs").read_text() == ME


def test_without_the_right_to_a_group_there_is_a_ballast(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No group that has memory to give, one that cannot be changed, or none at all."""
    available(monkeypatch, 50 * MB)

    def kind() -> str:
        with held_to(40 * MB, root=groups.root, own_group=groups.membership) as held:
            assert held is not None
            assert groups.children() == ([] if held.by == "ballast" else groups.children())
            return held.by

    assert kind() == "ballast"
    groups.grant(groups.root)
    assert kind() == "group"

    def refused(self: Path, *arguments: object, **named: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        assert kind() == "ballast"
    with monkeypatch.context() as patch:  # the folder may be made, but not entered
        patch.setattr(memory_limit, "_move_to", refused)
        assert kind() == "ballast"
        assert groups.children() == []
    assert kind() == "group"
    groups.membership.write_text("4:memory:/old\n")
    assert kind() == "ballast"


def test_a_real_group_limits_memory() -> None:
    """And with it the page cache: what this process reads there does not grow beyond."""
    with held_to(300 * MB) if can_make_a_group() else pytest.skip("no group here") as held:
        assert held is not None
        assert held.by == "group"
        inside = OWN_GROUP.read_text()
        folder = CGROUPS / inside.split("::/")[1].strip()
        assert int((folder / "memory.max").read_text()) <= 300 * MB
    assert OWN_GROUP.read_text() != inside
    assert not folder.exists()


def can_make_a_group() -> bool:
    group = memory_limit._enter(10**12, CGROUPS, OWN_GROUP) if sys.platform == "linux" else None
    if group is not None:
        group.leave()
    return group is not None


# Ballast ------------------------------------------------------------------------------------------


def available(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    machine = Machine("processor", 2, 10**10, nbytes)
    monkeypatch.setattr(memory_limit, "inspect_machine", lambda: machine)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_ballast_takes_what_is_beyond_and_gives_it_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    available(monkeypatch, 500 * MB)
    before, said = resident(), list[str]()
    with held_to(300 * MB, said.append, tmp_path, tmp_path / "none") as held:
        assert held is not None
        assert (held.by, held.ballast) == ("ballast", 200 * MB)
        assert resident() - before >= 190 * MB
    assert resident() - before < 100 * MB
    assert said[0] == "taking memory away, 0.0 of 0.2 GB"


def test_a_ballast_is_never_more_than_there_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    available(monkeypatch, 200 * MB)
    with held_to(300 * MB, root=tmp_path, own_group=tmp_path / "none") as held:
        assert held is not None
        assert held.ballast == 0


def test_without_a_limit_nothing_is_held() -> None:
    with held_to(None) as held:
        assert held is None
