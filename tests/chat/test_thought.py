"""Thoughts: where they begin and end, and that they are free for as long as they may last."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer

from flash_moe.chat.thought import thought_of
from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.errors import OptionError
from flash_moe.grammar.constraints import Matching
from flash_moe.grammar.grammar import Grammar
from flash_moe.synth.tokenizer import TEMPLATE
from tests.grammar.test_grammar import (
    CLOSES,
    MADE,
    NUMBER,
    OPENS,
    STOP,
    STOPS,
    TOKENIZER,
    allowed,
    constraint,
    ids,
    new_tokenizer,
    prompt,
    say,
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (prompt(thinking=True), True),
        (prompt(thinking=False), False),
        (prompt("<think>", thinking=False), False),
        (prompt("</think>", thinking=True), True),
        ([OPENS, *ids("no turns")], True),
        (ids("no turns"), False),
    ],
)
def test_whether_a_prompt_ends_in_a_thought(said: list[int], expected: bool) -> None:
    thought = thought_of(TOKENIZER)
    assert thought is not None
    assert thought.is_open(said, STOPS) is expected
    assert (constraint(NUMBER, said).mask() is None) is expected


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
    thought = thought_of(new_tokenizer(template))
    assert thought is not None
    assert list(thought.closing) == ids(closing or "</think>")
    assert thought.closing[-len(thought.after) - 1] == CLOSES


def test_the_answer_is_held_after_the_thought_alone() -> None:
    held = constraint(NUMBER, prompt(thinking=True))
    say(held, ids("Tokens as they come, { and all."))
    assert (held.mask(), held.forced(), held.complete) == (None, [], False)
    say(held, [CLOSES])
    # What the template writes there; then the answer, without another thought.
    assert held.forced() == ids("\n\n")
    say(held, held.forced())
    say(held, held.forced())
    assert OPENS not in allowed(held)
    assert say(held, ids("7}")).finished


def test_a_turn_that_ends_in_its_thought_answers_all_the_same() -> None:
    held = constraint(NUMBER, prompt(thinking=True))
    say(held, ids("so"))
    assert not held.accept(STOP)
    assert held.forced() == ids("\n</think>\n\n")
    assert not held.complete


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_a_budget_closes_the_thought(budget: int) -> None:
    held = constraint(NUMBER, prompt(thinking=True), thinking_budget=budget)
    for _ in range(budget):
        assert held.forced() == []
        say(held, ids("a"))
    assert held.forced() == ids("\n</think>\n\n")
    # Cut in the middle, the rest stays forced.
    say(held, held.forced()[:1])
    assert held.forced() == ids("</think>\n\n")
    say(held, held.forced())
    assert allowed(held) == ids("{")


def test_a_budget_without_a_grammar() -> None:
    free = Grammar.free(TOKENIZER)
    assert not free.constrains
    assert free.constraint(prompt(thinking=True)) is None
    held = free.constraint(prompt(), thinking_budget=2)
    assert held is not None
    # A model that begins to think by itself.
    say(held, [*ids("well "), OPENS, *ids("a"), *ids("b")])
    assert held.forced() == ids("\n</think>\n\n")
    say(held, held.forced())
    assert (held.mask(), held.complete, held.finished) == (None, True, False)
    with pytest.raises(OptionError, match="thinking_budget=-1"):
        free.constraint(prompt(), thinking_budget=-1)


def test_a_model_that_does_not_think() -> None:
    plain = Tokenizer.from_str(MADE.json.replace("think>", "other>"))
    tokenizer = ChatTokenizer(plain, None, STOPS)
    assert thought_of(tokenizer) is None
    assert Grammar.free(tokenizer).constraint([1], thinking_budget=3) is None
    assert isinstance(Grammar.for_schema(tokenizer, NUMBER).constraint([1]), Matching)
