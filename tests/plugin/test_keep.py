"""A model that stays: `llm` is answered by the process that holds it, as if it were loaded here."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import llm as llm_library
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe import BUILT_IN, hold
from flash_moe.built_in import NAME
from flash_moe.hold.places import common_folder
from llm_flash_moe.answering import engines
from llm_flash_moe.durations import in_words, parse_duration
from tests.hold.processes import PATIENCE, eventually, is_gone, nothing_is_left
from tests.plugin.terminal import LLM, environment, fails, installed_llm, llm, logged, works
from tests.plugin.test_interrupt import CTRL_C, Terminal
from tests.plugin.test_startup import HEAVY, imported

MULTIPLY = """
def multiply(x: int, y: int) -> int:
    "Multiply two numbers."
    return x * y
"""
# Time, memory, and what was in a cache.
MEASURED = re.compile(r"first_word|seconds|bytes|hit_rate|cached_tokens|per_second|experts_read")


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    """What another test has loaded in this process would be used."""
    forget()


def forget() -> None:
    list(engines._thread.iterate(lambda cancelled: iter([engines._close()])))
    engines.warn.cache_clear()


def holder() -> hold.Holder:
    [one] = hold.holders()
    return one


def idle() -> hold.Holder:
    return eventually(lambda: next((one for one in hold.holders() if not one.answering), None))


def counted(turn: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in turn["response_json"].items() if not MEASURED.search(k)}


PROMPTS: list[tuple[object, ...]] = [
    ("What does os.path.join do?",),
    ("-o", "thinking", 1, "What is 468 + 357?"),
    ("--functions", MULTIPLY, "--td", "What is 1234 * 5678?"),
    ("--schema", "name, age int, city", "Ada Lovelace is 36 and lives in London."),
    ("--schema", "name, age int, city", "-o", "max_tokens", 5, "Ada Lovelace is 36."),
    ("-s", "Answer in upper case.", "Thank you"),
    ("-o", "temperature", 1.2, "-o", "seed", 4, "-o", "logprobs", 2, "Hello"),
    ("--async", "What is 4 + 3?"),
    ("--no-stream", "What is 4 + 3?"),
    ("-o", "experts", 4, "Hello"),
    ("-o", "context_length", 5, "What does os.path.join do?"),
]


def test_replies_and_logs_are_the_same() -> None:
    """Here first, then there: texts, thoughts, tools, JSON, warnings, errors, figures."""
    here = [llm("-m", NAME, *prompt) for prompt in PROMPTS]
    turns = logged()
    forget()
    works("flash-moe", "keep", NAME)
    works("flash-moe", "keep", NAME, "-o", "experts", 4)
    there = [llm("-m", NAME, *prompt) for prompt in PROMPTS]
    assert not engines._loaded
    for one, other in zip(here, there, strict=True):
        assert (one.stdout, one.stderr, one.exit_code) == (
            other.stdout,
            other.stderr,
            other.exit_code,
        )
    again = logged()[len(turns) :]
    assert len(again) == len(turns) >= len(PROMPTS)
    for one, other in zip(turns, again, strict=True):
        assert list(one["response_json"]) == list(other["response_json"])
        assert counted(one) == counted(other)
        for key in ("response", "reasoning", "resolved_model", "input_tokens", "output_tokens"):
            assert one[key] == other[key]
        names = [[call["name"], call["arguments"]] for call in one["tool_calls"]]
        assert names == [[call["name"], call["arguments"]] for call in other["tool_calls"]]


def test_a_command_is_light_when_the_model_is_held() -> None:
    works("flash-moe", "keep", NAME)
    modules = imported("-m", NAME, "-o", "max_tokens", "3", "Hello")
    assert "flash_moe.hold.client" in modules
    heavy = {*HEAVY, "tokenizers", "jinja2"}
    assert not {name for name in modules if name.partition(".")[0] in heavy}
    assert "flash_moe.engine" not in modules
    assert idle().used > holder().since


def test_it_is_off_unless_asked_for() -> None:
    assert works("-m", NAME, "What is 4 + 3?").stdout == "4 + 3 = 7.\n"
    assert nothing_is_left()
    works("-m", NAME, "What is 4 + 3?", "-o", "keep_alive", 0)
    assert nothing_is_left()


def test_keep_ps_and_stop() -> None:
    assert "No model is kept in memory" in works("flash-moe", "ps").stdout
    assert json.loads(works("flash-moe", "ps", "--json").stdout) == []
    said = works("flash-moe", "keep", NAME, "--for", "90m").stdout
    assert said == f"{NAME} stays in memory until it was not used for 1 h 30 min.\n"
    assert idle()
    shown = works("flash-moe", "ps").stdout
    assert re.search(rf"^{NAME} .* MB .*\(in 1 h 30 min\)", shown, re.MULTILINE)
    [model] = json.loads(works("flash-moe", "ps", "--json").stdout)
    assert model["name"] == NAME
    assert model["path"] == str(BUILT_IN[NAME])
    assert model["until"] == pytest.approx(model["used"] + 5400)
    assert model["resident_bytes"] > 30e6
    # Once more, with another time and in another setting.
    said = works("flash-moe", "keep", NAME, "--for", "-1").stdout
    assert said == f"{NAME} stays in memory until llm flash-moe stop {NAME}\n"
    works("flash-moe", "keep", NAME, "-o", "experts", 4)
    pids = {one.pid for one in hold.holders()}
    assert model["pid"] in pids
    assert len(pids) == 2
    eventually(lambda: not any(one.answering for one in hold.holders()))
    shown = works("flash-moe", "ps").stdout
    assert re.search(rf"^{NAME} .* stopped", shown, re.MULTILINE)
    assert re.search(rf"^{NAME} .* experts 4", shown, re.MULTILINE)
    assert works("flash-moe", "stop", NAME).stdout == f"Freed {NAME}.\n" * 2
    assert works("flash-moe", "stop", NAME).stdout == f"{NAME} is not in memory.\n"
    assert works("flash-moe", "stop").stdout == "No model is kept in memory.\n"
    assert is_gone(model["pid"])
    assert nothing_is_left()
    assert "There is no model 'x'" in fails("flash-moe", "stop", "x")
    assert "There is no model 'x'" in fails("flash-moe", "keep", "x")


def test_the_option_keeps_it_and_frees_it() -> None:
    works("-m", NAME, "Hello", "-o", "keep_alive", "10m")
    first = idle()
    assert first.until == pytest.approx(first.used + 600)
    works("-m", NAME, "Hello")
    assert idle().pid == first.pid
    assert idle().until == pytest.approx(idle().used + 600)
    works("-m", NAME, "Hello", "-o", "keep_alive", -1)
    assert idle().until is None
    works("-m", NAME, "Hello", "-o", "keep_alive", 0)
    eventually(nothing_is_left)


def test_a_reply_waits_for_loading_only_where_it_does() -> None:
    works("-m", NAME, "Hello", "-o", "keep_alive", "10m")
    works("-m", NAME, "Hello")
    works("flash-moe", "stop")
    works("flash-moe", "keep", NAME)
    works("-m", NAME, "Hello")
    waits = [turn["response_json"]["first_word"] for turn in logged()]
    assert [("weights" in wait, "prompt" in wait) for wait in waits] == [
        *((True, True), (False, True), (False, True)),
    ]


def test_minus_nothing_is_nothing() -> None:
    works("-m", NAME, "Hello", "-o", "keep_alive", "10m")
    works("-m", NAME, "Hello", "-o", "keep_alive", "-0")
    eventually(nothing_is_left)


def test_for_good(llm_home: Path) -> None:
    """Defaults of llm's own, for loading too."""
    works("models", "options", "set", NAME, "keep_alive", "10m")
    works("models", "options", "set", NAME, "experts", 4)
    works("flash-moe", "keep", NAME)
    works("-m", NAME, "Hello")
    assert holder().settings == "experts 4"
    assert not engines._loaded
    assert logged()[0]["response_json"]["experts_per_token"] == 4
    (llm_home / "model_options.json").write_text(json.dumps({NAME: {"experts": "many"}}))
    assert "-o experts many" in fails("flash-moe", "keep", NAME)


