"""The right reply of a dialogue in the model's own words, and the one that it gives itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.decode.loop import Generation
from flash_moe.engine import Engine
from flash_moe.errors import OptionError
from flash_moe.evaluation.cost import Cost, Meter
from flash_moe.evaluation.held_out import Dialogue
from flash_moe.grammar.grammar import Grammar

# A right reply is far shorter; a random model never stops.
MAX_TOKENS = 256


class Expected(NamedTuple):
    """`offsets` are where each id of the reply begins and ends in its text."""

    prompt: list[int]
    reply: list[int]
    text: str
    offsets: Sequence[tuple[int, int]]


class Given(NamedTuple):
    """What the model replies, and the end of the prompt it replies to. `cost` is of the tokens
    after the first, which comes with the prompt."""

    text: str
    asked: str
    cost: Cost
    masses: list[float]
    forced: int


def expected(engine: Engine, dialogue: Dialogue) -> Expected:
    """The prompt, and the right reply up to the token that ends it: what the template makes of the
    conversation with the reply, less what it makes of it without."""
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
    text = whole[len(start) :]
    prompt, reply = (
        tokenizer.tokenizer.encode(part, add_special_tokens=False) for part in (start, text)
    )
    ids = _ended(reply.ids, tokenizer.stop_tokens)
    return Expected(prompt.ids, ids, text, reply.offsets[: len(ids)])


def greedy(engine: Engine, dialogue: Dialogue, grammar: Grammar | None = None) -> Given:
    """With special tokens, since some formats of tool calls are made of them."""
    prompt = engine.tokenizer.encode_chat(dialogue.messages, **_variables(dialogue))
    reply = Generation(
        engine.model,
        prompt,
        max_tokens=MAX_TOKENS,
        stop_tokens=engine.tokenizer.stop_tokens,
        constraint=None if grammar is None else grammar.constraint(prompt),
    )
    words = iter(reply)
    tokens = [token for token in [next(words, None)] if token is not None]
    meter = Meter(engine.model.streamer)
    tokens += words
    cost = meter.cost(max(reply.stats.generated_tokens - 1, 0))
    text, asked = (
        engine.tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
        for ids in (tokens, prompt)
    )
    return Given(text, asked, cost, reply.allowed_masses, reply.stats.forced_tokens)


def grammar_of(engine: Engine, dialogue: Dialogue, form: ToolFormat | None) -> Grammar | None:
    """The schema that the reply is judged by, or the tools that there are to call."""
    if "schema" in dialogue.check:
        return Grammar.for_schema(engine.tokenizer, dialogue.check["schema"])
    if dialogue.tools:
        return Grammar.for_tools(engine.tokenizer, dialogue.tools, form)
    return None


def _variables(dialogue: Dialogue) -> dict[str, Any]:
    return {"tools": dialogue.tools or None, "enable_thinking": dialogue.thinking}


def _ended(reply: list[int], stops: frozenset[int]) -> list[int]:
    """Templates go on after the stop token, with a line break: no model ever says that."""
    last = max((at for at, token in enumerate(reply) if token in stops), default=len(reply) - 1)
    return reply[: last + 1]
