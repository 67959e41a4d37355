"""Conversations through the engine, with a real template: each turn continues the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flash_moe.engine import Engine
from flash_moe.model.load import StreamedModel
from flash_moe.options import Request, Settings
from flash_moe.prefix.store import PrefixSettings
from tests.prefix.conversations import generation, new_store
from tests.prefix.saved_files import PROMPT, files

BANK = Settings(bank_bytes=1)
Message = dict[str, Any]
SYSTEM = {"role": "system", "content": "You answer in one word. " * 10}
QUESTION = {"role": "user", "content": "What is the capital of the country I mean? " * 5}


def engine(folder: Path, prefix: PrefixSettings | None = PrefixSettings()) -> Engine:
    return Engine.load(folder, BANK, prefix=prefix)


def ask(engine: Engine, messages: list[Message], **options: Any) -> tuple[str, int]:
    reply = engine.reply(Request(messages=messages, max_tokens=4, **options))
    text = "".join(reply)
    assert reply.stats.prompt_tokens == len(engine.tokenizer.encode_chat(messages))
    return text, reply.stats.cached_tokens


def test_a_chat_reads_each_turn_once(demo_folder: Path) -> None:
    one, fresh = engine(demo_folder), engine(demo_folder)
    messages = [SYSTEM, QUESTION]
    before = 0
    for _ in range(3):
        text, cached = ask(one, messages)
        assert cached == before
        before = len(one.tokenizer.encode_chat(messages, add_generation_prompt=False))
        assert fresh.prefix is not None
        fresh.prefix.clear()
        assert ask(fresh, messages) == (text, 0)
        messages += [{"role": "assistant", "content": text}, QUESTION]
    # Another conversation with the same instructions.
    system = one.tokenizer.encode_chat([SYSTEM], add_generation_prompt=False)
    assert ask(one, [SYSTEM, {"role": "user", "content": "Hello. " * 30}])[1] == len(system)


def test_thoughts_that_the_template_drops(demo_folder: Path) -> None:
    """Thoughts stay between a tool call and its result, and go with the next question: then the
    state before them is the one to continue."""
    one = engine(demo_folder)
    call = {"function": {"name": "look", "arguments": {"where": "up"}}}
    thought = {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Let me look. " * 20,
        "tool_calls": [call],
    }
    result = {"role": "tool", "content": "A sky. " * 30}
    answer = {"role": "assistant", "content": "A sky."}
    assert ask(one, [SYSTEM, QUESTION])[1] == 0
    question = len(one.tokenizer.encode_chat([SYSTEM, QUESTION], add_generation_prompt=False))
    assert ask(one, [SYSTEM, QUESTION, thought, result])[1] == question
    assert ask(one, [SYSTEM, QUESTION, thought, result, answer, QUESTION])[1] == question


def test_across_engines_by_disk(demo_folder: Path, tmp_path: Path) -> None:
    settings = PrefixSettings(folder=tmp_path / "prompts")
    first = engine(demo_folder, settings)
    text, cached = ask(first, [SYSTEM, QUESTION])
    assert cached == 0
    messages = [SYSTEM, QUESTION, {"role": "assistant", "content": text}, QUESTION]
    second, fresh = engine(demo_folder, settings), engine(demo_folder)
    text, cached = ask(second, messages)
    question = first.tokenizer.encode_chat([SYSTEM, QUESTION], add_generation_prompt=False)
    assert cached == len(question)
    assert ask(fresh, messages) == (text, 0)


def test_without_a_store_nothing_is_reused(demo_folder: Path) -> None:
    one = engine(demo_folder, None)
    assert one.prefix is None
    assert [ask(one, [SYSTEM, QUESTION])[1] for _ in range(2)] == [0, 0]


def test_a_reply_that_ends_at_a_stop_string_saves_its_prompt(
    demo_folder: Path, tmp_path: Path
) -> None:
    one = engine(demo_folder, PrefixSettings(folder=tmp_path))
    text, _ = ask(one, [SYSTEM, QUESTION])
    other = engine(demo_folder, PrefixSettings(folder=tmp_path / "other"))
    ask(other, [SYSTEM, QUESTION], stop=[text[1:3]])
    assert [name for name in files(tmp_path) if name != "other"] == files(tmp_path / "other")


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_reply_ends_at_once(
    hybrid: StreamedModel, tmp_path: Path, how: type[BaseException]
) -> None:
    """Nothing is written to the disk; memory has the chunks that were read."""
    store = new_store(hybrid, folder=tmp_path)
    tokens = iter(generation(hybrid, store, PROMPT, max_tokens=9))
    next(tokens)
    with pytest.raises(how):
        tokens.throw(how())  # type: ignore[attr-defined]
    assert files(tmp_path) == []
    assert len(store.memory) == 1


def test_a_cancelled_prompt_saves_its_chunks(hybrid: StreamedModel) -> None:
    store = new_store(hybrid)
    prompt = [*PROMPT[:-3], 1, 3, *range(40), 1, 2, 7]
    checks = iter([False, True])
    first = generation(hybrid, store, prompt, max_tokens=1, cancelled=lambda: next(checks))
    assert list(first) == []
    assert first.stats.finish_reason == "cancelled"
    second = generation(hybrid, store, prompt, max_tokens=1)
    assert len(list(second)) == 1
    assert second.stats.cached_tokens == 90


def test_statistics_count_the_tokens_that_were_cached(hybrid: StreamedModel) -> None:
    store, progress = new_store(hybrid), list[tuple[int, int]]()
    first = generation(hybrid, store, PROMPT, max_tokens=2)
    second = generation(
        hybrid,
        store,
        PROMPT,
        max_tokens=2,
        progress=lambda done, total: progress.append((done, total)),
    )
    for run in (first, second):
        list(run)
    stats = second.stats
    assert (stats.prompt_tokens, stats.cached_tokens) == (93, 90)
    assert stats.prompt_tokens_per_second == pytest.approx(3 / stats.seconds_to_first_token)
    assert stats.summary().startswith("93 prompt tokens, 90 of them reused at ")
    assert stats.to_json()["cached_tokens"] == 90
    assert progress == [(93, 93)]
    assert "saved" not in first.stats.summary()