def test_from_python_too() -> None:
    model = llm_library.get_model(NAME)
    assert model.prompt("What is 4 + 3?", keep_alive=60).text() == "4 + 3 = 7."
    pid = idle().pid

    async def several() -> list[str]:
        model = llm_library.get_async_model(NAME)
        asked = [model.prompt(f"What is {n} + 3?").text() for n in range(2, 6)]
        return list(await asyncio.gather(*asked))

    assert asyncio.run(several()) == [f"{n} + 3 = {n + 3}." for n in range(2, 6)]
    conversation = model.conversation()
    conversation.prompt("My name is Ada.").text()
    assert conversation.prompt("What is my name?").text() == "Your name is Ada."
    assert idle().pid == pid
    assert not engines._loaded


def test_one_that_was_loaded_here_is_held_from_then_on() -> None:
    model = llm_library.get_model(NAME)
    model.prompt("Hello").text()
    assert len(engines._loaded) == 1
    model.prompt("Hello", keep_alive="5m").text()
    assert not engines._loaded
    assert holder()


def test_one_that_is_making_a_reply_here_stays_till_its_end() -> None:
    model = llm_library.get_model(NAME)
    unread = iter(model.prompt("What does os.path.join do?"))
    first = next(unread)
    assert model.prompt("What is 4 + 3?", keep_alive="5m").text() == "4 + 3 = 7."
    assert (first + "".join(unread)).endswith("system.")
    assert nothing_is_left()
    model.prompt("What is 4 + 3?", keep_alive="5m").text()
    assert holder()


