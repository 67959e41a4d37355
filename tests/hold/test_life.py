"""A process that holds a model: it begins once, ends when it should, and leaves nothing behind,
however it ends."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flash_moe import hold
from flash_moe.errors import CheckpointError, HolderGone
from flash_moe.hold import client, connection, room
from flash_moe.hold.launch import launch
from flash_moe.hold.loading import Loading
from flash_moe.hold.places import Place, common_folder, ends, require_private
from flash_moe.options import Settings
from tests.hold.processes import (
    LONG,
    PATIENCE,
    ask,
    eventually,
    found,
    idle,
    is_gone,
    loading_of,
    nothing_is_left,
    python,
    reply,
    said,
    speaking,
    start,
)

START_AND_ASK = """
import sys
from contextlib import closing
from pathlib import Path
from flash_moe import Request, hold

loading = hold.Loading(Path(sys.argv[1]), prompts=Path(sys.argv[2]))
sys.stdin.read()
with closing(hold.start(loading, "demo", 600)) as model:
    request = Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    print("".join(model.reply(request)), end="")
"""


@pytest.fixture
def loading(demo_folder: Path, tmp_path: Path) -> Loading:
    return loading_of(demo_folder, tmp_path)


def long() -> Any:
    return ask(max_tokens=100_000)


def test_nobody_is_found_where_nobody_is(loading: Loading) -> None:
    assert hold.find(loading) is None
    assert hold.holders() == []
    assert nothing_is_left()


def test_ten_at_once_start_one(loading: Loading) -> None:
    processes = [python(START_AND_ASK, loading.path, loading.prompts) for _ in range(10)]
    texts = {process.communicate(timeout=PATIENCE)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 10
    assert len(texts) == 1
    assert texts != {""}
    assert len(hold.holders()) == 1
    assert len(list(common_folder().iterdir())) == 3


def test_it_says_what_it_is(loading: Loading) -> None:
    before = time.time()
    holder = start(loading, seconds=600)
    assert holder.name == "demo"
    assert holder.holds(loading.path)
    assert not holder.holds(loading.path.parent)
    assert before - 1 < holder.since <= holder.used <= time.time()
    assert holder.until is not None
    assert abs(holder.until - holder.used - 600) < 1
    assert (holder.resident_bytes or 0) > 30e6
    with closing(found(loading)) as model:
        events = model.reply(long()).events()
        next(events)
        eventually(lambda: hold.holders()[0].answering)
        events.close()
    after = eventually(lambda: idle(loading))
    assert after.used > holder.used
    with closing(client.find(loading, seconds=float("inf"))) as model:  # type: ignore[arg-type]
        model.wait()
    assert eventually(lambda: idle(loading)).until is None


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_it_goes_when_it_is_idle(loading: Loading, seconds: float) -> None:
    holder = start(loading)
    with closing(client.find(loading, seconds)) as model:  # type: ignore[arg-type]
        assert list(model.reply(ask(max_tokens=3)).events())
    eventually(nothing_is_left)
    eventually(lambda: is_gone(holder.pid))
    assert hold.find(loading) is None


def test_it_does_not_go_while_it_answers(loading: Loading) -> None:
    start(loading)
    with closing(client.find(loading, 0.1)) as model:  # type: ignore[arg-type]
        events = model.reply(ask(max_tokens=3)).events()
        next(events)
        time.sleep(0.5)
        assert [event.kind for event in events]
    eventually(nothing_is_left)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_it_and_half_a_reply_is_an_error(loading: Loading, number: int) -> None:
    holder = start(loading)
    with closing(found(loading)) as model:
        events = model.reply(long()).events()
        assert next(events)
        os.kill(holder.pid, number)
        with pytest.raises(HolderGone, match="ended before its answer did"):
            list(events)
    eventually(lambda: is_gone(holder.pid))
    assert hold.find(loading) is None
    assert hold.holders() == []
    assert nothing_is_left()


def test_stop_frees_it_even_if_it_hangs(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = start(loading)
    hold.stop(holder)
    assert is_gone(holder.pid)
    assert nothing_is_left()
    hold.stop(holder)  # again, when it is gone already
    hanging = start(loading)
    os.kill(hanging.pid, signal.SIGSTOP)
    monkeypatch.setattr("flash_moe.hold.places.STOP_SECONDS", 0.2)
    hold.stop(hanging)
    eventually(lambda: is_gone(hanging.pid))
    assert nothing_is_left()


def test_one_that_does_not_answer_is_not_there(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start(loading)
    os.kill(holder.pid, signal.SIGSTOP)
    try:
        monkeypatch.setattr(client, "HELLO_SECONDS", 0.2)
        monkeypatch.setattr(client, "START_SECONDS", 0.5)
        assert hold.find(loading) is None
        with pytest.raises(HolderGone, match="did not begin"):
            hold.start(loading, "demo", 9)
    finally:
        os.kill(holder.pid, signal.SIGCONT)
    assert reply(loading, ask(max_tokens=2))[0]


def test_one_that_falls_silent_is_gone(loading: Loading, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = start(loading)
    with closing(found(loading)) as model:
        events = model.reply(long()).events()
        next(events)
        os.kill(holder.pid, signal.SIGSTOP)
        try:
            monkeypatch.setattr(connection, "SILENT_SECONDS", 0.3)
            with pytest.raises(HolderGone, match="has not answered"):
                list(events)
        finally:
            os.kill(holder.pid, signal.SIGCONT)


def test_its_socket_is_removed_at_log_out(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = start(loading)
    shutil.rmtree(common_folder())
    eventually(lambda: is_gone(holder.pid))


def test_another_in_its_place_is_not_harmed(loading: Loading) -> None:
    """What was removed may be there anew when it ends."""
    first = start(loading)
    shutil.rmtree(common_folder())
    second = start(loading)
    eventually(lambda: is_gone(first.pid))
    assert eventually(lambda: idle(loading)).pid == second.pid
    assert reply(loading, ask(max_tokens=2))[0]


def test_other_settings_are_held_apart(loading: Loading) -> None:
    other = Loading(loading.path, Settings(experts=2), loading.prompts)
    start(loading)
    assert hold.find(other) is None
    start(other)
    assert sorted(holder.settings for holder in hold.holders()) == ["", "experts 2"]
    assert reply(other, ask(max_tokens=2))[1].stats.experts_per_token == 2
    assert reply(loading, ask(max_tokens=2))[1].stats.experts_per_token == 4


def test_a_model_that_changed_is_not_answered_for(loading: Loading, tmp_path: Path) -> None:
    copy = Loading(Path(shutil.copytree(loading.path, tmp_path / "copy")), prompts=loading.prompts)
    start(copy)
    config = copy.path / "config.json"
    config.write_text(config.read_text() + "\n")
    assert hold.find(copy) is None


def test_a_model_that_cannot_be_loaded_says_why(loading: Loading, tmp_path: Path) -> None:
    broken = Loading(Path(shutil.copytree(loading.path, tmp_path / "broken")))
    (broken.path / "tokenizer.json").write_text("{")
    with (
        closing(hold.start(broken, "demo", LONG)) as model,
        pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"),
    ):
        list(model.reply(ask()).events())
    eventually(nothing_is_left)
    with pytest.raises(FileNotFoundError):
        hold.start(Loading(tmp_path / "gone"), "demo", LONG)


def test_an_old_version_s_socket_is_left_alone(loading: Loading) -> None:
    """It has this very name, and speaks otherwise."""
    place = Place.of(loading.identity())
    require_private(place.folder)
    lock = place.take(create=True)
    assert lock is not None
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place.socket))
        place.socket.chmod(0o600)
        listener.listen()
        answers = iter([b"\x00\x00\x00\x11" + b'{"hello": "0.0"}\n', b"HTTP/1.1 400\r\n\r\n", b""])

        def serve() -> None:
            for answer in answers:
                peer, _ = listener.accept()
                with peer:
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        assert [hold.find(loading) for _ in range(3)] == [None] * 3
        thread.join(PATIENCE)
        assert place.socket.exists()
    os.close(lock)


def test_a_start_that_fails_leaves_nothing(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(HolderGone, match="could not be started"):
        hold.start(loading, "demo", LONG)
    assert nothing_is_left()


def test_a_starter_that_is_killed_leaves_what_can_be_swept(loading: Loading) -> None:
    place = Place.of(loading.identity())
    require_private(place.folder)
    lock = place.take(create=True)
    assert lock is not None
    os.close(lock)
    assert hold.find(loading) is None
    assert start(loading)


def test_files_that_change_while_it_begins_end_it(loading: Loading) -> None:
    place = Place(Place.of("").folder, "0" * 16)
    require_private(place.folder)
    lock = place.take(create=True)
    assert lock is not None
    launch(place, lock, loading, "demo", LONG)
    eventually(nothing_is_left)


# Memory ---------------------------------------------------------------------------------------


def test_idle_ones_give_way_to_another_model(
    loading: Loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest unused first, and no more of them than need be."""
    other = Loading(loading.path, Settings(experts=2), loading.prompts)
    third = Loading(loading.path, Settings(experts=1), loading.prompts)
    start(loading), start(other)
    reply(loading, ask(max_tokens=2))
    eventually(lambda: idle(loading))
    hold.make_room_for(third)
    assert len(hold.holders()) == 2  # there is enough
    # As on a machine that has too little until the first of them is gone.
    monkeypatch.setattr(room, "available_bytes", lambda: 1 << (20 if idle(other) else 50))
    hold.make_room_for(third)
    assert idle(other) is None
    assert idle(loading)


def test_one_that_answers_does_not_give_way(loading: Loading) -> None:
    holder = start(loading)
    with closing(found(loading)) as model:
        answer = model.reply(ask(max_tokens=30))
        events = answer.events()
        next(events)
        assert not ends(holder, signal.SIGUSR1, 0.2)
        assert list(events)
    assert answer.stats.finish_reason in ("length", "stop")
    eventually(lambda: idle(loading))
    assert ends(holder, signal.SIGUSR1, PATIENCE)


def test_a_reader_that_stops_reading_holds_nobody_up(loading: Loading) -> None:
    start(loading)
    place, request = Place.of(identity := loading.identity()), {"messages": [{"role": "user"}]}
    request["messages"][0]["content"] = "Hello"  # type: ignore[assignment]
    with speaking(place, {"hello": identity}, {"request": request}, *[{"next": True}] * 3) as lazy:
        for _ in range(3):
            assert reply(loading, ask(max_tokens=3))[0]
        lazy.shutdown(1)
        assert said(lazy)[0] == {"hello": identity}
    assert eventually(lambda: idle(loading))
