"""Text ↔ token ids, with the tokenizer that came with the checkpoint.

The `tokenizers` library reads tokenizer.json in a third of the time and memory that transformers
takes (1.1–1.8 s against 3.7–6.7 s for a vocabulary of 248,000); transformers is only used if a
checkpoint has no tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from flash_moe.chat.template import Template
from flash_moe.errors import CheckpointError
from flash_moe.format.json_files import (
    MAX_JSON_BYTES,
    read_json,
    read_json_if_present,
    read_text,
    require_file,
)

# The single bytes alone are this many.
SMALLEST_VOCABULARY = 256
# The variables that transformers gives to templates.
SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ChatTokenizer:
    tokenizer: Tokenizer
    template: Template | None
    stop_tokens: frozenset[int]

    def encode_chat(self, messages: Sequence[dict[str, Any]], **variables: Any) -> list[int]:
        """The ids of a conversation, up to the point where the assistant goes on."""
        return self.encode_rendered(self.render_chat(messages, **variables))

    def render_chat(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        if self.template is None:
            return "\n\n".join(str(message["content"]) for message in messages)
        return self.template.render(messages, **variables)

    def encode_rendered(self, text: str) -> list[int]:
        """Templates write special tokens themselves; without one, the tokenizer adds them."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=self.template is None).ids
        return ids

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def text_of(self, token: int) -> str:
        """The text of a single token, special ones included."""
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def stream(self, visible: Iterable[str] = ()) -> TextStream:
        """`visible` are special tokens to show as text; all others are left out."""
        return TextStream(self, _token_ids(self.tokenizer, visible))


class TextStream:
    """Turns tokens into text one by one, whole characters only: a token that ends inside a
    character gives nothing, the one that completes it gives all of it. `finish` gives the rest."""

    def __init__(self, tokenizer: ChatTokenizer, visible: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._visible = visible
        self._begin()

    def _begin(self) -> None:
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""

    def add(self, token: int) -> str:
        if token in self._visible:
            rest = self.finish()
            self._begin()
            return rest + str(self._tokenizer.tokenizer.id_to_token(token))
        self._ids.append(token)
        text = self._decoder.step(self._tokenizer.tokenizer, token) or ""
        self._text += text
        return text

    def finish(self) -> str:
        whole = self._tokenizer.decode(self._ids)
        return whole[len(self._text) :] if whole.startswith(self._text) else ""


def load_tokenizer(path: Path) -> ChatTokenizer:
    """The tokenizer, template and stop tokens of a checkpoint folder."""
    config = read_json_if_present(path / "tokenizer_config.json")
    tokenizer = _tokenizer(path)
    # Some files ask for them. They would silently cut or pad every prompt.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = _template(path, config)
    special = {name: text for name in SPECIAL if (text := _token_text(config.get(name)))}
    stops = _stop_tokens(path, tokenizer, special.get("eos_token"))
    return ChatTokenizer(
        tokenizer, None if template is None else Template(template, special), stops
    )


def _tokenizer(path: Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        return _from_transformers(path)
    require_file(file, MAX_JSON_BYTES)
    try:
        # Not from_file, which reads in small pieces: 0.57 s instead of 0.70 for 248,000 words.
        return Tokenizer.from_buffer(file.read_bytes())
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file} cannot be read ({error}). Download it again.") from error


def _from_transformers(path: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer

        # Never run downloaded code, nor ask the user whether to.
        slow = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        converted: Tokenizer = slow.backend_tokenizer
        # From a config alone, transformers makes a tokenizer with an empty vocabulary.
        if converted.get_vocab_size(with_added_tokens=False) < SMALLEST_VOCABULARY:
            raise ValueError("no vocabulary")
    except Exception as error:  # anything may be missing or malformed here
        raise CheckpointError(
            f"{path} has no tokenizer.json, and transformers cannot make one from the other files "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Download the tokenizer's files as well."
        ) from error
    return converted


def _template(path: Path, config: dict[str, Any]) -> str | None:
    for name in ("chat_template.jinja", "chat_template.json"):
        file = path / name
        if file.exists():
            if file.suffix == ".jinja":
                return read_text(file)
            return _default(read_json(file).get("chat_template"))
    return _default(config.get("chat_template"))


def _default(template: Any) -> str | None:
    """The template, or of a list of named ones the one called default, else the first."""
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default") or next(iter(named.values()), None)
    return template if isinstance(template, str) else None


def _stop_tokens(path: Path, tokenizer: Tokenizer, eos: str | None) -> frozenset[int]:
    """Every id that ends a reply, from all the places where checkpoints declare one."""
    config = read_json(path / "config.json")
    tables = [read_json_if_present(path / "generation_config.json"), config]
    tables += [value for value in config.values() if isinstance(value, dict)]
    stops = _token_ids(tokenizer, [eos, "<|im_end|>", "<|endoftext|>"])
    for table in tables:
        ids = table.get("eos_token_id")
        stops.update(i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))
    return frozenset(stops)


def _token_ids(tokenizer: Tokenizer, texts: Iterable[str | None]) -> set[int]:
    """The ids of the texts that are tokens."""
    ids = {tokenizer.token_to_id(text) for text in texts if text is not None}
    return {i for i in ids if i is not None}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
