"""Log loss with teacher forcing, against mlx-lm's own model with all experts in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from flash_moe.engine import Engine
from flash_moe.evaluation.documents import make_document
from flash_moe.evaluation.held_out import Dialogue, Text, read_held_out
from flash_moe.evaluation.likelihood import LogLoss, chunk_tokens, token_nats
from flash_moe.evaluation.limits import DEFAULT_LIMITS, Limits
from flash_moe.evaluation.measure import Measurer
from flash_moe.evaluation.results import ItemResult
from flash_moe.evaluation.totals import perplexity_of
from flash_moe.kernels.spec import U32
from flash_moe.options import Settings
from tests.evaluation.data import TEXTS
from tests.evaluation.measuring import SHORT, documents_of, measured

TEXT = TEXTS[0]["text"]


@pytest.fixture(scope="module")
def exact(demo_folder: Path) -> Iterator[Engine]:
    """With mlx-lm's arithmetic."""
    engine = Engine.load(demo_folder, Settings(runtime="mlx"), prefix=None)
    yield engine
    engine.close()


def plain_nats(folder: Path, ids: list[int]) -> float:
    """Of all tokens but the first, by mlx-lm alone."""
    model, _ = load_model(folder)
    logits = np.array(model(mx.array(ids[:-1])[None])[0], np.float64)
    top = logits.max(-1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(-log[np.arange(len(ids) - 1), ids[1:]].sum())


def measured_text(engine: Engine, text: str, limits: Limits = DEFAULT_LIMITS) -> ItemResult:
    item = Text("prose", "a", text)
    document = make_document(engine.tokenizer, item, None, limits.window)
    return Measurer(engine, limits=limits).measure(document)


def test_log_loss_is_that_of_a_plain_forward(exact: Engine, demo_folder: Path) -> None:
    ids = exact.tokenizer.encode(TEXT)
    result = measured_text(exact, TEXT)
    assert result.tokens == len(ids) - 1
    assert result.nbytes == len(TEXT.encode()) - len(exact.tokenizer.decode(ids[:1]).encode())
    assert result.nats == pytest.approx(plain_nats(demo_folder, ids), rel=1e-5)


def test_windows_and_chunks_count_every_token_once(exact: Engine, demo_folder: Path) -> None:
    ids = exact.tokenizer.encode(TEXT)
    pieces = [ids[at : at + 17] for at in range(0, len(ids) - 1, 16)]
    assert len(pieces) > 2
    nats = sum(plain_nats(demo_folder, piece) for piece in pieces)
    result = measured_text(exact, TEXT, Limits(window=16, logit_bytes=5 * 4 * 2048))
    assert result.tokens == len(ids) - 1
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_texts_too_short_to_be_predicted(exact: Engine) -> None:
    result = measured_text(exact, "")
    assert (result.nats, result.tokens, result.nbytes) == (0.0, 0, 0)


def test_replies_are_predicted_given_their_prompt(
    exact: Engine, demo_folder: Path, data: Path
) -> None:
    held_out = read_held_out(data, ["questions", "tools"])
    nats: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for document in documents_of(exact, held_out):
        assert isinstance(document.item, Dialogue)
        (ids,), first, kind = map(list, document.pieces), document.first, document.item.kind
        own = plain_nats(demo_folder, ids) - plain_nats(demo_folder, ids[:first])
        nats[kind] = nats.get(kind, 0.0) + own
        tokens[kind] = tokens.get(kind, 0) + len(ids) - first
    replies = measured(exact, held_out).replies
    assert replies is not None
    for kind in ("sums", "tools"):
        perplexity = replies.parts[kind]
        assert perplexity.tokens == tokens[kind]
        mean = math.log(perplexity.perplexity.value)
        assert mean * tokens[kind] == pytest.approx(nats[kind], rel=1e-4)


@pytest.mark.parametrize(("first", "chunk"), [(1, 16), (48, 16), (50, 51), (7, 1000)])
def test_a_chunk_reads_an_expert_once(engine: Engine, first: int, chunk: int) -> None:
    """Also one in which a prompt ends, and whose logits are looked at a few at a time."""
    streamer = engine.model.streamer
    experts: list[int] = []
    ids = np.random.default_rng(0).integers(500, size=60).tolist()

    def observe(layer: int, chosen: U32) -> None:
        experts.append(len(np.unique(chosen)))

    streamer.observer = observe
    before = streamer.reader.counters.experts
    observed: list[int] = []
    try:
        token_nats(
            engine.model,
            ids,
            first,
            [lambda log_probabilities, targets: observed.extend(targets)],
            Limits(chunk_tokens=chunk, logit_bytes=3 * 4 * 2048),
        )
    finally:
        streamer.observer = None
    assert observed == ids[first:]
    assert len(experts) == engine.model.plan.layers * -(-59 // chunk)
    assert streamer.reader.counters.experts - before == sum(experts)


@pytest.mark.parametrize("settings", [Settings(), Settings(cache_tolerance=0.2)])
def test_predictions_are_computed_as_replies_are(settings: Settings, demo_folder: Path) -> None:
    """Whatever was computed before; and a prompt as a prompt, where that makes a difference."""
    engine = Engine.load(demo_folder, settings, prefix=None)
    streamer, seen = engine.model.streamer, list[tuple[str, int]]()
    streamer.observer = lambda layer, chosen: seen.append((streamer.phase, len(chosen)))
    ids = np.random.default_rng(0).integers(500, size=60).tolist()
    for first, together, apart in (
        (1, [("reply", 59)], [("reply", 59)]),
        (40, [("reply", 59)], [("prompt", 39), ("reply", 20)]),
    ):
        seen.clear()
        streamer.phase = "grammar"
        token_nats(engine.model, ids, first)
        layers = engine.model.plan.layers
        assert seen[::layers] == (apart if settings.cache_tolerance else together)
    engine.close()


def test_chunks_are_smaller_where_logits_would_be_too_many(engine: Engine) -> None:
    words = engine.model.config["text_config"]["vocab_size"]
    fewer = chunk_tokens(engine.model, Limits(chunk_logit_bytes=4 * words * 40))
    assert fewer == 40 < chunk_tokens(engine.model)


def test_standard_errors() -> None:
    """Of equally long documents it is that of their mean, times the perplexity."""
    nats = [1.0, 2.0, 4.0]
    perplexity, error = LogLoss(nats=[10 * n for n in nats], tokens=[10] * 3).perplexity
    spread = np.std(nats, ddof=1) / math.sqrt(3)
    assert perplexity == pytest.approx(math.exp(7 / 3))
    assert error == pytest.approx(math.exp(7 / 3) * spread)
    assert LogLoss(nats=[1.0], tokens=[1]).perplexity.standard_error is None


def test_perplexities_of_a_broken_model_are_json() -> None:
    broken = perplexity_of(LogLoss(nats=[math.nan, 1e9], tokens=[1, 1], nbytes=1)).to_json()
    json.dumps(broken, allow_nan=False)
    assert broken["perplexity"] is None


def test_the_limits_of_figures_stay() -> None:
    """Perplexities of other windows, and replies of another length, are other figures."""
    assert (DEFAULT_LIMITS.window, DEFAULT_LIMITS.max_tokens) == (1024, 256)
    assert SHORT.window == DEFAULT_LIMITS.window
