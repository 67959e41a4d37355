"""A tokenizer's vocabulary as llguidance takes it, made once for each tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flash_moe.chat.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    # Brings in a library of 8 MB, which most replies need not.
    from llguidance import LLTokenizer

# A vocabulary of 248,000 takes the library 2.9 s and 119 MB.
_vocabularies: WeakKeyDictionary[ChatTokenizer, LLTokenizer] = WeakKeyDictionary()


def vocabulary(tokenizer: ChatTokenizer) -> LLTokenizer:
    found = _vocabularies.get(tokenizer)
    if found is None:
        from llguidance import LLTokenizer

        described = _with_unspoken_names(json.loads(tokenizer.tokenizer.to_str()))
        stops = sorted(tokenizer.stop_tokens)
        found = LLTokenizer(json.dumps(described), eos_token=stops or None)
        _vocabularies[tokenizer] = found
    return found


def _with_unspoken_names(described: dict[str, Any]) -> dict[str, Any]:
    """Added tokens under names that no text contains.

    A key or choice may spell "</think>". Cut into tokens by its name, that would be the token
    itself, which is no text, and the library would force what its own grammar then refuses.
    """
    names: dict[str, str] = {}
    for token in described.get("added_tokens") or ():
        name = names[token["content"]] = f"\0{token['id']}\0"
        token.update(content=name, special=True, normalized=False)
    words = described["model"].get("vocab")
    if isinstance(words, dict):
        described["model"]["vocab"] = {names.get(word, word): id for word, id in words.items()}
    elif isinstance(words, list):
        described["model"]["vocab"] = [[names.get(word, word), score] for word, score in words]
    return described
