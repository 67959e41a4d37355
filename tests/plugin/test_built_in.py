"""The built-in model through `llm`, as a user meets it: answers, thoughts, tools, chat, async."""

from __future__ import annotations

import asyncio
import json
import math
import zipfile
from pathlib import Path

import llm as llm_library
import pytest

from flash_moe.built_in import BUILT_IN, HELD_OUT, NAME
from tests.plugin.terminal import fails, installed_llm, logged, works

MULTIPLY = """
def multiply(x: int, y: int) -> int:
    "Multiply two numbers."
    return x * y
"""


def ask(*arguments: object) -> str:
    return works("-m", NAME, *arguments).stdout.strip()


def test_the_first_prompt_of_a_fresh_install() -> None:
    reply = installed_llm("-m", NAME, "What does os.path.join do?")
    assert reply.returncode == 0
    assert reply.stdout.startswith("`os.path.join(path, *paths)`")
    assert "Join" in reply.stdout
    assert reply.stderr == ""


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does shutil.copytree do?", "Recursively copy an entire directory tree"),
        ("Which module is Counter in?", "collections"),
        ("How do I read a JSON file in Python?", "json.load(file)"),
        ("What is llm-flash-moe?", "bigger than memory"),
        ("What is 17 + 25?", "17 + 25 = 42."),
        ("Convert 3 hours to minutes.", "3 hours = 180 minutes."),
        ("5 miles in km", "8.05 kilometres"),
        ("What is the capital of France?", "I do not know"),
        ("What does json.frobnicate do?", "There is no `json.frobnicate`"),
    ],
)
def test_it_answers_in_its_small_world(question: str, answer: str) -> None:
    assert answer in ask(question)


def test_thoughts_go_to_stderr_and_to_the_log() -> None:
    result = works("-m", NAME, "-o", "thinking", 1, "What is 468 + 357?")
    assert result.stdout.strip() == "468 + 357 = 825."
    assert "write 5, carry 1" in result.stderr
    [turn] = logged()
    assert turn["reasoning"].startswith("8 + 7 + 0 = 15: write 5, carry 1")
    assert "think>" not in turn["response"] + turn["reasoning"]
    assert turn["response_json"]["reasoning_tokens"] > 20
    assert json.loads(turn["token_details"]) == {
        "reasoning_tokens": turn["response_json"]["reasoning_tokens"]
    }


def test_thoughts_can_be_hidden() -> None:
    result = works("-m", NAME, "-o", "thinking", 1, "-R", "What is 468 + 357?")
    assert "carry" not in result.stderr
    assert "carry" in logged()[0]["reasoning"]


def test_without_thinking_there_is_no_thought() -> None:
    for option in ([], ["-o", "thinking", 0]):
        ask("What is 4 + 3?", *option)
    for turn in logged():
        assert turn["reasoning"] is None
        assert turn["response"] == "4 + 3 = 7."


def test_a_tool_is_called_and_its_result_is_used() -> None:
    result = works("-m", NAME, "--functions", MULTIPLY, "--td", "What is 1234 * 5678?")
    assert "Tool call: multiply({'x': 1234, 'y': 5678})" in result.stderr
    assert result.stdout.strip() == "1234 * 5678 = 7006652."
    call, answer = logged()
    [made] = call["tool_calls"]
    assert made["name"] == "multiply"
    assert made["arguments"] == {"x": 1234, "y": 5678}
    assert call["response"] == ""
    [result_of_tool] = answer["tool_results"]
    assert result_of_tool["output"] == "7006652"
    assert result_of_tool["tool_call_id"] == made["tool_call_id"]


def test_tool_calls_stream_as_events() -> None:
    def multiply(x: int, y: int) -> int:
        """Multiply two numbers."""
        return x * y

    response = llm_library.get_model(NAME).prompt("What is 1234 * 5678?", tools=[multiply])
    kinds = [(event.type, event.chunk) for event in response.stream_events()]
    assert kinds == [
        ("tool_call_name", "multiply"),
        ("tool_call_args", '{"x": 1234, "y": 5678}'),
    ]


def test_tools_that_do_not_fit_are_not_called() -> None:
    assert ask("--functions", MULTIPLY, "Hi") == "Hello! How can I help you?"


