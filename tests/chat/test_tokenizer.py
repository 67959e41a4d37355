"""Tokens to text and back, and the forms that a checkpoint's tokenizer files can take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.errors import CheckpointError, FlashMoeError
from flash_moe.synth.tokenizer import make_tokenizer
from tests.strategies import edited, json_values

SYNTHETIC = make_tokenizer()
TOKENIZER = ChatTokenizer(Tokenizer.from_str(SYNTHETIC.json), None, frozenset())

# Characters of two to four bytes, and ones that combine.
PIECES = [
    "é",
    "e\u0301",
    "한국",
    "漢字",
    "👩‍👩‍👧",
    "🏳️‍🌈",
    "🇩🇪",
    "नि",
    "a\u0308\u0323",
    "\u200d",
    "ﷺ",
    "<|im_end|>",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=8).map("".join)
# Also beyond the vocabulary: a model's head may be wider than its tokenizer.
tokens = st.lists(st.integers(0, SYNTHETIC.size + 50), max_size=24)


def streamed(ids: list[int]) -> list[str]:
    stream = TOKENIZER.stream()
    return [stream.add(token) for token in ids] + [stream.finish()]


@settings(max_examples=300, deadline=None)
@given(texts)
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    pieces = streamed(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(tokens)
def test_any_tokens_stream_as_they_decode(ids: list[int]) -> None:
    assert "".join(streamed(ids)) == TOKENIZER.decode(ids)


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = TOKENIZER.encode("x🦙y")
    assert len(ids) == 6
    assert streamed(ids) == ["x", "", "", "", "🦙", "y", ""]


def test_an_incomplete_character_comes_at_the_end() -> None:
    ids = TOKENIZER.encode("x🦙")[:-1]
    assert streamed(ids) == ["x", "", "", "", "\ufffd"]


# Folders -------------------------------------------------------------------------------------


def make_folder(folder: Path, **files: Any) -> Path:
    """A folder with a sound tokenizer; keyword arguments are files, `config` for config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, Any] = {"tokenizer": SYNTHETIC.json, "config": {"model_type": "x"}, **files}
    for name, value in contents.items():
        suffix = ".jinja" if name == "chat_template" else ".json"
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / f"{name}{suffix}").write_text(text, "utf-8")
    return folder


def stop_texts(folder: Path) -> set[str | None]:
    stops = load_tokenizer(folder).stop_tokens
    return {TOKENIZER.tokenizer.id_to_token(token) for token in stops}


ALWAYS = {"<|im_end|>", "<|endoftext|>"}
ID = 65
TOKEN = TOKENIZER.tokenizer.id_to_token(ID)


@pytest.mark.parametrize(
    "files",
    [
        {"generation_config": {"eos_token_id": ID}},
        {"generation_config": {"eos_token_id": [ID]}},
        {"config": {"model_type": "x", "eos_token_id": ID}},
        {"config": {"model_type": "x", "text_config": {"eos_token_id": [ID]}}},
        {"tokenizer_config": {"eos_token": TOKEN}},
        {"tokenizer_config": {"eos_token": {"content": TOKEN, "special": True}}},
    ],
    ids=["generation", "list", "config", "nested", "eos_token", "eos_token dict"],
)
def test_stop_tokens_come_from_every_file_that_declares_them(
    tmp_path: Path, files: dict[str, Any]
) -> None:
    assert stop_texts(make_folder(tmp_path / "plain")) == ALWAYS
    assert stop_texts(make_folder(tmp_path / "model", **files)) == ALWAYS | {TOKEN}


def rendered(folder: Path) -> str | None:
    tokenizer = load_tokenizer(folder)
    return tokenizer.template and tokenizer.template.render([])


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config": {"chat_template": "text"}}, "text"),
        ({"tokenizer_config": {"chat_template": NAMED}}, "named"),
        ({"tokenizer_config": {"chat_template": NAMED[:1]}}, "tools"),
        ({"tokenizer_config": {"chat_template": []}}, None),
        ({"tokenizer_config": {"chat_template": "no"}, "chat_template": "file"}, "file"),
        ({"tokenizer_config": {"eos_token": "E", "chat_template": "{{ eos_token }}"}}, "E"),
        ({"tokenizer_config": {"pad_token": "P", "chat_template": "{{ pad_token }}"}}, "P"),
    ],
)
def test_which_template_is_used(
    tmp_path: Path, files: dict[str, Any], expected: str | None
) -> None:
    assert rendered(make_folder(tmp_path / "model", **files)) == expected


