"""A tokenizer's vocabulary in llguidance's form, built once for each tokenizer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from flash_moe.chat.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    # Importing it loads a library of 8 MB that most replies do not need.
    from llguidance import LLTokenizer

# llguidance takes 2.9 s and 119 MB for a vocabulary of 248,000.
_vocabularies: WeakKeyDictionary[ChatTokenizer, LLTokenizer] = WeakKeyDictionary()


def vocabulary(tokenizer: ChatTokenizer) -> LLTokenizer:
    cached = _vocabularies.get(tokenizer)
    if cached is not None:
        return cached
    from llguidance import LLTokenizer

    definition = _with_private_names(json.loads(tokenizer.tokenizer.to_str()))
    stops = sorted(tokenizer.stop_tokens)
    new = LLTokenizer(json.dumps(definition), eos_token=stops or None)
    _vocabularies[tokenizer] = new
    return new


def _with_private_names(definition: dict[str, Any]) -> dict[str, Any]:
    """The added tokens under names that no text contains.

    A key or choice may spell "</think>". By its name it would be tokenized as the special token,
    which is not text, so llguidance would force a token that its own grammar then refuses.
    """
    names: dict[str, str] = {}
    for token in definition.get("added_tokens") or ():
        name = names[token["content"]] = f"\0{token['id']}\0"
        token.update(content=name, special=True, normalized=False)
    words = definition["model"].get("vocab")
    if isinstance(words, dict):
        definition["model"]["vocab"] = {names.get(word, word): id for word, id in words.items()}
    elif isinstance(words, list):
        definition["model"]["vocab"] = [[names.get(word, word), score] for word, score in words]
    return definition