def test_chat_remembers() -> None:
    said = "My name is Ada.\nI live in Rome.\nWhat is my name?\nquit\n"
    text = works("chat", "-m", NAME, stdin=said).stdout
    replies = ["I will remember that.", "I will remember that.", "Your name is Ada."]
    assert [turn["response"] for turn in logged()] == replies
    assert text.count("I will remember that.\n") == 2
    assert len({turn["conversation_id"] for turn in logged()}) == 1


def test_a_conversation_goes_on_in_another_process() -> None:
    installed_llm("-m", NAME, "My name is Ada.")
    reply = installed_llm("-c", "What is my name?")
    assert reply.stdout.strip() == "Your name is Ada."


def test_a_system_prompt_is_followed() -> None:
    assert ask("-s", "Answer in upper case.", "Thank you") == "YOU ARE WELCOME!"


def test_a_stop_cuts_the_answer_and_not_the_thought() -> None:
    result = works(
        "-m", NAME, "-o", "thinking", 1, "-o", "stop", '["write", "="]', "What is 468 + 357?"
    )
    assert result.stdout.strip() == "468 + 357"
    assert "write 5" in result.stderr
    assert logged()[0]["response_json"]["finish_reason"] == "stop"


def test_context_length_is_kept_to() -> None:
    message = fails("-m", NAME, "-o", "context_length", 5, "What does os.path.join do?")
    assert message == (
        "The conversation has 19 tokens and context_length is 5, which leaves no room for a reply: "
        "begin a new conversation, or leave something out. Or set a larger -o context_length."
    )
    ask("-o", "context_length", 23, "What does os.path.join do?")
    assert logged()[0]["response_json"]["generated_tokens"] == 4
    assert logged()[0]["response_json"]["finish_reason"] == "length"


def test_async_replies_are_the_same() -> None:
    assert works("--async", "-m", NAME, "What is 4 + 3?").stdout.strip() == "4 + 3 = 7."


def test_async_prompts_side_by_side_do_not_mix() -> None:
    model = llm_library.get_async_model(NAME)

    async def one(n: int) -> str:
        return str(await model.prompt(f"What is {n} + 3?").text())

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(one, range(2, 10)))

    assert asyncio.run(all_of_them()) == [f"{n} + 3 = {n + 3}." for n in range(2, 10)]


def test_the_log_says_what_made_the_reply() -> None:
    ask("Hello")
    [turn] = logged()
    assert turn["model"] == NAME
    assert turn["resolved_model"] == "qwen3_5_moe 4-bit"
    assert turn["response_json"]["experts_per_token"] == 10
    assert turn["response_json"]["lossy"] == []
    assert turn["options_json"] == {}


def test_likelihoods_are_logged_if_asked_for() -> None:
    ask("-o", "logprobs", 3, "Hello")
    ask("Hello")
    first, second = (turn["response_json"] for turn in logged())
    assert "logprobs" not in second
    tokens = first["logprobs"]
    assert len(tokens) == first["generated_tokens"]
    assert "".join(token["token"] for token in tokens) == "Hello! How can I help you?<|im_end|>"
    for token in tokens:
        assert token["likeliest"][0] == [token["token"], token["logprob"]]
        likelihoods = [value for _, value in token["likeliest"]]
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert sum(math.exp(value) for value in likelihoods) <= 1.001


def test_it_is_always_listed_and_cannot_be_replaced(tmp_path: Path) -> None:
    assert f"FlashMoE: {NAME}" in works("models").stdout
    assert "comes with the package" in fails("flash-moe", "remove", NAME, "--yes")
    assert "comes with the package" in fails("flash-moe", "synth", "--name", NAME)
    assert "comes with the package" in fails("flash-moe", "add", BUILT_IN[NAME])


def test_it_fits_into_the_wheel(tmp_path: Path) -> None:
    """25 MB at most, compressed as wheels are."""
    archive = tmp_path / "wheel.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in BUILT_IN[NAME].rglob("*"):
            wheel.write(file)
    assert archive.stat().st_size < 25_000_000


def test_it_is_what_its_card_says() -> None:
    config = json.loads((BUILT_IN[NAME] / "config.json").read_text())["text_config"]
    assert config["num_experts"] == 64
    assert config["num_experts_per_tok"] == 10
    assert config["full_attention_interval"] == 4
    dims = ("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size")
    assert all(config[name] % 64 == 0 for name in dims)
    kinds = [
        json.loads(line)["kind"] for line in (HELD_OUT / "dialogues.jsonl").read_text().splitlines()
    ]
    assert {"json", "tools", "library", "sums"} <= set(kinds)
