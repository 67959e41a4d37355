"""What else people do with `llm`, with the built-in model: schemas, extraction, usage, aliases,
templates, stored options, conversations by id; and what SQLite holds of it."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import llm as llm_library
import pytest
from pydantic import BaseModel

from flash_moe.built_in import NAME
from llm_flash_moe.answering.messages import schema_of
from tests.plugin.terminal import fails, installed_llm, logged, works

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
ADA = "Ada Lovelace is 36."


def ask(*arguments: object) -> str:
    return works("-m", NAME, *arguments).stdout.strip()


@pytest.mark.parametrize("schema", [json.dumps(PERSON), "name, age int"])
def test_a_schema_is_filled_in(schema: str) -> None:
    assert json.loads(ask("--schema", schema, ADA)) == {"name": "Ada Lovelace", "age": 36}
    [turn] = logged()
    assert json.loads(turn["response"]) == {"name": "Ada Lovelace", "age": 36}
    assert turn["response_json"]["constrained_tokens"] > 5
    assert 0 < turn["response_json"]["allowed_mass"] <= 1


def test_a_schema_as_a_pydantic_class() -> None:
    class Person(BaseModel):
        name: str
        age: int

    reply = llm_library.get_model(NAME).prompt(ADA, schema=Person)
    assert Person.model_validate_json(reply.text()) == Person(name="Ada Lovelace", age=36)


def test_a_thought_comes_before_the_json() -> None:
    result = works("-m", NAME, "-o", "thinking", 1, "--schema", json.dumps(PERSON), ADA)
    assert json.loads(result.stdout) == {"name": "Ada Lovelace", "age": 36}
    assert "I have to fill in" in result.stderr


def test_a_thought_that_is_too_long_is_closed() -> None:
    works("-m", NAME, "-o", "thinking", 1, "-o", "thinking_budget", 5, "What is 468 + 357?")
    [turn] = logged()
    assert turn["reasoning"] == "8 + 7 +"
    assert turn["response"]


def test_json_that_is_cut_off_is_said_to_be() -> None:
    result = works("-m", NAME, "-o", "max_tokens", 4, "--schema", json.dumps(PERSON), ADA)
    assert "The JSON is not complete (length, 4 tokens)" in result.stderr
    assert logged()[0]["response_json"]["finish_reason"] == "length"


def test_what_no_grammar_can_express_is_named() -> None:
    schema = {"type": "object", "properties": {"a": {"$ref": "https://example.com/a"}}}
    assert "$ref" in fails("-m", NAME, "--schema", json.dumps(schema), ADA)


def test_code_is_extracted() -> None:
    code = ask("-x", "How do I read a JSON file?")
    compile(code, "answer", "exec")
    assert code.startswith("import json")


def test_no_stream_gives_the_same() -> None:
    question = "What does shutil.copytree do?"
    assert ask("--no-stream", question) == ask(question)


def test_usage_is_shown() -> None:
    shown = works("-m", NAME, "-u", "Hello").stderr
    assert "Token usage: " in shown
    [turn] = logged()
    assert f"{turn['input_tokens']} input, {turn['output_tokens']} output" in shown


def test_aliases_templates_and_stored_options(llm_home: Path) -> None:
    works("aliases", "set", "tiny", NAME)
    works("models", "options", "set", NAME, "max_tokens", 3)
    works("-m", "tiny", "-s", "Answer in upper case.", "-o", "seed", 1, "--save", "loud")
    works("-t", "loud", "Thank you", "-o", "max_tokens", 50)
    works("-m", "tiny", "Hello")
    first, second = logged()
    assert first["response"] == "YOU ARE WELCOME!"
    assert first["options_json"] == {"seed": 1, "max_tokens": 50}
    assert second["options_json"] == {"max_tokens": 3}
    assert second["output_tokens"] == 3


def test_conversations_by_id() -> None:
    installed_llm("-m", NAME, "My name is Ada.")
    installed_llm("-m", NAME, "My name is Bob.")
    first = logged()[0]["conversation_id"]
    reply = installed_llm("--cid", first, "What is my name?").stdout
    assert reply.strip() == "Your name is Ada."
    assert [turn["conversation_id"] for turn in logged()].count(first) == 2


def test_logs_show_what_was_said() -> None:
    ask("-o", "thinking", 1, "What is 468 + 357?")
    shown = works("logs", "-n", 1).stdout
    assert "468 + 357 = 825." in shown
    assert "write 5, carry 1" in shown


def test_sqlite_holds_the_turn_and_nothing_the_user_did_not_set(llm_home: Path) -> None:
    ask("Hello")
    with sqlite3.connect(llm_home / "logs.db") as database:
        database.row_factory = sqlite3.Row
        [turn] = map(dict, database.execute("select * from turns"))
        texts = [row["text"] for row in database.execute("select text from parts")]
    database.close()
    assert turn["model"] == NAME
    assert turn["resolved_model"] == "qwen3_5_moe 4-bit"
    assert json.loads(turn["options_json"] or "{}") == {}
    assert json.loads(turn["response_json"])["runtime"]
    assert {"Hello", "Hello! How can I help you?"} <= set(texts)


def test_fewer_experts_are_named_as_less_exact() -> None:
    ask("-o", "experts", 4, "Hello")
    ask("-o", "cache_tolerance", 0.2, "Hello")
    fewer, tolerant = (turn["response_json"]["lossy"] for turn in logged())
    assert fewer == ["4 experts of 10 a token, with the weights they have among all"]
    assert tolerant == ["cached experts in place of others up to 20% likelier"]
    error = fails("-m", NAME, "-o", "full_experts", 2, "Hi")
    assert error.startswith("full_experts=2: this model is not packed in two planes.")
    assert error.endswith("llm flash-moe pack PATH --planes")


def test_attachments_are_refused(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert "attachment" in fails("-m", NAME, "-a", picture, "What is this?").lower()


def test_fragments_are_part_of_the_prompt(tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("Ada Lovelace is 36.")
    found: Any = json.loads(ask("-f", file, "--schema", "name, age int"))
    assert found == {"name": "Ada Lovelace", "age": 36}


def test_with_tools_and_a_schema_a_reply_is_calls_or_the_value() -> None:
    """What this small model calls or says is another matter."""
    version = {"type": "string", "maxLength": 10}
    schema = {"type": "object", "properties": {"version": version}, "required": ["version"]}
    tools = ("-T", "llm_version", "-T", "llm_time")
    asked = "What version of llm is this?"
    result = works("-m", NAME, *tools, "--schema", json.dumps(schema), asked)
    assert json.loads(result.stdout).keys() == {"version"}


def test_results_of_calls_are_answered_by_the_schema_of_the_question() -> None:
    """llm says it with the question alone."""
    model = llm_library.get_model(NAME)
    conversation = model.conversation(tools=[llm_library.Tool.function(add)])
    held: list[Any] = []
    limits = {"chain_limit": 2, "options": {"max_tokens": 40}}
    chain = conversation.chain(ADA, schema=PERSON, **limits)
    for response in chain.responses():
        response.text()
        held.append(schema_of(response.prompt, response))
        assert response.response_json["constrained_tokens"] > 0
        if len(held) == 2:
            break
    assert held == [PERSON, PERSON]
    conversation.prompt("What is 4 + 3?").text()
    assert schema_of(conversation.responses[-1].prompt, conversation.responses[-1]) is None


def add(a: int, b: int) -> int:
    """Add two numbers"""
    return a + b
