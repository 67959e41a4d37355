"""Replies side by side: those of one model share an engine; a reply of another model waits, or says
why it cannot. Nothing ever hangs, and seeds stay what they are."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import threading
import weakref
from collections.abc import Awaitable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import llm as llm_library
import pytest

from llm_flash_moe.answering.turnstile import Turnstile
from llm_flash_moe.errors import PluginError

T = TypeVar("T")
UNREAD = "has not been read to its end"
# Longer than any reply here takes: what is not over by then hangs.
LONG_SECONDS = 60


@pytest.fixture(autouse=True)
def two_models(demo_folder: Path, tmp_path: Path, llm_home: Path) -> None:
    shutil.copytree(demo_folder, tmp_path / "other")
    registry = llm_home / "llm-flash-moe" / "models.json"
    registry.parent.mkdir(parents=True)
    entries = {"one": {"path": str(demo_folder)}, "two": {"path": str(tmp_path / "other")}}
    registry.write_text(json.dumps({"models": entries}))


def run(awaitable: Awaitable[T]) -> T:
    async def bounded() -> T:
        return await asyncio.wait_for(awaitable, LONG_SECONDS)

    return asyncio.run(bounded())


def ask(name: str, text: str = "Hello", **options: Any) -> Any:
    return llm_library.get_async_model(name).prompt(text, max_tokens=8, **options)


# One model -------------------------------------------------------------------------------------


def test_a_seed_means_the_same_however_replies_interleave() -> None:
    model = llm_library.get_model("one")
    options = [
        {"temperature": 1.5, "seed": 3},
        {"temperature": 1.5, "seed": 4},
        {"temperature": 1.0},
        {"temperature": 0.7, "seed": 3},
    ]
    seeded = [number for number, each in enumerate(options) if "seed" in each]
    alone = [model.prompt("Hello", max_tokens=10, **each).text() for each in options]
    for order in range(3):
        random, texts = Random(order), [""] * len(options)
        replies: list[Iterator[str]] = [
            iter(model.prompt("Hello", max_tokens=10, **each)) for each in options
        ]
        open_replies = set(range(len(replies)))
        while open_replies:
            number = random.choice(sorted(open_replies))
            piece = next(replies[number], None)
            if piece is None:
                open_replies.discard(number)
            else:
                texts[number] += piece
        assert [texts[n] for n in seeded] == [alone[n] for n in seeded]


def test_an_unseeded_reply_after_a_seeded_one_is_not_repeated() -> None:
    model = llm_library.get_model("one")

    def unseeded() -> str:
        model.prompt("Hello", max_tokens=3, temperature=1.5, seed=1).text()
        return str(model.prompt("Hello", max_tokens=12, temperature=1.5).text())

    assert len({unseeded() for _ in range(4)}) > 1


# Two models, one task --------------------------------------------------------------------------


def test_a_task_that_would_wait_for_itself_gets_an_error() -> None:
    async def both() -> str:
        unread = ask("one")
        await anext(aiter(unread))
        with pytest.raises(llm_library.ModelError, match=UNREAD):
            await ask("two").text()
        await unread.text()  # the rest of it can still be read
        return str(await ask("two").text())

    assert run(both())


def test_the_same_without_async() -> None:
    unread = iter(llm_library.get_model("one").prompt("Hello", max_tokens=8))
    next(unread)
    with pytest.raises(llm_library.ModelError, match=UNREAD):
        llm_library.get_model("two").prompt("Hello", max_tokens=8).text()
    list(unread)
    assert llm_library.get_model("two").prompt("Hello", max_tokens=8).text()


@pytest.mark.parametrize("kind", ["break", "raise"])
def test_a_reply_that_is_left_early_and_dropped_gives_way(kind: str) -> None:
    async def leave() -> None:
        async for _ in ask("one"):
            if kind == "raise":
                raise KeyError
            break

    async def both() -> str:
        if kind == "raise":
            with pytest.raises(KeyError):
                await leave()
        else:
            await leave()
        return str(await ask("two").text())

    assert run(both())


def test_replies_that_are_dropped_are_not_held_in_memory() -> None:
    async def drop_three() -> list[weakref.ref[Any]]:
        dropped = []
        for _ in range(3):
            response = ask("one")
            async for _ in response:
                break
            dropped.append(weakref.ref(response))
        del response
        gc.collect()
        await asyncio.sleep(0.1)
        return dropped

    assert [reference() for reference in run(drop_three())] == [None] * 3


def test_a_cancelled_reply_gives_way() -> None:
    async def both() -> str:
        # So long that it is not over before it is cancelled.
        unending = llm_library.get_async_model("one").prompt("Hello", max_tokens=5000)
        task = asyncio.create_task(unending.text())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return str(await ask("two").text())

    assert run(both())


def test_an_event_loop_that_ended_leaves_nothing_behind() -> None:
    async def half() -> Any:
        unread = ask("one")
        await anext(aiter(unread))

    run(half())
    assert run(ask("two").text())


# Two models, many tasks ------------------------------------------------------------------------


def test_many_tasks_over_two_models_all_end() -> None:
    random = Random(0)

    async def one(number: int) -> int:
        pieces = 0
        async for _ in ask(random.choice(["one", "two"]), f"Hello {number}"):
            pieces += 1
            if number % 3 == 0:
                break
        return pieces

    async def everyone() -> list[int]:
        return await asyncio.gather(*map(one, range(12)))

    assert min(run(everyone())) >= 1


def test_threads_wait_for_each_other() -> None:
    texts: dict[str, str] = {}

    def read(name: str) -> None:
        texts[name] = llm_library.get_model(name).prompt("Hello", max_tokens=8).text()

    threads = [threading.Thread(target=read, args=(name,)) for name in ("one", "two", "one")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_SECONDS)
        assert not thread.is_alive()
    assert texts["one"] == texts["two"] != ""


def test_a_reply_that_another_thread_has_left_is_not_waited_for() -> None:
    turnstile: Turnstile[str] = Turnstile(left_seconds=0.1)
    inside, over = threading.Event(), threading.Event()

    def leave_it_half_read() -> None:
        with turnstile.passing("one") as reader, reader.idle():
            inside.set()
            over.wait(LONG_SECONDS)

    thread = threading.Thread(target=leave_it_half_read)
    thread.start()
    try:
        assert inside.wait(LONG_SECONDS)
        with pytest.raises(PluginError, match=UNREAD), turnstile.passing("two"):
            pass
    finally:
        over.set()
        thread.join()
    with turnstile.passing("two"):
        pass
