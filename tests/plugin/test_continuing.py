"""A conversation that goes on in another process is not read from its start again."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_moe.built_in import NAME
from tests.plugin.terminal import installed_llm, logged, works

# More than a thousand tokens.
LONG = " ".join(f"Item {n} is kept in box {n * 7 % 90}." for n in range(80))
SYSTEM = "Answer in upper case. " * 20


def say(*arguments: object) -> str:
    done = installed_llm(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_the_new_turn_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    def conversation(forget: bool) -> tuple[str, dict[str, float]]:
        works("flash-moe", "cache", "--clear")
        say("-m", NAME, LONG, "-o", "max_tokens", 40)
        if forget:
            works("flash-moe", "cache", "--clear")
        reply = say("-c", "What is 4 + 3?")
        return reply, logged()[-1]["response_json"]

    fresh, without = conversation(forget=True)
    kept, with_state = conversation(forget=False)
    assert kept == fresh
    first = logged()[0]["response_json"]
    assert first["prompt_tokens"] > 1000
    assert without["cached_tokens"] == 0
    # All of the first prompt but the opening of the reply, which the template writes anew.
    assert first["prompt_tokens"] - 10 <= with_state["cached_tokens"] < first["prompt_tokens"]
    read = with_state["prompt_tokens"] - with_state["cached_tokens"]
    assert read < first["generated_tokens"] + 60
    assert logged()[-1]["token_details"] == f'{{"cached": {with_state["cached_tokens"]}}}'
    ratio = with_state["seconds_to_first_token"] / without["seconds_to_first_token"]
    with capsys.disabled():
        print(
            f"\n{without['prompt_tokens']} tokens: {read} read instead of all, "
            f"first token after {ratio:.2f} of the time"
        )


def test_instructions_that_repeat_are_read_once() -> None:
    say("-m", NAME, "-s", SYSTEM, "Thank you")
    say("-m", NAME, "-s", SYSTEM, "Hello")
    first, second = (turn["response_json"] for turn in logged())
    assert first["cached_tokens"] == 0
    assert second["cached_tokens"] > 80


def test_chat_keeps_its_state_in_memory() -> None:
    works("chat", "-m", NAME, stdin=f"{LONG}\nWhat is 4 + 3?\nquit\n")
    first, second = (turn["response_json"] for turn in logged())
    assert second["cached_tokens"] > first["prompt_tokens"] - 10


def test_a_folder_that_cannot_be_written_costs_only_a_warning(llm_home: Path) -> None:
    blocked = llm_home / "llm-flash-moe" / "prompts"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("a file where the folder should be")
    done = installed_llm("-m", NAME, LONG + " What is 4 + 3?", "-o", "max_tokens", 3)
    assert done.returncode == 0
    assert done.stderr.startswith("Warning: ")
    assert len(done.stderr.splitlines()) == 1
    assert blocked.read_text() == "a file where the folder should be"
