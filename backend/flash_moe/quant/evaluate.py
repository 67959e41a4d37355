"""How good a loaded model is: what it foresees, and what it replies, on data that it never saw.

One item after the other, in the data's order, greedily, through the code that replies to users.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flash_moe.chat.grammar import Grammar
from flash_moe.chat.tool_calls import ToolFormat, tool_format
from flash_moe.engine import Engine
from flash_moe.errors import OptionError
from flash_moe.model.decode import Generation
from flash_moe.quant.held_out import Dialogue, HeldOut
from flash_moe.quant.judge import Verdict, answer, judge
from flash_moe.quant.likelihood import Surprise, text_nats, token_nats
from flash_moe.quant.routing import Routing

# A right reply is far shorter; a random model never stops.
MAX_TOKENS = 256


@dataclass(slots=True)
class Evaluation:
    """What was found so far."""

    held_out: HeldOut
    routing: Routing
    texts: dict[str, Surprise] = field(default_factory=dict)
    replies: dict[str, Surprise] = field(default_factory=dict)
    verdicts: list[tuple[Dialogue, Verdict]] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "items": len(self.held_out),
            "seconds": round(self.seconds, 2),
            **({"text": self._perplexities(self.texts, "sources")} if self.texts else {}),
            **self._sections(),
            **({"replies": self._perplexities(self.replies, "kinds")} if self.replies else {}),
            "routing": self.routing.summary(),
        }

    def _perplexities(self, parts: dict[str, Surprise], by: str) -> dict[str, Any]:
        return {
            **_total(parts.values()).to_json(),
            by: {name: part.to_json() for name, part in parts.items()},
        }

    def _sections(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for section in dict.fromkeys(dialogue.section for dialogue, _ in self.verdicts):
            inside = [(d, v) for d, v in self.verdicts if d.section == section]
            kinds = dict.fromkeys(dialogue.kind for dialogue, _ in inside)
            found[section] = {
                **shares(verdict for _, verdict in inside),
                "kinds": {kind: shares(v for d, v in inside if d.kind == kind) for kind in kinds},
            }
        return found


def evaluate(
    engine: Engine,
    held_out: HeldOut,
    progress: Callable[[int], None] = lambda items: None,
    *,
    constrained: bool = False,
) -> Evaluation:
    """Measure everything in `held_out`; `progress` is told of every item that is done.
    `constrained` holds replies to the schema that they are judged by, and calls to the tools."""
    start = time.perf_counter()
    form = tool_format(engine.model.path, engine.tokenizer) if held_out.dialogues else None
    found = Evaluation(held_out, Routing(engine.model.streamer))
    for text in held_out.texts:
        with found.routing.watching():
            measured = text_nats(engine.model, engine.tokenizer, text.text)
        found.texts.setdefault(text.source, Surprise()).add(*measured)
        progress(1)
    for dialogue in held_out.dialogues:
        _measure(engine, dialogue, form, found, constrained)
        progress(1)
    found.seconds = time.perf_counter() - start
    return found


def _measure(
    engine: Engine,
    dialogue: Dialogue,
    form: ToolFormat | None,
    found: Evaluation,
    constrained: bool,
) -> None:
    with found.routing.watching():
        prompt, reply = expected(engine, dialogue)
        nats = token_nats(engine.model, engine.tokenizer, [*prompt, *reply], len(prompt))
    found.replies.setdefault(dialogue.kind, Surprise()).add(nats, len(reply))
    grammar = _grammar(engine, dialogue, form) if constrained else None
    text = answer(*greedy(engine, dialogue, grammar))
    found.verdicts.append((dialogue, judge(text, dialogue.check, dialogue.tools, form)))


def _grammar(engine: Engine, dialogue: Dialogue, form: ToolFormat | None) -> Grammar | None:
    if "schema" in dialogue.check:
        return Grammar.for_schema(engine.tokenizer, dialogue.check["schema"])
    if dialogue.tools:
        return Grammar.for_tools(engine.tokenizer, dialogue.tools, form)
    return None


def greedy(engine: Engine, dialogue: Dialogue, grammar: Grammar | None = None) -> tuple[str, str]:
    """What the model replies, and the end of the prompt it replies to.

    With special tokens, since some formats of tool calls are made of them.
    """
    prompt = engine.tokenizer.encode_chat(dialogue.messages, **_variables(dialogue))
    reply = Generation(
        engine.model,
        prompt,
        max_tokens=MAX_TOKENS,
        stop_tokens=engine.tokenizer.stop_tokens,
        constraint=None if grammar is None else grammar.constraint(prompt),
    )
    decode = engine.tokenizer.tokenizer.decode
    return decode(list(reply), skip_special_tokens=False), decode(prompt, skip_special_tokens=False)


def expected(engine: Engine, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and of the right reply up to the token that ends it: what the
    template makes of the conversation with the reply, less what it makes of it without."""
    template, tokenizer = engine.tokenizer.template, engine.tokenizer
    if template is None:
        raise OptionError("The model has no chat template: measure it with --only text.")
    variables = _variables(dialogue)
    whole = template.render(
        [*dialogue.messages, dialogue.reply], add_generation_prompt=False, **variables
    )
    # Some templates do not open the assistant's turn as they write it: then all of it is foreseen.
    for opened in (True, False):
        start = template.render(dialogue.messages, add_generation_prompt=opened, **variables)
        if whole.startswith(start):
            break
    else:
        raise OptionError(
            "The model's chat template writes earlier turns anew when a reply is added, so that "
            "the reply has no place of its own: measure the model with --only text."
        )
    prompt, reply = (
        tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        for text in (start, whole[len(start) :])
    )
    return prompt, _ended(reply, tokenizer.stop_tokens)


def shares(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Of every name in the verdicts: how many have it, how many of them say yes, and the share."""
    found: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, yes in verdict.items():
            found.setdefault(name, []).append(yes)
    return {name: _share(sum(answers), len(answers)) for name, answers in found.items()}


def _share(yes: int, of: int) -> dict[str, Any]:
    share = yes / of
    return {"share": share, "standard_error": math.sqrt(share * (1 - share) / of), "of": of}


def _variables(dialogue: Dialogue) -> dict[str, Any]:
    return {"tools": dialogue.tools or None, "enable_thinking": dialogue.thinking}


def _ended(reply: list[int], stops: frozenset[int]) -> list[int]:
    """Templates go on after the stop token, with a line break: no model ever says that."""
    last = max((at for at, token in enumerate(reply) if token in stops), default=len(reply) - 1)
    return reply[: last + 1]


def _total(parts: Iterable[Surprise]) -> Surprise:
    total = Surprise()
    for part in parts:
        total.nats += part.nats
        total.tokens += part.tokens
        total.nbytes += part.nbytes
    return total
