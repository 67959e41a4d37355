"""The right reply to a dialogue in the model's own tokens, and the reply that the model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.engine import Engine
from flash_moe.errors import OptionError, Remedy
from flash_moe.evaluation.cost import Cost, Meter
from flash_moe.evaluation.held_out import Dialogue
from flash_moe.evaluation.judge import Verdict, answer, judge
from flash_moe.grammar.grammar import Grammar


class RightReply(NamedTuple):
    """`offsets` are where each id of the reply begins and ends in its text."""

    prompt: list[int]
    reply: list[int]
    text: str
    offsets: Sequence[tuple[int, int]]


class ModelReply(NamedTuple):
    """What the model says, and the text of the prompt. `cost` is that of the tokens after the
    first, which comes with the prompt; `allowed_masses` and `forced_tokens` are the grammar's."""

    text: str
    prompt: str
    cost: Cost
    allowed_masses: list[float]
    forced_tokens: int


def right_reply(tokenizer: ChatTokenizer, dialogue: Dialogue) -> RightReply:
    """The prompt, and the right reply up to the token that ends it: the difference between the
    conversation rendered with the reply and without."""
    template = tokenizer.template
    if template is None:
        raise OptionError("The model has no chat template.", Remedy.EVALUATE_TEXTS_ONLY)
    variables = _variables(dialogue)
    conversation = template.render(
        [*dialogue.messages, dialogue.reply], add_generation_prompt=False, **variables
    )
    # Some templates open a turn that is to be written in another way than one that is written
    # already: then the reply's own opening is predicted, too.
    for opened in (True, False):
        start = template.render(dialogue.messages, add_generation_prompt=opened, **variables)
        if conversation.startswith(start):
            break
    else:
        raise OptionError(
            "The model's chat template changes earlier turns when a reply is added, so the tokens "
            "of the reply cannot be told apart.",
            Remedy.EVALUATE_TEXTS_ONLY,
        )
    text = conversation[len(start) :]
    prompt, reply = (
        tokenizer.tokenizer.encode(part, add_special_tokens=False) for part in (start, text)
    )
    ids = _until_stop(reply.ids, tokenizer.stop_tokens)
    return RightReply(prompt.ids, ids, text, reply.offsets[: len(ids)])


def greedy_reply(
    engine: Engine, dialogue: Dialogue, max_tokens: int, grammar: Grammar | None = None
) -> ModelReply:
    """With special tokens in the text, since some formats of tool calls consist of them."""
    prompt = engine.tokenizer.encode_chat(dialogue.messages, **_variables(dialogue))
    reply = Generation(
        engine.model,
        TokenRequest(
            prompt=prompt,
            max_tokens=max_tokens,
            stop_tokens=engine.tokenizer.stop_tokens,
            constraint=None if grammar is None else grammar.constraint(prompt),
        ),
    )
    tokens = iter(reply)
    ids = [token for token in [next(tokens, None)] if token is not None]
    meter = Meter(engine.model.streamer)
    ids += tokens
    cost = meter.cost(max(reply.stats.generated_tokens - 1, 0))
    decode = engine.tokenizer.tokenizer.decode
    text, prompt_text = (decode(part, skip_special_tokens=False) for part in (ids, prompt))
    return ModelReply(text, prompt_text, cost, reply.allowed_masses, reply.stats.forced_tokens)


def verdict_on(reply: ModelReply, dialogue: Dialogue, tool_format: ToolFormat | None) -> Verdict:
    text = answer(reply.text, reply.prompt)
    return judge(text, dialogue.check, dialogue.tools, tool_format)


def grammar_for(
    tokenizer: ChatTokenizer, dialogue: Dialogue, tool_format: ToolFormat | None
) -> Grammar | None:
    """For the schema that the reply is judged by, or for the tools that there are to call."""
    if "schema" in dialogue.check:
        return Grammar.for_schema(tokenizer, dialogue.check["schema"])
    if dialogue.tools:
        return Grammar.for_tools(tokenizer, dialogue.tools, tool_format)
    return None


def _variables(dialogue: Dialogue) -> dict[str, Any]:
    return {"tools": dialogue.tools or None, "enable_thinking": dialogue.thinking}


def _until_stop(reply: list[int], stops: frozenset[int]) -> list[int]:
    """Templates go on after the stop token, with a line break that no model ever writes."""
    last = max((at for at, token in enumerate(reply) if token in stops), default=len(reply) - 1)
    return reply[: last + 1]
