"""Right replies as the model's template writes them, and the model's own, with grammars or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.chat.tool_calls import find_tool_format
from flash_moe.decode.constrained import ConstraintStepper
from flash_moe.decode.constraint import Constraint, Mask
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.decode.statistics import Stats
from flash_moe.engine import Engine
from flash_moe.errors import OptionError, Remedy
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.replies import (
    ModelReply,
    grammar_for,
    greedy_reply,
    right_reply,
    verdict_on,
)
from flash_moe.evaluation.totals import allowed_mass, shares
from flash_moe.grammar.grammar import Grammar
from tests.evaluation.data import SCHEMA
from tests.evaluation.measuring import SHORT, measured


def test_the_right_reply_is_what_the_template_adds(engine: Engine, data: Path) -> None:
    decode = engine.tokenizer.tokenizer.decode
    dialogues = read_held_out(data).dialogues
    rights = [right_reply(engine.tokenizer, dialogue) for dialogue in dialogues]
    replies = [decode(right.reply, skip_special_tokens=False) for right in rights]
    assert replies[0] == "2<|im_end|>"
    assert replies[1] == "Two and two.\n</think>\n\n4<|im_end|>"
    assert replies[4].startswith("<tool_call>\n<function=weather>\n<parameter=place>\nBonn\n")
    assert replies[4].endswith("</tool_call><|im_end|>")
    # The right reply is predicted after the same prompt that the model replies to.
    for dialogue, right in zip(dialogues, rights, strict=True):
        reply = greedy_reply(engine, dialogue, SHORT.max_tokens)
        assert decode(right.prompt, skip_special_tokens=False) == reply.prompt


def test_models_without_a_chat_template_have_no_right_reply(engine: Engine, data: Path) -> None:
    own = engine.tokenizer
    without = ChatTokenizer(own.tokenizer, None, own.stop_tokens)
    with pytest.raises(OptionError, match="no chat template") as caught:
        right_reply(without, read_held_out(data).dialogues[0])
    assert caught.value.remedy is Remedy.EVALUATE_TEXTS_ONLY


def test_right_replies_get_full_marks(engine: Engine, data: Path) -> None:
    tool_format = find_tool_format(engine.model.path, engine.tokenizer)
    decode = engine.tokenizer.tokenizer.decode
    verdicts: dict[str, list[dict[str, bool]]] = {}
    for dialogue in read_held_out(data).dialogues:
        right = right_reply(engine.tokenizer, dialogue)
        text = decode(right.reply, skip_special_tokens=False).removesuffix("<|im_end|>")
        prompt = decode(right.prompt, skip_special_tokens=False)
        reply = ModelReply(text, prompt, Cost(), [], 0)
        verdict = verdict_on(reply, dialogue, tool_format)
        verdicts.setdefault(dialogue.section, []).append(verdict)
    for section, names in (
        ("questions", ["right"]),
        ("json", ["valid", "schema", "equal"]),
        ("tools", ["parses", "names", "arguments"]),
    ):
        figures = shares(verdicts[section])
        assert list(figures) == names
        assert [share.share.value for share in figures.values()] == [1.0] * len(names)


def test_replies_read_what_their_tokens_use(engine: Engine, data: Path) -> None:
    """One by one, each token reads its K experts in each layer; the first comes with the prompt."""
    dialogue = read_held_out(data, ["json"]).dialogues[0]
    reply = greedy_reply(engine, dialogue, 5)
    assert reply.cost.tokens == 4
    assert reply.cost.expert_bytes == 4 * engine.model.plan.token_bytes
    assert (reply.allowed_masses, reply.forced_tokens) == ([], 0)
    one = greedy_reply(engine, dialogue, 1)
    assert (one.cost.tokens, one.cost.expert_bytes) == (0, 0)


class Recorded:
    """A constraint that notes its masks; without forcing, so that each is a forward pass."""

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint
        self.masks: list[Mask | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._constraint, name)

    def mask(self) -> Mask | None:
        self.masks.append(self._constraint.mask())
        return self.masks[-1]

    def forced(self) -> list[int]:
        return []


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    shares: np.ndarray = powers / powers.sum()
    return shares


def test_allowed_masses_are_what_the_masks_leave(engine: Engine) -> None:
    """Of all logits, computed again at once."""
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "?"}], enable_thinking=False)
    constraint = Grammar.for_schema(engine.tokenizer, SCHEMA).constraint(prompt)
    assert constraint is not None
    recorded = Recorded(constraint)
    request = TokenRequest(prompt=prompt, max_tokens=9, constraint=recorded)
    reply = Generation(engine.model, request)
    ids = [*prompt, *reply]
    logits = np.array(engine.model(mx.array(ids)[None])[0])[len(prompt) - 1 : -1]
    masses = [
        softmax(row)[: len(mask)][mask[: len(row)]].sum()
        for row, mask in zip(logits, recorded.masks, strict=True)
        if mask is not None
    ]
    assert len(masses) == 9
    assert reply.allowed_masses == pytest.approx(masses, rel=1e-4)
    assert reply.stats.allowed_mass == pytest.approx(np.mean(masses), rel=1e-4)


class Masked:
    """Held to a mask, or to none."""

    finished = complete = True

    def __init__(self, mask: Mask | None) -> None:
        self._mask = mask

    @property
    def holds(self) -> bool:
        return self._mask is not None

    def mask(self) -> Mask | None:
        return self._mask

    def accept(self, token: int) -> bool:
        return True

    def forced(self) -> list[int]:
        return []


@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=40))
def test_allowed_mass_of_any_mask(words: list[tuple[float, bool]]) -> None:
    logits, mask = np.array([w for w, _ in words], np.float32), np.array([m for _, m in words])
    stepper = ConstraintStepper(Masked(mask), Stats())
    stepper.restrict(mx.array(logits)[None])
    stepper.accept(0)
    assert stepper.allowed_masses == pytest.approx([softmax(logits)[mask].sum()], abs=1e-5)
    free = ConstraintStepper(Masked(None), Stats())
    free.restrict(mx.array(logits)[None])
    free.accept(0)
    assert free.allowed_masses == []


def test_only_grammars_have_an_allowed_mass(engine: Engine, data: Path) -> None:
    limits = replace(SHORT, max_tokens=14)
    held_out = read_held_out(data, ["json", "questions"], 1)
    assert measured(engine, held_out, limits).allowed_mass is None
    masses = measured(engine, held_out, limits, constrained=True).allowed_mass
    assert masses is not None
    [dialogue] = [one for one in held_out.dialogues if one.section == "json"]
    grammar = grammar_for(engine.tokenizer, dialogue, None)
    reply = greedy_reply(engine, dialogue, limits.max_tokens, grammar)
    total = masses.total
    assert total.tokens == masses.sections["json"].tokens == len(reply.allowed_masses) > 0
    assert masses.forced_tokens == reply.forced_tokens > 0
    assert total.p1 is not None
    assert total.mean is not None
    assert 0 < total.p1.value <= total.mean.value < 1
    assert set(masses.sections) == {"json"}


def test_mean_and_first_percentile() -> None:
    mass = allowed_mass([np.linspace(0.01, 1, 100), np.ones(100)])
    assert mass.tokens == 200
    assert mass.mean is not None
    assert mass.p1 is not None
    assert mass.mean.value == pytest.approx((50.5 + 100) / 200)
    assert mass.p1.value == pytest.approx(0.02)
    assert allowed_mass([]).to_json() == {"tokens": 0}
