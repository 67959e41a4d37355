"""The official OpenAI client against our models, served by llm-chat-completions-server."""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any, NamedTuple

import pytest
from openai import APIError, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel

from tests.plugin.terminal import works

pytest.importorskip("llm_chat_completions_server")
from tests.plugin.openai_server import serving

NAME = "flash-moe-tiny"
SUM = "What is 468 + 357?"
MULTIPLY = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiply two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}},
            "required": ["x", "y"],
        },
    },
}


class Server(NamedTuple):
    client: OpenAI
    process: Popen[bytes]
    home: Path


class Person(BaseModel):
    name: str
    age: int
    city: str


@pytest.fixture(scope="module")
def server(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(home))
        works("flash-moe", "add", demo_folder, "--name", "demo")
    with serving(home) as (client, process):
        yield Server(client, process, home)


@pytest.fixture
def unlogged(server: Server) -> Iterator[None]:
    """As `llm logs off`. The server logs every reply on a connection of its own, and SQLite answers
    those that write at the same moment with "database is locked"."""
    switch = server.home / "logs-off"
    switch.touch()
    yield
    switch.unlink()


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(client: OpenAI, *messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model=options.pop("model", NAME), messages=list(messages), **options
    )


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content)


def test_models_are_listed(client: OpenAI) -> None:
    assert {NAME, "demo", "flash-moe-397b"} <= {model.id for model in client.models.list()}


def test_chat(client: OpenAI) -> None:
    completion = ask(client, user(SUM))
    assert text_of(completion) == "468 + 357 = 825."
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == 24
    assert completion.usage.completion_tokens == 15
    goes_on = [user("My name is Ada."), {"role": "assistant", "content": "I will remember that."}]
    assert text_of(ask(client, *goes_on, user("What is my name?"))) == "Your name is Ada."
    system = {"role": "system", "content": "Answer in upper case."}
    assert text_of(ask(client, system, user("Thank you"))) == "YOU ARE WELCOME!"
    assert ask(client, user(SUM), max_tokens=3).usage.completion_tokens == 3


def test_the_readmes_program_runs(client: OpenAI, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "llm_flash_moe" / "README.md").read_text("utf-8")
    (program,) = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
    address = "http://127.0.0.1:8002/v1"
    assert address in program
    exec(compile(program.replace(address, str(client.base_url)), "README", "exec"), {})
    assert capsys.readouterr().out == "468 + 357 = 825."


def test_a_stream_is_the_same_reply_in_pieces(client: OpenAI) -> None:
    chunks = list(ask(client, user(SUM), stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == "468 + 357 = 825."
    assert len([piece for piece in pieces if piece]) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 15


def test_a_tool_is_called_and_its_result_is_used(client: OpenAI) -> None:
    question = user("What is 1234 * 5678?")
    first = ask(client, question, tools=[MULTIPLY]).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert call.function.name == "multiply"
    assert json.loads(call.function.arguments) == {"x": 1234, "y": 5678}
    result = {"role": "tool", "tool_call_id": call.id, "content": "7006652"}
    asked = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    answer = ask(client, question, asked, result, tools=[MULTIPLY])
    assert text_of(answer) == "1234 * 5678 = 7006652."


def test_a_tool_is_called_in_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model=NAME,
        messages=[user("What is 1234 * 5678?")],  # type: ignore[list-item]
        tools=[MULTIPLY],  # type: ignore[list-item]
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (call,) = final.choices[0].message.tool_calls or []
    assert json.loads(call.function.arguments) == {"x": 1234, "y": 5678}


def test_a_reply_is_held_to_a_schema(client: OpenAI) -> None:
    ada = user("Ada Lovelace is 36 and lives in London.")
    parsed = client.chat.completions.parse(model=NAME, messages=[ada], response_format=Person)  # type: ignore[list-item]
    assert parsed.choices[0].message.parsed == Person(name="Ada Lovelace", age=36, city="London")
    # Noise is held to it, too.
    noise = ask(
        client,
        user("Hello"),
        model="demo",
        max_tokens=400,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "choice",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"enum": ["x", "y"]}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
            },
        },
    )
    assert json.loads(text_of(noise))["a"] in ("x", "y")


def test_errors_say_what_is_wrong_and_the_server_goes_on(client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="'no-such-model' does not exist"):
        ask(client, user("Hi"), model="no-such-model")
    with pytest.raises(BadRequestError, match="temperature"):
        ask(client, user("Hi"), temperature=50)
    with pytest.raises(BadRequestError, match="Only n=1 is supported"):
        ask(client, user("Hi"), n=2)
    with pytest.raises(APIError, match="leaves no room for a reply"):
        ask(client, user("word " * 300_000))
    with pytest.raises(APIError, match="llm flash-moe pull flash-moe-397b"):
        ask(client, user("Hi"), model="flash-moe-397b")
    with pytest.raises(APIError, match="leaves no room for a reply"):
        list(ask(client, user("word " * 300_000), stream=True))
    assert text_of(ask(client, user(SUM))) == "468 + 357 = 825."


def test_a_stream_that_is_closed_ends_its_reply(client: OpenAI) -> None:
    """Noise has no end. One model fills the memory: another one answers when the reply is over."""
    stream = ask(client, user("Hello"), model="demo", stream=True, max_tokens=1_000_000)
    for _ in range(3):
        next(stream)
    stream.close()
    assert text_of(ask(client, user(SUM), timeout=40)) == "468 + 357 = 825."


@pytest.mark.usefixtures("unlogged")
def test_clients_at_once_get_their_own_replies(client: OpenAI) -> None:
    soak(client, clients=8, seconds=3)


@pytest.mark.slow
@pytest.mark.usefixtures("unlogged")
def test_soak(server: Server) -> None:
    """32 clients for five minutes: no reply is mixed up, and memory stays where it is."""
    client, process = server.client, server.process
    seconds = float(os.environ.get("SOAK_SECONDS", 300))
    soak(client, clients=32, seconds=seconds / 5)
    before = resident_bytes(process.pid)
    replies = soak(client, clients=32, seconds=seconds * 4 / 5)
    after = resident_bytes(process.pid)
    print(f"{replies} replies; {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB")
    assert after - before < 64e6


def soak(client: OpenAI, clients: int, seconds: float) -> int:
    """How many replies there were. Greedy replies are the same however many are made at once."""
    prompts = [f"What is {a} + {b}?" for a, b in ((468, 357), (12, 30), (700, 299), (51, 86))]
    prompts += ["My name is Ada.", "Thank you", "What does os.path.join do?", "Hi"]
    right = {prompt: text_of(ask(client, user(prompt))) for prompt in prompts}
    assert len(set(right.values())) == len(right)
    end, wrong, count = time.monotonic() + seconds, list[object](), [0] * clients

    def work(number: int) -> None:
        chosen = random.Random(number)
        while time.monotonic() < end and not wrong:
            prompt = chosen.choice(prompts)
            try:
                if chosen.random() < 0.5:
                    said = text_of(ask(client, user(prompt)))
                else:
                    stream = ask(client, user(prompt), stream=True)
                    said = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
                if said != right[prompt]:
                    wrong.append((prompt, said))
            except Exception as error:
                wrong.append((prompt, error))
            count[number] += 1

    workers = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert min(count) > 0, "a client got no reply"
    return sum(count)


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("no /proc here")
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
