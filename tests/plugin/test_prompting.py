"""`llm -m …`, `llm -c` and `llm chat` with a real model: words, options, history, errors."""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import llm as llm_library
import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from transformers import AutoTokenizer

from flash_moe import engine
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.model.load import StreamedModel
from llm_flash_moe.answering.models import FLAGSHIP
from tests.plugin.terminal import fails, installed_llm, known, llm, logged, works

LENGTH = 40
SHORT = ("-o", "max_tokens", 12)
Chat = list[dict[str, str]]


@pytest.fixture(autouse=True)
def demo(demo_folder: Path, llm_home: Path) -> None:
    """The model `demo`, registered as `llm flash-moe add` does it, without its second of work."""
    registry = llm_home / "llm-flash-moe" / "models.json"
    registry.parent.mkdir(parents=True)
    registry.write_text(json.dumps({"models": {"demo": {"path": str(demo_folder)}}}))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of every prompt that reaches the model. Replies alone would not do: what a
    model of random weights says hardly depends on what was said long before."""
    prompts: list[list[int]] = []

    class Recorded(Generation):
        def __init__(self, model: StreamedModel, request: TokenRequest, *rest: Any) -> None:
            prompts.append(list(request.prompt))
            super().__init__(model, request, *rest)

    monkeypatch.setattr(engine, "Generation", Recorded)
    return prompts


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(folder: Path, chat: Chat) -> list[int]:
    """What transformers makes of a conversation."""
    tokenizer = tokenizer_of(folder)
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return ids


def reply_of_mlx_lm(folder: Path, chat: Chat, count: int) -> str:
    """The same request to mlx-lm, everything resident."""
    model, _ = load_model(folder)
    steps = generate_step(mx.array(prompt_ids(folder, chat)), model, max_tokens=count)
    return str(tokenizer_of(folder).decode([int(token) for token, _ in steps]))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ask(*arguments: object) -> str:
    """The reply, without the newline that llm ends it with."""
    output = works("-m", "demo", *arguments).stdout
    assert output.endswith("\n")
    return output[:-1]


# Words ----------------------------------------------------------------------------------------


def test_the_greedy_reply_is_mlx_lms(demo_folder: Path) -> None:
    reply = ask("-o", "max_tokens", LENGTH, "Tell me about experts.")
    assert reply == reply_of_mlx_lm(demo_folder, [user("Tell me about experts.")], LENGTH)
    assert len(reply.split()) > LENGTH / 4


def test_the_system_prompt_is_part_of_the_conversation(
    demo_folder: Path, sent: list[list[int]]
) -> None:
    reply = ask(*SHORT, "-s", "Be brief.", "Hello")
    chat = [{"role": "system", "content": "Be brief."}, user("Hello")]
    assert sent == [prompt_ids(demo_folder, chat)]
    assert reply == reply_of_mlx_lm(demo_folder, chat, 12)


def test_without_streaming_the_text_is_the_same() -> None:
    reply = ask(*SHORT, "Hello")
    assert ask(*SHORT, "--no-stream", "Hello") == reply
    assert "".join(llm_library.get_model("demo").prompt("Hello", max_tokens=12)) == reply


def test_the_installed_command_gives_the_same_and_nothing_else() -> None:
    """stdout holds the reply alone and stderr nothing, so that pipes and logs stay clean."""
    reply = ask(*SHORT, "Hello")
    done = installed_llm("-m", "demo", *SHORT, "Hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, reply + "\n", "")
    piped = installed_llm("-m", "demo", *SHORT, stdin="Hello")
    assert piped.stdout == reply + "\n"


def test_two_replies_read_by_turns_are_those_read_alone() -> None:
    """They share one engine."""
    model = llm_library.get_model("demo")
    prompts = ("Hello", "Tell me about experts.")
    alone = [model.prompt(text, max_tokens=12).text() for text in prompts]
    both = [iter(model.prompt(text, max_tokens=12)) for text in prompts]
    texts = ["", ""]
    for _ in range(13):
        for number, reply in enumerate(both):
            texts[number] += next(reply, "")
    assert texts == alone


# Options --------------------------------------------------------------------------------------


def test_a_seed_makes_sampling_repeatable() -> None:
    def sampled(seed: int) -> str:
        return ask(*SHORT, "-o", "temperature", 1.5, "-o", "seed", seed, "Hello")

    replies = [sampled(seed) for seed in (0, 1, 2, 0, 1, 2)]
    assert replies[:3] == replies[3:]
    assert len(set(replies)) == 3
    assert ask(*SHORT, "-o", "temperature", 0, "Hello") == ask(*SHORT, "Hello")


def test_max_tokens_counts_tokens() -> None:
    whole = ask("-o", "max_tokens", 9, "Hello")
    assert whole.startswith(ask("-o", "max_tokens", 1, "Hello"))
    assert [turn["output_tokens"] for turn in logged()] == [9, 1]
    assert {turn["response_json"]["finish_reason"] for turn in logged()} == {"length"}


def test_a_stop_ends_the_reply_and_is_not_given() -> None:
    whole = ask(*SHORT, "Hello")
    stop = whole[len(whole) // 2 :][:5]
    assert ask(*SHORT, "-o", "stop", stop, "Hello") == whole[: whole.index(stop)]
    assert logged()[-1]["response_json"]["finish_reason"] == "stop"
    model = llm_library.get_model("demo")
    several = model.prompt("Hello", max_tokens=12, stop=["no such words", stop]).text()
    assert several == whole[: whole.index(stop)]


def test_fewer_experts_read_less_and_are_lossy() -> None:
    own_reply = ask(*SHORT, "Hello")
    assert ask(*SHORT, "-o", "experts", 2, "Hello") != own_reply
    own, fewer = (turn["response_json"] for turn in logged())
    assert (own["experts_per_token"], own["lossy"]) == (4, [])
    assert (fewer["experts_per_token"], fewer["lossy"]) == (
        2,
        ["2 experts of 4 a token, with the weights they have among all"],
    )
    assert fewer["expert_bytes"] < own["expert_bytes"]


def test_statistics_go_to_stderr_when_asked_for() -> None:
    quiet = works("-m", "demo", *SHORT, "Hello")
    loud = works("-m", "demo", *SHORT, "-o", "stats", 1, "Hello")
    assert (loud.stdout, quiet.stderr) == (quiet.stdout, "")
    assert re.search(r"\d+ prompt tokens at .*; 12 tokens at .*\(length\)", loud.stderr)
    cached = r", \d+% of them cached" if sys.platform in ("linux", "darwin") else ""
    assert re.search(rf"MB of experts{cached}; .* MB read at .* peak memory", loud.stderr)


# History --------------------------------------------------------------------------------------


def test_continuing_sends_the_whole_conversation(demo_folder: Path, sent: list[list[int]]) -> None:
    chat: Chat = [{"role": "system", "content": "Be brief."}]
    for turn, text in enumerate(["Hello", "And then?", "Why?"]):
        start = ("-m", "demo", "-s", "Be brief.") if turn == 0 else ("-c",)
        chat.append(user(text))
        reply = works(*start, *SHORT, text).stdout[:-1]
        assert sent[-1] == prompt_ids(demo_folder, chat)
        assert logged()[-1]["input_tokens"] == len(sent[-1])
        chat.append(said(reply))
    assert len(sent) == 3
    counts = [turn["input_tokens"] for turn in logged()]
    assert counts == sorted(set(counts))


def test_a_new_system_prompt_replaces_the_old_one(demo_folder: Path, sent: list[list[int]]) -> None:
    first = ask(*SHORT, "-s", "Be brief.", "Hello")
    works("-c", *SHORT, "-s", "Be kind.", "Again")
    system = {"role": "system", "content": "Be kind."}
    chat = [system, user("Hello"), said(first), user("Again")]
    assert sent[-1] == prompt_ids(demo_folder, chat)


def test_chatting_keeps_what_was_said(demo_folder: Path, sent: list[list[int]]) -> None:
    questions = ["Hello", "And then?", "Why?"]
    chatting = ("chat", "-m", "demo", *SHORT)
    typed = [*questions, "quit"]
    shown = works(*chatting, stdin="\n".join([*typed, ""])).stdout
    for line in typed:  # click's runner shows what is typed, a pipe does not
        shown = shown.replace(f"> {line}\n", "> ")
    replies = [turn["response"] for turn in logged()]
    chat: Chat = []
    for question, reply, prompt in zip(questions, replies, sent, strict=True):
        chat.append(user(question))
        assert prompt == prompt_ids(demo_folder, chat)
        assert f"> {reply}\n" in shown
        chat.append(said(reply))
    piped = installed_llm(*chatting, stdin="\n".join([*typed, ""]))
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, shown, "")


def test_logs_hold_usage_and_statistics(demo_folder: Path) -> None:
    reply = ask(*SHORT, "Hello")
    (turn,) = logged()
    statistics = turn["response_json"]
    assert (turn["response"], turn["model"]) == (reply, "demo")
    assert turn["options_json"] == {"max_tokens": 12}
    assert turn["input_tokens"] == len(prompt_ids(demo_folder, [user("Hello")]))
    assert turn["input_tokens"] == statistics["prompt_tokens"]
    assert turn["output_tokens"] == statistics["generated_tokens"] == 12
    assert statistics["bits"] == "4-bit"
    for name in ("tokens_per_second", "expert_bytes", "load_seconds", "peak_rss_bytes"):
        assert statistics[name] > 0
    assert works("-c", *SHORT, "-u", "More").stderr.startswith("Token usage: ")


def test_statistics_say_where_the_time_before_the_first_word_went() -> None:
    """In a process of its own, whose time is known from outside, and less for a second reply."""
    start = time.perf_counter()
    shown = installed_llm("-m", "demo", *SHORT, "-o", "stats", 1, "Hello").stderr
    seconds = time.perf_counter() - start
    *_, line = shown.strip().splitlines()
    (turn,) = logged()
    parts = turn["response_json"]["first_word"]
    assert {"start", "imports", "tokenizer", "kernels", "weights", "kept prompt", "prompt"} <= set(
        parts
    )
    assert all(spent >= 0 for spent in parts.values())
    assert 0 < sum(parts.values()) < seconds
    assert line.startswith(
        f"first word after {sum(parts.values()):.2f} s: start {parts['start']:.2f}, "
    )
    assert line.endswith(f"the last: {turn['response_json']['saving_seconds']:.2f}")

    model = llm_library.get_model("demo")
    first, second = (model.prompt("Hello", max_tokens=1) for _ in range(2))
    first.text(), second.text()
    assert not {"start", "imports", "weights"} & set(second.response_json["first_word"])
    assert second.response_json["first_word"]["prompt"] > 0


# What goes wrong ------------------------------------------------------------------------------


def test_the_flagship_is_listed_and_says_how_to_get_it() -> None:
    assert f"FlashMoE: {FLAGSHIP} (no weights yet)\n" in works("models").stdout
    for error in (
        llm("-m", FLAGSHIP, "Hello"),
        llm("chat", "-m", FLAGSHIP, stdin="Hello\nquit\n"),
    ):
        assert isinstance(error.exception, SystemExit)
        assert error.exit_code == 1
        assert f"\n  llm flash-moe pull {FLAGSHIP}\n" in error.stderr
        assert "223 GB" in error.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("experts", 9, "experts=9: this model has 8; choose 1 to 8."),
        ("experts", 0, "choose 1 or more"),
        ("max_tokens", 0, "choose 1 or more"),
        ("max_tokens", "x", "valid integer"),
        ("temperature", -1, "choose 0 to 10"),
        ("temperature", "nan", "choose 0 to 10"),
        ("top_p", 1.5, "choose 0 to 1"),
        ("seed", -1, "choose 0 to 9,223,372,036,854,775,807"),
        ("cache_tolerance", 1, "choose 0 or more, and less than 1"),
        ("full_experts_in", "songs", "choose prompt or grammar"),
        ("runtime", "abacus", "choose auto, metal, cuda, native, mlx"),
        ("nonsense", 1, "Extra inputs are not permitted"),
    ],
)
def test_bad_options_are_named(name: str, value: object, message: str) -> None:
    for result in (
        llm("-m", "demo", "-o", name, value, "Hello"),
        llm("chat", "-m", "demo", "-o", name, value, stdin="Hello\nquit\n"),
    ):
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")
        assert name in result.stderr
        assert message in result.stderr
        assert len(result.stderr.splitlines()) <= 2


def test_a_model_whose_folder_is_gone(demo_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder)
    works("flash-moe", "add", folder)
    shutil.rmtree(folder)
    message = fails("-m", "model", "Hello")
    assert message.startswith(f"The folder of 'model' is gone: {folder}.")
    assert message.endswith("llm flash-moe remove model")
    assert fails("chat", "-m", "model", stdin="Hello\nquit\n") == message
    with pytest.raises(llm_library.ModelError, match="is gone"):
        llm_library.get_model("model").prompt("Hello").text()
    assert works("flash-moe", "remove", "model").output == "Removed model.\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("chat_template.jinja", "{{ 'a' + 1 }}", "chat template rejects"),
        ("chat_template.jinja", "", "The prompt is empty"),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", '{"model_type": "other"}', "mlx-lm cannot build a other"),
    ],
)
def test_damaged_models_are_one_line(
    demo_folder: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_folder, folder)
    works("flash-moe", "add", folder)
    (folder / file).write_text(content)
    assert message in fails("-m", "model", "Hello")
    assert message in fails("chat", "-m", "model", stdin="Hello\nquit\n")


@pytest.mark.parametrize("content", ["{", "[]", '{"models": {"x": 1}}', '{"models": 3}'])
def test_a_damaged_registry_costs_only_its_own_models(llm_home: Path, content: str) -> None:
    """Every `llm -m` asks every plugin for its models."""
    file = llm_home / "llm-flash-moe" / "models.json"
    file.write_text(content)
    done = installed_llm("models")
    assert done.returncode == 0
    assert FLAGSHIP in done.stdout
    (warning,) = done.stderr.splitlines()
    assert warning.startswith(f"Warning: {file} is damaged")
    assert "llm flash-moe add PATH" in warning
    assert f"{file} is damaged" in fails("flash-moe", "models")
    assert file.read_text() == content


def test_another_model_can_follow_in_one_process(demo_folder: Path, tmp_path: Path) -> None:
    """Only one is loaded at a time."""
    shutil.copytree(demo_folder, tmp_path / "other")
    works("flash-moe", "add", tmp_path / "other")
    assert set(known()) == {"demo", "other"}
    first = ask(*SHORT, "Hello")
    assert works("-m", "other", *SHORT, "Hello").stdout == first + "\n"
    assert ask(*SHORT, "Hello") == first
