"""Thoughts: where they begin and end, and that nothing constrains them within their budget."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from flash_moe.chat.thought import find_thought
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Matching
from flash_moe.grammar.grammar import Grammar
from flash_moe.synth.tokenizer import TEMPLATE
from tests.grammar.stepping import (
    CLOSES,
    OPENS,
    STOP,
    STOPS,
    SYNTHETIC,
    TOKENIZER,
    accept,
    allowed,
    ids,
    new_tokenizer,
    prompt,
    schema_constraint,
)

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("prompt_ids", "expected"),
    [
        (prompt(thinking=True), True),
        (prompt(thinking=False), False),
        (prompt("<think>", thinking=False), False),
        (prompt("</think>", thinking=True), True),
        ([OPENS, *ids("no turns")], True),
        (ids("no turns"), False),
    ],
)
def test_whether_a_prompt_ends_in_a_thought(prompt_ids: list[int], expected: bool) -> None:
    thought = find_thought(TOKENIZER)
    assert thought is not None
    assert thought.is_open(prompt_ids, STOPS) is expected
    assert (schema_constraint(NUMBER, prompt_ids).mask() is None) is expected


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TEMPLATE, "\n</think>\n\n"),
        ("{% for m in messages %}{{ m.reasoning_content }}</think>{{ m.content }}{% endfor %}", ""),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "\n</think>\n\n"),
        ("{{ raise_exception('no') }}", "\n</think>\n\n"),
    ],
)
def test_a_thought_is_closed_as_the_template_does(template: str, closing: str) -> None:
    thought = find_thought(new_tokenizer(template))
    assert thought is not None
    assert list(thought.closing) == ids(closing or "</think>")
    assert thought.closing[-len(thought.after) - 1] == CLOSES


def test_the_schema_begins_after_the_thought() -> None:
    constraint = schema_constraint(NUMBER, prompt(thinking=True))
    accept(constraint, ids("Tokens as they come, { and all."))
    assert (constraint.mask(), constraint.forced(), constraint.complete) == (None, [], False)
    accept(constraint, [CLOSES])
    # The text that the template writes there; then the answer, without another thought.
    assert constraint.forced() == ids("\n\n")
    accept(constraint, constraint.forced())
    accept(constraint, constraint.forced())
    assert OPENS not in allowed(constraint)
    assert accept(constraint, ids("7}")).finished


def test_a_turn_that_ends_in_its_thought_answers_all_the_same() -> None:
    constraint = schema_constraint(NUMBER, prompt(thinking=True))
    accept(constraint, ids("so"))
    assert not constraint.accept(STOP)
    assert constraint.forced() == ids("\n</think>\n\n")
    assert not constraint.complete


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_thought(budget: int) -> None:
    constraint = schema_constraint(NUMBER, prompt(thinking=True), thinking_budget=budget)
    for _ in range(budget):
        assert constraint.forced() == []
        accept(constraint, ids("a"))
    assert constraint.forced() == ids("\n</think>\n\n")
    # After some of it, the rest stays forced.
    accept(constraint, constraint.forced()[:1])
    assert constraint.forced() == ids("</think>\n\n")
    accept(constraint, constraint.forced())
    assert allowed(constraint) == ids("{")


def test_a_budget_without_a_grammar() -> None:
    free = Grammar.free(TOKENIZER)
    assert not free.constrains
    assert free.constraint(prompt(thinking=True)) is None
    constraint = free.constraint(prompt(), thinking_budget=2)
    assert constraint is not None
    # A model that begins to think by itself.
    accept(constraint, [*ids("well "), OPENS, *ids("a"), *ids("b")])
    assert constraint.forced() == ids("\n</think>\n\n")
    accept(constraint, constraint.forced())
    assert (constraint.mask(), constraint.complete, constraint.finished) == (None, True, False)
    with pytest.raises(OptionError, match="thinking_budget=-1"):
        free.constraint(prompt(), thinking_budget=-1)


def test_a_model_that_does_not_think() -> None:
    plain = Tokenizer.from_str(SYNTHETIC.json.replace("think>", "other>"))
    tokenizer = ChatTokenizer(plain, None, STOPS)
    assert find_thought(tokenizer) is None
    assert Grammar.free(tokenizer).constraint([1], thinking_budget=3) is None
    assert isinstance(Grammar.for_schema(tokenizer, NUMBER).constraint([1]), Matching)
