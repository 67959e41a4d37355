"""A template is rendered once for every reply: with large tools, rendering takes a while."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash_moe.chat.template import Template
from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.engine import Engine
from flash_moe.model.load import load
from flash_moe.options import Request, Settings
from flash_moe.prefix.store import PrefixStore
from flash_moe.synth.tokenizer import TEMPLATE

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "thinking": {"thinking": True, "thinking_budget": 2},
    "schema": {"schema": SCHEMA},
    "tools": {"tools": [TOOL]},
    "both": {"schema": SCHEMA, "tools": [TOOL]},
}


class CountingTemplate(Template):
    renders = 0

    def render(self, messages: Sequence[dict[str, Any]], **variables: Any) -> str:
        self.renders += 1
        return super().render(messages, **variables)


@pytest.mark.parametrize("options", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("saves", [False, True], ids=["no prefix", "prefix"])
def test_a_reply_renders_its_template_once(
    demo_folder: Path, saves: bool, options: dict[str, Any]
) -> None:
    template = CountingTemplate(TEMPLATE, {})
    tokenizer = replace(load_tokenizer(demo_folder), template=template)
    model = load(demo_folder, Settings(bank_bytes=1))
    engine = Engine(model, tokenizer, PrefixStore.open(model, tokenizer) if saves else None)
    request = Request(messages=[{"role": "user", "content": "Hello"}], max_tokens=3, **options)
    renders = []
    for _ in range(3):
        before = template.renders
        list(engine.reply(request).events())
        renders.append(template.renders - before)
    # The first reply also learns how the template closes a thought.
    assert renders == [2, 1, 1]
    engine.close()
