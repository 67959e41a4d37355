"""Where sockets, locks and records lie: this user's own, whole, and gone when their process is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.errors import HolderGone
from flash_moe.hold.connection import Connection
from flash_moe.hold.places import (
    MOST_SOCKET_BYTES,
    Holder,
    Place,
    common_folder,
    ends,
    holders,
    is_private,
    namespace,
    printable,
    require_private,
    stop,
)

HOLDER = Holder(
    "k" * 16, os.getpid(), "demo", "/m", "experts 4", "0.1.0", 1.0, 2.0, None, 0, namespace()
)
IDENTITY = "k" * 64


@pytest.fixture
def place() -> Place:
    place = Place.of(IDENTITY)
    require_private(place.folder)
    return place


def test_it_lies_where_the_system_wants_it(runtime_folder: Path) -> None:
    assert common_folder() == runtime_folder / "flash-moe"


@pytest.mark.parametrize("fault", ["unset", "missing", "long", "open", "relative"])
def test_it_lies_in_the_temporary_folder_otherwise(
    runtime_folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder = {
        "unset": "",
        "missing": str(runtime_folder / "missing"),
        "long": str(runtime_folder / ("x" * 80)),
        "open": str(runtime_folder / "open"),
        "relative": ".",
    }[fault]
    if fault in ("long", "open"):
        Path(folder).mkdir(mode=0o700)
    if fault == "open":
        Path(folder).chmod(0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
    monkeypatch.setattr("tempfile.tempdir", "/tmp/some")
    assert common_folder() == Path(f"/tmp/some/flash-moe-{os.geteuid()}")
    # Then in the one that is surely short enough.
    monkeypatch.setattr("tempfile.tempdir", "/tmp/" + "y" * 80)
    assert common_folder() == Path(f"/tmp/flash-moe-{os.geteuid()}")


def test_names_are_short_enough_for_macos() -> None:
    assert len(os.fsencode(Place.of(IDENTITY).socket)) <= MOST_SOCKET_BYTES < 104


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777])
def test_a_folder_that_others_can_open_is_refused(place: Place, mode: int) -> None:
    place.folder.chmod(mode)
    with pytest.raises(HolderGone, match="this user alone"):
        require_private(place.folder)
    assert holders() == []


def test_a_folder_that_leads_elsewhere_is_refused(place: Place, tmp_path: Path) -> None:
    place.folder.rmdir()
    tmp_path.chmod(0o700)
    place.folder.symlink_to(tmp_path)
    with pytest.raises(HolderGone, match="this user alone"):
        require_private(place.folder)


def test_another_user_s_is_refused(place: Place) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(place.folder, 65534, 65534)
    assert not is_private(place.folder)
    with pytest.raises(HolderGone):
        require_private(place.folder)


def test_a_socket_that_others_can_open_is_not_spoken_to(place: Place) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
        listener.listen()
        listener.settimeout(0)
        place.socket.chmod(0o666)
        assert Connection.open(place, IDENTITY, 1) is None
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_peer_of_another_user_is_not_spoken_to(place: Place) -> None:
    """It is there before it steps down, as one that was given our socket would be."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    place.folder.chmod(0o700)
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(65534)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(f"/tmp/fm-foreign-{os.getpid()}")
            listener.listen()
            os.write(ready[1], b"x")
            os.read(done[0], 1)
        finally:
            os._exit(0)
    foreign = Path(f"/tmp/fm-foreign-{child}")
    try:
        assert os.read(ready[0], 1)
        # Ours by its file alone: what the kernel says of the other side decides.
        os.rename(foreign, place.socket)
        os.chown(place.socket, 0, 0)
        place.socket.chmod(0o600)
        assert is_private(place.socket)
        assert Connection.open(place, IDENTITY, 5) is None
    finally:
        os.write(done[1], b"x")
        os.waitpid(child, 0)
        for end in (*ready, *done):
            os.close(end)


def test_what_a_killed_process_left_is_removed(place: Place) -> None:
    place.lock.touch(0o600)
    place.write(HOLDER)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
    place.socket.chmod(0o600)
    assert Connection.open(place, IDENTITY, 1) is None
    assert not any(place.folder.iterdir())
    place.lock.touch(0o600)
    place.write(HOLDER)
    place.draft.write_text("half of a rec")
    assert holders() == []
    assert not any(place.folder.iterdir())


def test_what_a_living_process_has_stays(place: Place) -> None:
    lock = place.take(create=True)
    assert lock is not None
    try:
        place.write(HOLDER)
        assert place.take() is None
        assert place.take(create=True) is None
        assert not place.sweep()
        assert holders() == [HOLDER]
    finally:
        os.close(lock)
    assert holders() == []


def test_one_of_many_gets_the_lock(place: Place) -> None:
    """Again and again, while others remove it."""
    taken: list[int] = []
    inside, together = threading.Lock(), threading.Barrier(8)

    def take() -> None:
        together.wait()
        for _ in range(10):
            while (lock := place.take(create=True)) is None:
                pass
            assert inside.acquire(blocking=False)
            taken.append(lock)
            inside.release()
            place.clear(lock)
            os.close(lock)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 80
    assert not any(place.folder.iterdir())


def test_a_process_of_another_container_is_not_signalled(place: Place) -> None:
    """Its number is somebody else's here."""
    lock = place.take(create=True)
    assert lock is not None
    with subprocess.Popen(["sleep", "60"]) as other:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            there = replace(HOLDER, key=place.key, pid=other.pid, namespace="pid:[1]")
            assert not ends(there, number, 0.2)
        with pytest.raises(HolderGone, match="another container"):
            stop(there)
        assert other.poll() is None
        here = replace(there, namespace=namespace())
        assert not ends(here, signal.SIGTERM, 0.2)  # the lock is this process's
        assert other.wait(10) == -signal.SIGTERM
    os.close(lock)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"pid": "x"}', "[" * 60_000, '{"pid": 1e999}', "\0" * 70_000]
)
def test_a_record_that_is_damaged_is_none(place: Place, text: str) -> None:
    lock = place.take(create=True)
    assert lock is not None
    place.record.write_text(text)
    assert holders() == []
    os.close(lock)


def test_a_record_cannot_command_a_terminal(place: Place) -> None:
    place.write(HOLDER)
    value = json.loads(place.record.read_text())
    value["name"] = "a\x1b]0;x\x07\nb\u202e\x9b"
    place.record.write_text(json.dumps(value))
    read = place.read()
    assert read is not None
    assert read.name == "a\ufffd]0;x\ufffd\ufffdb\ufffd\ufffd"


@given(st.text())
def test_printable_is(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable() or "\ufffd" in shown
    assert not set(shown) & set(map(chr, [*range(32), 127, *range(128, 160)]))
