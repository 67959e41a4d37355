"""What measuring costs, counted; and what grammars leave allowed, against the masks themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.decode.constrained import Guide
from flash_moe.decode.loop import Generation
from flash_moe.decode.statistics import Stats
from flash_moe.engine import Engine
from flash_moe.evaluation import likelihood, replies
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.evaluate import Wanted, evaluate
from flash_moe.evaluation.findings import allowed
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.likelihood import token_nats
from flash_moe.evaluation.replies import grammar_of, greedy
from flash_moe.grammar.constraints import Constraint, Mask
from flash_moe.grammar.grammar import Grammar
from flash_moe.kernels.gpu import U32
from flash_moe.model.load import Settings
from tests.evaluation.data import SCHEMA, write_data


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Iterator[Engine]:
    engine = Engine.load(demo_folder, Settings(), prefix=None)
    yield engine
    engine.close()


@pytest.mark.parametrize(("first", "chunk"), [(1, 16), (48, 16), (50, 51), (7, 1000)])
def test_a_chunk_reads_an_expert_once(
    engine: Engine, first: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that a prompt ends in, and whose logits are looked at a few at a time."""
    monkeypatch.setattr(likelihood, "prefill_chunk", lambda model: chunk)
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 3 * 4 * 2048)
    streamer = engine.model.streamer
    calls: list[int] = []
    ids = np.random.default_rng(0).integers(500, size=60).tolist()

    def watch(layer: int, chosen: U32) -> None:
        calls.append(len(np.unique(chosen)))

    streamer.watch = watch
    before = streamer.reader.counters.experts
    told: list[int] = []
    try:
        token_nats(engine.model, ids, first, lambda log, targets: told.extend(targets))
    finally:
        streamer.watch = None
    assert told == ids[first:]
    assert len(calls) == engine.model.plan.layers * -(-59 // chunk)
    assert streamer.reader.counters.experts - before == sum(calls)


@pytest.mark.parametrize("settings", [Settings(), Settings(prefer_cached=0.2)])
def test_what_is_foreseen_is_computed_as_a_reply_is(settings: Settings, demo_folder: Path) -> None:
    """Whatever was computed before; and a prompt as a prompt, where that makes a difference."""
    engine = Engine.load(demo_folder, settings, prefix=None)
    streamer, seen = engine.model.streamer, list[tuple[str, int]]()
    streamer.watch = lambda layer, chosen: seen.append((streamer.occasion, len(chosen)))
    ids = np.random.default_rng(0).integers(500, size=60).tolist()
    for first, whole, apart in (
        (1, [("reply", 59)], [("reply", 59)]),
        (40, [("reply", 59)], [("prompt", 39), ("reply", 20)]),
    ):
        seen.clear()
        streamer.occasion = "grammar"
        token_nats(engine.model, ids, first)
        layers = engine.model.plan.layers
        assert seen[::layers] == (apart if settings.prefer_cached else whole)
    engine.close()


def test_chunks_whose_logits_would_be_too_many(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = likelihood.prefill_chunk(engine.model)
    assert likelihood._chunk(engine.model) == whole
    words = engine.model.config["text_config"]["vocab_size"]
    monkeypatch.setattr(likelihood, "CHUNK_LOGIT_BYTES", 4 * words * 40)
    assert likelihood._chunk(engine.model) == 40 < whole


def test_replies_read_what_their_tokens_use(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, a token reads its K experts in each layer; the first comes with the prompt."""
    monkeypatch.setattr(replies, "MAX_TOKENS", 5)
    dialogue = read_held_out(write_data(tmp_path / "data"), ["json"]).dialogues[0]
    given = greedy(engine, dialogue)
    assert given.cost.tokens == 4
    assert given.cost.expert_bytes == 4 * engine.model.plan.token_bytes
    assert (given.masses, given.forced) == ([], 0)
    monkeypatch.setattr(replies, "MAX_TOKENS", 1)
    assert (greedy(engine, dialogue).cost.tokens, greedy(engine, dialogue).cost.expert_bytes) == (
        0,
        0,
    )


def test_costs_add_up() -> None:
    cost = Cost()
    assert cost.to_json()["expert_bytes_per_token"] is None
    for _ in range(2):
        cost.add(Cost(tokens=5, seconds=0.5, expert_bytes=100))
    assert cost.to_json() == {
        "tokens": 10,
        "seconds": 1.0,
        "tokens_per_second": 10.0,
        "expert_bytes": 200,
        "expert_bytes_per_token": 20.0,
    }


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
    found: np.ndarray = powers / powers.sum()
    return found


def test_what_a_grammar_allows_is_what_its_masks_say(engine: Engine) -> None:
    """Of all logits, computed again at once."""
    prompt = engine.tokenizer.encode_chat([{"role": "user", "content": "?"}], enable_thinking=False)
    constraint = Grammar.for_schema(engine.tokenizer, SCHEMA).constraint(prompt)
    assert constraint is not None
    recorded = Recorded(constraint)
    reply = Generation(engine.model, prompt, max_tokens=9, constraint=recorded)
    ids = [*prompt, *reply]
    logits = np.array(engine.model(mx.array(ids)[None])[0])[len(prompt) - 1 : -1]
    wanted = [
        softmax(row)[: len(mask)][mask[: len(row)]].sum()
        for row, mask in zip(logits, recorded.masks, strict=True)
        if mask is not None
    ]
    assert len(wanted) == 9
    assert reply.allowed_masses == pytest.approx(wanted, rel=1e-4)
    assert reply.stats.allowed_mass == pytest.approx(np.mean(wanted), rel=1e-4)


class Masked:
    """Held to a mask, or to none."""

    finished = complete = True

    def __init__(self, mask: Mask | None) -> None:
        self._mask = mask

    def mask(self) -> Mask | None:
        return self._mask

    def accept(self, token: int) -> bool:
        return True

    def forced(self) -> list[int]:
        return []


@given(st.lists(st.tuples(st.floats(-30, 30), st.booleans()), min_size=1, max_size=40))
def test_allowed_mass_of_any_mask(words: list[tuple[float, bool]]) -> None:
    logits, mask = np.array([w for w, _ in words], np.float32), np.array([m for _, m in words])
    guide = Guide(Masked(mask), Stats())
    guide.restrict(mx.array(logits)[None])
    guide.accept(0)
    assert guide.masses == pytest.approx([softmax(logits)[mask].sum()], abs=1e-5)
    free = Guide(Masked(None), Stats())
    free.restrict(mx.array(logits)[None])
    free.accept(0)
    assert free.masses == []


def test_only_grammars_are_asked_what_they_allow(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "MAX_TOKENS", 14)
    data = read_held_out(write_data(tmp_path / "data"), ["json", "questions"], 1)
    assert "allowed_mass" not in evaluate(engine, data).to_json()
    found = evaluate(engine, data, wanted=Wanted(constrained=True)).to_json()["allowed_mass"]
    [asked] = [dialogue for dialogue in data.dialogues if dialogue.section == "json"]
    given = greedy(engine, asked, grammar_of(engine, asked, None))
    assert found["tokens"] == found["sections"]["json"]["tokens"] == len(given.masses) > 0
    assert found["forced_tokens"] == given.forced > 0
    assert 0 < found["p1"]["value"] <= found["mean"]["value"] < 1
    assert set(found["sections"]) == {"json"}


def test_mean_and_first_percentile() -> None:
    found = allowed([np.linspace(0.01, 1, 100), np.ones(100)])
    assert found["tokens"] == 200
    assert found["mean"]["value"] == pytest.approx((50.5 + 100) / 200)
    assert found["p1"]["value"] == pytest.approx(0.02)
    assert allowed([]) == {"tokens": 0}