def test_a_template_file_in_json(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", tokenizer_config={"chat_template": "no"})
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered(folder) == "json"
    (folder / "chat_template.json").write_text("{}")
    assert rendered(folder) is None
    (folder / "chat_template.jinja").write_text("jinja")
    assert rendered(folder) == "jinja"


def test_without_a_template_the_messages_are_the_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_folder(tmp_path / "model"))
    messages = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "one\n\ntwo"


def test_special_tokens_of_a_template_are_tokens(demo_folder: Path) -> None:
    tokenizer = load_tokenizer(demo_folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False).count("<|im_start|>") == 2
    assert ids.count(tokenizer.tokenizer.token_to_id("<|im_start|>")) == 2


def test_a_template_writes_the_special_tokens_itself(tmp_path: Path) -> None:
    """Many tokenizers put one before every text; with the template's that would be two."""
    tokenizer = Tokenizer.from_str(SYNTHETIC.json)
    start = (TOKEN, ID)
    tokenizer.post_processor = TemplateProcessing(single=f"{TOKEN} $A", special_tokens=[start])
    folder = make_folder(tmp_path / "model", tokenizer=tokenizer.to_str(), chat_template="Hello")
    loaded = load_tokenizer(folder)
    assert loaded.encode("Hello") == [ID, *TOKENIZER.encode("Hello")]
    assert loaded.encode_chat([]) == TOKENIZER.encode("Hello")


@pytest.mark.parametrize("length", [0, 3, 1000])
def test_prompts_are_neither_truncated_nor_padded(tmp_path: Path, length: int) -> None:
    """A tokenizer.json can ask for both; mlx-lm, which uses transformers, does neither."""
    from transformers import AutoTokenizer

    text = "experts " * length
    expected = TOKENIZER.encode(text)
    tokenizer = Tokenizer.from_str(SYNTHETIC.json)
    tokenizer.enable_truncation(40)
    tokenizer.enable_padding(length=64)
    assert len(tokenizer.encode(text).ids) == 64
    folder = make_folder(
        tmp_path / "model",
        tokenizer=tokenizer.to_str(),
        tokenizer_config=SYNTHETIC.config,
        chat_template="{{ messages[0].content }}",
    )
    loaded = load_tokenizer(folder)
    assert loaded.encode(text) == expected
    assert loaded.encode_chat([{"role": "user", "content": text}]) == expected
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.encode(text) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json cannot be read"),
        ("tokenizer.json", b"{}", "tokenizer.json cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json does not hold a JSON object"),
        ("generation_config.json", b"nonsense", "generation_config.json is not JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("chat_template.jinja", b"{% if %}", "chat template is broken"),
        ("chat_template.jinja", b"{{ " + b"(" * 5000, "chat template is broken"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = make_folder(tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    config=edited(
        {"eos_token": {"content": "E"}, "bos_token": "B", "chat_template": NAMED, "add_bos": True}
    ),
    generation=edited({"eos_token_id": [1, 2]}) | st.dictionaries(st.text(), json_values),
)
def test_any_json_loads_or_is_refused(tmp_path: Path, config: Any, generation: Any) -> None:
    folder = make_folder(tmp_path / "any", tokenizer_config=config, generation_config=generation)
    try:
        tokenizer = load_tokenizer(folder)
    except FlashMoeError:
        return
    assert all(isinstance(token, int) for token in tokenizer.stop_tokens)


NO_NETWORK = """
import socket, sys
from pathlib import Path

def refuse(*args, **kwargs):
    print("NETWORK", args)
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = refuse
from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.errors import CheckpointError
try:
    load_tokenizer(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["unknown", "qwen3_5_moe", "custom"])
def test_no_tokenizer_at_all_is_one_clean_line(tmp_path: Path, kind: str) -> None:
    """No traceback, no download, and no question whether to run the checkpoint's own code. For
    models that transformers knows, it would make a tokenizer with an empty vocabulary."""
    folder = make_folder(tmp_path / "model", config={"model_type": kind})
    (folder / "tokenizer.json").unlink()
    if kind == "custom":
        code = {"auto_map": {"AutoTokenizer": ["tokens.Mine", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(code))
        (folder / "tokens.py").write_text("print('RAN')\n")
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK, str(folder)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{folder} has no tokenizer.json")
    assert line.endswith("Download the tokenizer's files as well.")
    assert "Traceback" not in done.stderr