def test_a_reply_that_is_left_early_has_its_figures() -> None:
    works("flash-moe", "keep", NAME)
    response = llm_library.get_model(NAME).prompt("What does os.path.join do?")
    reply = iter(response)
    next(reply)
    reply.close()
    assert response.response_json["prompt_tokens"] == 19
    assert 1 <= response.response_json["generated_tokens"] < 20
    assert idle()


def test_processes_and_chats_share_it() -> None:
    works("flash-moe", "keep", NAME)
    pid = holder().pid
    assert installed_llm("-m", NAME, "My name is Ada.").stdout == "I will remember that.\n"
    assert installed_llm("-c", "What is my name?").stdout == "Your name is Ada.\n"
    works("chat", "-m", NAME, stdin="My name is Bo.\nWhat is my name?\nquit\n")
    assert logged()[-1]["response"] == "Your name is Bo."
    assert idle().pid == pid


def test_commands_at_the_same_time() -> None:
    # llm's own database is made by one, and then not written: it is locked by the first to write.
    works("-m", NAME, "Hello")
    forget()
    command = [str(LLM), "-n", "-m", NAME, "-o", "keep_alive", "5m", "What is 4 + 3?"]
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    processes = [
        subprocess.Popen(command, stdout=pipe, env=environment(), stdin=null) for _ in range(3)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert said == [b"4 + 3 = 7.\n"] * 3
    assert holder()


@pytest.mark.parametrize("when", ["before", "while it begins"])
def test_one_that_dies_before_the_first_word_is_not_missed(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works("flash-moe", "keep", NAME)
    pid = holder().pid
    if when == "before":
        os.kill(pid, signal.SIGKILL)
    else:
        ask = hold.HeldModel.reply

        def killed(self: hold.HeldModel, request: Any) -> hold.HeldReply:
            os.kill(pid, signal.SIGKILL)
            return ask(self, request)

        monkeypatch.setattr(hold.HeldModel, "reply", killed)
    result = works("-m", NAME, "What is 4 + 3?")
    assert (result.stdout, result.stderr) == ("4 + 3 = 7.\n", "")
    assert logged()[0]["response_json"]["generated_tokens"] == 9
    assert hold.holders() == []
    assert nothing_is_left()


def test_one_that_dies_in_the_middle_is_an_error(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    works("flash-moe", "keep", "demo")
    reply = iter(llm_library.get_model("demo").prompt("Hello"))
    next(reply)
    os.kill(holder().pid, signal.SIGKILL)
    with pytest.raises(llm_library.ModelError, match=r"ended before its answer did.* Ask again"):
        list(reply)
    assert nothing_is_left() or hold.holders() == []
    works("-m", "demo", "-o", "max_tokens", 3, "Hello")


def test_where_it_cannot_be_kept_it_is_loaded_here() -> None:
    common_folder().mkdir(mode=0o755)
    result = works("-m", NAME, "What is 4 + 3?", "-o", "keep_alive", "5m")
    assert result.stdout == "4 + 3 = 7.\n"
    assert result.stderr.startswith(f"Warning: {NAME} does not stay in memory. {common_folder()}")
    assert len(result.stderr.splitlines()) == 1
    assert "this user alone" in fails("flash-moe", "keep", NAME)


def test_a_model_that_is_removed_is_freed(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    works("flash-moe", "keep", "demo")
    works("flash-moe", "keep", NAME)
    works("flash-moe", "remove", "demo", "--yes")
    assert holder().name == NAME


def test_ctrl_c_in_a_chat_stops_the_reply_and_the_next_is_answered(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    works("flash-moe", "keep", "demo")
    pid = holder().pid
    with Terminal("chat", "-m", "demo") as chat:
        chat.wait_for("> ")
        chat.say(b"Hello")
        chat.grow(60)
        chat.type(CTRL_C)
        chat.wait_for("\n> ", 2)
        assert idle().pid == pid
        chat.say(b"quit")
        assert chat.status() == 0
    [turn] = logged()
    assert turn["response_json"]["finish_reason"] == "cancelled"
    assert turn["response_json"]["generated_tokens"] == turn["output_tokens"] > 5


def test_ctrl_c_aborts_a_prompt_and_stops_the_reply(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    works("flash-moe", "keep", "demo")
    pid = holder().pid
    with Terminal("-m", "demo", "Hello") as prompt:
        prompt.grow(60)
        assert holder().answering == 1
        prompt.type(CTRL_C)
        assert prompt.status() == 1
        assert "Aborted!" in prompt.shown
        assert "Traceback" not in prompt.shown
    assert idle().pid == pid


def test_a_reader_that_goes_away_stops_the_reply(demo_folder: Path) -> None:
    works("flash-moe", "add", demo_folder, "--name", "demo")
    works("flash-moe", "keep", "demo")
    command = [str(LLM), "-m", "demo", "Hello"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        assert process.stdout.read(30)
        process.kill()
    assert idle()


# Durations ------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_durations(hours: int, minutes: int, seconds: int) -> None:
    total = hours * 3600 + minutes * 60 + seconds
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == parse_duration(total) == total
    assert parse_duration(f" {minutes}M ") == minutes * 60
    for text, number in ((f"-{seconds}", seconds), (f"-{minutes}m", minutes)):
        assert parse_duration(text) == (float("inf") if number else 0)


@given(st.text(max_size=8) | st.floats() | st.booleans() | st.none())
def test_a_duration_or_an_explanation(value: Any) -> None:
    if re.fullmatch(r"\s*-?(\d+(\.\d+)?[hms])+\s*|\s*-?\d+(\.\d+)?\s*", str(value).lower()):
        assert parse_duration(value) >= 0
    else:
        with pytest.raises(ValueError, match="10m"):
            parse_duration(value)


@pytest.mark.parametrize("value", ["m", "1.5.5h", "1e9", "nan"])
def test_times_on_the_command_line(value: str) -> None:
    assert "such as 10m" in llm("flash-moe", "keep", NAME, "--for", value).stderr
    assert "such as 10m" in llm("-m", NAME, "Hello", "-o", "keep_alive", value).stderr


def test_keeping_for_no_time_is_stopping() -> None:
    for value in ("0", "-0", "0.5"):
        said = llm("flash-moe", "keep", NAME, "--for", value).stderr
        assert "choose a second or more. To free a model at once: llm flash-moe stop NAME" in said
    assert nothing_is_left()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(5, "5 s"), (60, "1 min"), (600, "10 min"), (3600, "1 h"), (5400, "1 h 30 min")],
)
def test_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


# For as long as it takes -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_hundred_commands_in_a_row() -> None:
    """One process answers them all, and its memory does not grow."""
    sizes = []
    for number in range(100):
        keep = ["-o", "keep_alive", "5m"] if number % 10 == 0 else []
        done = installed_llm("-m", NAME, *keep, f"What is {number} + 3?")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"{number} + 3 = " in done.stdout
        sizes.append(idle().resident_bytes or 0)
        assert len({one.pid for one in hold.holders()}) == 1
    print(f"\nmemory after 10: {sizes[9] / 1e6:.0f} MB, after 100: {sizes[-1] / 1e6:.0f} MB")
    assert len(list(common_folder().iterdir())) == 3
    works("flash-moe", "stop")
    assert nothing_is_left()


@pytest.mark.slow
def test_kills_at_any_moment() -> None:
    """Every command gives the reply, or the one error; nothing is left behind."""
    broken = 0
    for number in range(30):
        command = [str(LLM), "-m", NAME, "-o", "keep_alive", "5m", "What does os.path.join do?"]
        pipe = subprocess.PIPE
        with subprocess.Popen(
            command, stdout=pipe, stderr=pipe, env=environment(), text=True
        ) as one:
            wait = 0.4 + number * 0.03
            try:
                one.wait(wait)
            except subprocess.TimeoutExpired:
                for other in hold.holders():
                    os.kill(other.pid, signal.SIGKILL)
            said, error = one.communicate(timeout=PATIENCE)
        if one.returncode:
            broken += 1
            assert error.startswith("Error: The process that held the model ended")
            assert len(error.splitlines()) == 1
        else:
            assert said.startswith("`os.path.join(path, *paths)` — Join parts")
            assert said.endswith("system.\n")
    print(f"\n{broken} of 30 broke off in the middle")
    works("flash-moe", "stop")
    assert nothing_is_left()
