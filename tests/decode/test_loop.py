"""The decode loop gives mlx-lm's tokens, stops when told to, and counts what it did."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model

from flash_moe.decode.loop import Generation
from flash_moe.decode.sampling import Sampling
from flash_moe.errors import OptionError
from flash_moe.model.load import Settings, StreamedModel, load
from flash_moe.synth.model import Shape, synthesize

PROMPT = [7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decode") / "model"
    synthesize(path, Shape(layers=4, experts=16, hidden=128, intermediate=64, vocabulary=1100))
    return path


@pytest.fixture(scope="module")
def streamed(folder: Path) -> StreamedModel:
    return load(folder, Settings(bank_bytes=1))


def mlx_lm_tokens(folder: Path, count: int, sampling: Sampling) -> list[int]:
    """The same request to mlx-lm's own loop, everything resident."""
    model, _ = load_model(folder)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    steps = generate_step(
        mx.array(PROMPT),
        model,
        max_tokens=count,
        sampler=make_sampler(temp=sampling.temperature or 0.0, top_k=sampling.top_k or 0),
        logits_processors=make_logits_processors(
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
        ),
    )
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3, presence_penalty=0.5),
        Sampling(temperature=1.0, top_k=20, seed=11),
    ],
    ids=["greedy", "penalties", "sampled"],
)
def test_tokens_are_mlx_lms(folder: Path, streamed: StreamedModel, sampling: Sampling) -> None:
    expected = mlx_lm_tokens(folder, 40, sampling)
    assert list(Generation(streamed, PROMPT, max_tokens=40, sampling=sampling)) == expected


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 12), length=st.integers(1, len(PROMPT)))
def test_chunks_of_the_prompt_change_nothing(
    streamed: StreamedModel, chunk: int, length: int
) -> None:
    whole = Generation(streamed, PROMPT[:length], max_tokens=4)
    parts = Generation(streamed, PROMPT[:length], max_tokens=4, chunk=chunk)
    assert list(whole) == list(parts)


def test_a_stop_token_ends_the_reply_and_is_not_given(streamed: StreamedModel) -> None:
    tokens = list(Generation(streamed, PROMPT, max_tokens=12))
    stop = tokens[5]
    generation = Generation(streamed, PROMPT, max_tokens=12, stop_tokens=frozenset({stop}))
    assert list(generation) == tokens[: tokens.index(stop)]
    assert generation.stats.finish_reason == "stop"


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_cancelling_between_chunks_and_tokens(streamed: StreamedModel, calls: int) -> None:
    """With chunks of 5 there are 2 of them, then one question a token."""
    asked = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > calls

    generation = Generation(streamed, PROMPT, max_tokens=9, chunk=5, cancelled=cancelled)
    assert len(list(generation)) == max(0, calls - 2)
    assert generation.stats.finish_reason == "cancelled"
    assert len(asked) == calls + 1


def test_statistics_add_up(streamed: StreamedModel) -> None:
    generation = Generation(streamed, PROMPT, max_tokens=6)
    seen: list[tuple[int, int]] = []
    generation._progress = lambda done, total: seen.append((done, total))
    list(generation)
    stats, plan = generation.stats, streamed.plan
    assert (stats.prompt_tokens, stats.generated_tokens) == (len(PROMPT), 6)
    assert stats.finish_reason == "length"
    assert seen[-1] == (len(PROMPT), len(PROMPT))
    # Decoding reads K experts in every layer; the first token's forward pass is one of the six.
    decoded = 6 * plan.layers * plan.experts_per_token
    prefilled = stats.experts_read - decoded
    assert 0 < prefilled <= plan.layers * plan.experts
    assert stats.expert_bytes >= stats.experts_read * plan.record_bytes
    parts = (stats.io_seconds, stats.readback_seconds, stats.compute_seconds)
    assert all(part >= 0 for part in parts)
    assert stats.peak_rss_bytes > plan.bank_bytes


def test_bad_requests_are_refused(streamed: StreamedModel) -> None:
    with pytest.raises(OptionError, match="empty"):
        Generation(streamed, [], max_tokens=1)
    with pytest.raises(OptionError, match="max_tokens"):
        Generation(streamed, PROMPT, max_tokens=0)
    for name, value in {"temperature": -1, "top_p": 2, "seed": -1, "min_p": float("nan")}.items():
        with pytest.raises(OptionError, match=name):
            Sampling(**{name: value})
