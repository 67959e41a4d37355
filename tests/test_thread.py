"""The inference thread: order, turns, errors, cancelling, and the end of the process."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.thread import InferenceThread

Cancelled = Callable[[], bool]
# Hypothesis takes no fixture of a smaller scope than a module.
SHARED = InferenceThread()


@pytest.fixture(scope="module")
def thread() -> InferenceThread:
    return InferenceThread()


def upto(number: int) -> Callable[[Cancelled], Iterator[int]]:
    return lambda cancelled: iter(range(number))


@given(st.lists(st.integers(0, 8), max_size=5), st.randoms())
def test_replies_read_in_any_order_are_complete(lengths: list[int], random: Random) -> None:
    streams = [SHARED.iterate(upto(length)) for length in lengths]
    items: list[list[int]] = [[] for _ in lengths]
    waiting = set(range(len(lengths)))
    while waiting:
        at = random.choice(sorted(waiting))
        item = next(streams[at], None)
        if item is None:
            waiting.discard(at)
        else:
            items[at].append(item)
    assert items == [list(range(length)) for length in lengths]


def test_all_work_runs_in_one_thread_which_is_not_the_callers(thread: InferenceThread) -> None:
    def work(cancelled: Cancelled) -> Iterator[int]:
        try:
            while True:
                yield threading.get_ident()
        finally:
            seen.append(threading.get_ident())

    seen: list[int] = []
    for _ in range(2):
        seen += islice(thread.iterate(work), 3)
    assert len(set(seen)) == 1
    assert threading.get_ident() not in seen


def test_nothing_is_computed_before_it_is_asked_for(thread: InferenceThread) -> None:
    computed: list[int] = []

    def work(cancelled: Cancelled) -> Iterator[int]:
        for number in count():
            computed.append(number)
            yield number

    stream = thread.iterate(work)
    assert computed == []
    for expected in range(3):
        assert next(stream) == expected
        assert computed == list(range(expected + 1))


def test_errors_are_raised_where_the_reply_is_read(thread: InferenceThread) -> None:
    def work(cancelled: Cancelled) -> Iterator[int]:
        yield 1
        raise ValueError("no")

    stream = thread.iterate(work)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="no"):
        next(stream)
    assert list(thread.iterate(upto(2))) == [0, 1]


def test_closing_a_reply_ends_its_work(thread: InferenceThread) -> None:
    ended = threading.Event()

    def work(cancelled: Cancelled) -> Iterator[int]:
        try:
            yield from count()
        finally:
            assert cancelled()
            ended.set()

    stream = thread.iterate(work)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert ended.is_set()


def test_the_event_loop_keeps_running(thread: InferenceThread) -> None:
    async def ticks() -> int:
        ticked = 0
        while not go.is_set():
            ticked += 1
            await asyncio.sleep(0)
            if ticked == 50:
                go.set()
        return ticked

    def slow(cancelled: Cancelled) -> Iterator[int]:
        assert go.wait(60)
        yield 7

    async def both() -> list[object]:
        async def read() -> list[int]:
            return [item async for item in thread.aiterate(slow)]

        return list(await asyncio.gather(read(), ticks()))

    go = threading.Event()
    assert asyncio.run(both()) == [[7], 50]


def test_a_cancelled_task_ends_its_work(thread: InferenceThread) -> None:
    started, ended = threading.Event(), threading.Event()

    def work(cancelled: Cancelled) -> Iterator[int]:
        try:
            started.set()
            while not cancelled():
                pass
            yield 0
        finally:
            ended.set()

    async def main() -> None:
        async def read() -> None:
            async for _ in thread.aiterate(work):
                pass

        task = asyncio.create_task(read())
        while not started.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended.wait(60)


ENDING = """
import sys, threading
from flash_moe.thread import InferenceThread
import mlx.core as mx

def work(cancelled):
    while not cancelled():
        mx.eval(mx.ones(1000) * 2)
        yield 1

thread = InferenceThread(at_end=lambda: print("closed", threading.current_thread().name))
stream = thread.iterate(work)
print(next(stream))
{}
"""


@pytest.mark.parametrize(
    ("end", "status"), [("", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", -2)]
)
def test_a_process_always_ends_with_the_model_closed(end: str, status: int) -> None:
    """Also with a reply half read, which would never end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", ENDING.format(end)],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == "1\nclosed flash-moe\n"
    assert done.returncode in (status, 130)


BUSY = """
import sys, time
from flash_moe.thread import InferenceThread

def work(cancelled):
    yield 1
    print("begun", flush=True)
    while not cancelled():
        time.sleep(0.001)
    time.sleep(600)

stream = InferenceThread().iterate(work)
next(stream)
try:
    next(stream)
except KeyboardInterrupt:
    sys.exit(1)
"""


def test_ctrl_c_while_a_process_ends_is_the_end_of_it() -> None:
    """It must not break off the wait for a thread that is within MLX: that crashes."""
    arguments, path = [sys.executable, "-c", BUSY], {"PYTHONPATH": ":".join(sys.path)}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            # The first ends the wait for an item, the second that for the end of the work.
            while process.poll() is None:
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            assert process.returncode == -signal.SIGINT
        finally:
            process.kill()
