"""The decode loop gives mlx-lm's tokens, stops when told to, and counts what it did."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path
from shutil import copytree
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model

from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.errors import CheckpointError, FlashMoeError, OptionError, Remedy
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Sampling, Settings
from flash_moe.synth.model import Shape, synthesize

PROMPT = [7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99]
VOCABULARY = 1100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decode") / "model"
    # No matrix of 64 columns: MLX 0.32.4 on CUDA computes those wrongly.
    shape = Shape(layers=4, experts=16, hidden=128, intermediate=128, vocabulary=VOCABULARY)
    synthesize(path, shape)
    return path


@pytest.fixture(scope="module")
def streamed(folder: Path) -> StreamedModel:
    return load(folder, Settings(bank_bytes=1))


def generation(
    model: StreamedModel,
    max_tokens: int,
    prompt: list[int] = PROMPT,
    chunk: int | None = None,
    **request: Any,
) -> Generation:
    return Generation(
        model, TokenRequest(prompt=prompt, max_tokens=max_tokens, **request), chunk=chunk
    )


@pytest.mark.parametrize("token", [-1, VOCABULARY, 12_047, 2**31])
def test_tokens_that_the_model_does_not_know(streamed: StreamedModel, token: int) -> None:
    """MLX would read what lies behind the embedding."""
    assert list(generation(streamed, 1, [0, VOCABULARY - 1]))
    with pytest.raises(CheckpointError, match=f"token {token}, and the model has {VOCABULARY}"):
        generation(streamed, 1, [7, token, 300])


def mlx_lm_tokens(folder: Path, count: int, sampling: Sampling) -> list[int]:
    """The same request to mlx-lm's own loop, everything resident."""
    model, _ = load_model(folder)
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    steps = generate_step(
        mx.array(PROMPT),
        model,
        max_tokens=count,
        sampler=mlx_lm_sampler(sampling),
        logits_processors=make_logits_processors(
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
        ),
    )
    return [int(token) for token, _ in steps]


def mlx_lm_sampler(sampling: Sampling) -> Any:
    return make_sampler(
        temp=sampling.temperature or 0.0,
        top_p=sampling.top_p or 0.0,
        top_k=sampling.top_k or 0,
        min_p=sampling.min_p or 0.0,
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3, presence_penalty=0.5),
        Sampling(frequency_penalty=1.0),
        Sampling(temperature=1.0, top_k=20, seed=11),
        Sampling(temperature=0.7, top_p=0.9, min_p=0.01, seed=5),
    ],
    ids=["greedy", "penalties", "frequency", "top k", "top p"],
)
def test_tokens_are_mlx_lms(folder: Path, streamed: StreamedModel, sampling: Sampling) -> None:
    expected = mlx_lm_tokens(folder, 40, sampling)
    assert list(generation(streamed, 40, sampling=sampling)) == expected


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 12), length=st.integers(1, len(PROMPT)))
def test_chunks_of_the_prompt_change_nothing(
    streamed: StreamedModel, chunk: int, length: int
) -> None:
    at_once = generation(streamed, 4, PROMPT[:length])
    in_chunks = generation(streamed, 4, PROMPT[:length], chunk)
    assert list(at_once) == list(in_chunks)


def test_a_stop_token_ends_the_reply_and_is_not_given(streamed: StreamedModel) -> None:
    tokens = list(generation(streamed, 12))
    stop = tokens[5]
    reply = generation(streamed, 12, stop_tokens=frozenset({stop}))
    assert list(reply) == tokens[: tokens.index(stop)]
    assert reply.stats.finish_reason == "stop"


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_cancelling_between_chunks_and_tokens(streamed: StreamedModel, calls: int) -> None:
    """With chunks of 5 there are 2 of them, then one question a token."""
    asked = []

    def cancelled() -> bool:
        asked.append(None)
        return len(asked) > calls

    reply = generation(streamed, 9, chunk=5, cancelled=cancelled)
    assert len(list(reply)) == max(0, calls - 2)
    assert reply.stats.finish_reason == "cancelled"
    assert len(asked) == calls + 1


def test_statistics_add_up(streamed: StreamedModel) -> None:
    steps: list[tuple[int, int]] = []
    reply = generation(streamed, 6, progress=lambda done, total: steps.append((done, total)))
    list(reply)
    stats, plan = reply.stats, streamed.plan
    assert (stats.prompt_tokens, stats.generated_tokens) == (len(PROMPT), 6)
    assert stats.finish_reason == "length"
    assert steps[-1] == (len(PROMPT), len(PROMPT))
    # Decoding reads K experts in every layer; the first token's forward pass is one of the six.
    decoded = 6 * plan.layers * plan.experts_per_token
    prefilled = stats.experts_read - decoded
    assert 0 < prefilled <= plan.layers * plan.experts
    assert stats.expert_bytes >= stats.experts_read * plan.record_bytes
    parts = (stats.io_seconds, stats.readback_seconds, stats.compute_seconds)
    assert all(part >= 0 for part in parts)
    assert stats.peak_rss_bytes > plan.bank_bytes
    assert (stats.experts_per_token, stats.bits) == (plan.experts_per_token, plan.bits)


def test_progress_tells_of_every_chunk_before_it_is_read(streamed: StreamedModel) -> None:
    steps: list[int] = []
    list(generation(streamed, 1, chunk=4, progress=lambda done, total: steps.append(done)))
    assert steps == [0, 4, 8, len(PROMPT)]


def test_logprobs_are_of_the_tokens(streamed: StreamedModel) -> None:
    reply = generation(streamed, 5, logprobs=3)
    tokens = list(reply)
    assert [entry.token for entry in reply.logprobs] == tokens
    for entry in reply.logprobs:
        values = [value for _, value in entry.likeliest]
        assert values == sorted(values, reverse=True)
        assert entry.likeliest[0] == (entry.token, entry.logprob)  # greedy
        assert len(values) == 3
        assert entry.logprob <= 0


def test_a_reply_without_logprobs_has_none(streamed: StreamedModel) -> None:
    reply = generation(streamed, 2)
    list(reply)
    assert reply.logprobs == []


def test_bad_requests_are_refused() -> None:
    with pytest.raises(OptionError, match="empty"):
        TokenRequest(prompt=[], max_tokens=1)
    with pytest.raises(OptionError, match="max_tokens"):
        TokenRequest(prompt=PROMPT, max_tokens=0)


# -- a generator of random numbers a reply --------------------------------------------------------

temperatures = st.sampled_from([0.3, 1.0, 2.0])
seeded = st.builds(Sampling, temperature=temperatures, seed=st.integers(0, 2**63 - 1))
samplings = seeded | st.builds(Sampling, temperature=st.none() | temperatures)
COUNT = 6


@settings(max_examples=25, deadline=None)
@given(first=seeded, other=samplings, turns=st.lists(st.booleans(), max_size=2 * COUNT))
def test_a_seed_gives_the_same_reply_however_replies_interleave(
    streamed: StreamedModel, first: Sampling, other: Sampling, turns: list[bool]
) -> None:
    alone = [list(generation(streamed, COUNT, sampling=sampling)) for sampling in (first, other)]
    tokens: list[list[int]] = [[], []]
    replies = [iter(generation(streamed, COUNT, sampling=sampling)) for sampling in (first, other)]
    for turn in turns:
        tokens[turn] += islice(replies[turn], 1)
    for own, reply in zip(tokens, replies, strict=True):
        own += reply
    assert tokens[0] == alone[0]
    if other.seed is not None or not other.temperature:
        assert tokens[1] == alone[1]


def test_others_of_the_process_do_not_change_a_seeded_reply(streamed: StreamedModel) -> None:
    """Nor does a reply change MLX's own generator."""
    sampling = Sampling(temperature=2.0, seed=3)
    alone = list(generation(streamed, 8, sampling=sampling))
    reply = iter(generation(streamed, 8, sampling=sampling))
    mx.random.seed(1)
    tokens = list(islice(reply, 3))
    numbers = mx.random.uniform(shape=(4,)).tolist()
    assert tokens + list(reply) == alone
    mx.random.seed(1)
    assert mx.random.uniform(shape=(4,)).tolist() == numbers


def test_replies_without_a_seed_differ_even_after_one_with_a_seed(
    streamed: StreamedModel,
) -> None:
    """With 30 tokens of a temperature of 2, equal ones by chance are out of the question."""

    def reply(seed: int | None) -> list[int]:
        return list(generation(streamed, 30, sampling=Sampling(temperature=2.0, seed=seed)))

    after_seeds = []
    for _ in range(3):
        assert reply(7) == reply(7)
        after_seeds.append(tuple(reply(None)))
    assert len(set(after_seeds)) == 3


# Numbers that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damaged", "where"),
    [
        (1, "the experts of layer 1 or the attention of layer 2"),
        (3, "the experts of layer 3 or after them"),
    ],
)
def test_damaged_experts_are_an_error_that_says_where(
    folder: Path, tmp_path: Path, damaged: int, where: str
) -> None:
    """All bits set: scales that are no numbers, as in a file that was not written to its end."""
    copy = tmp_path / "model"
    copytree(folder, copy)
    with closing(load(copy, Settings(bank_bytes=1))) as model:
        layer = model.streamer.store.layers[damaged]
        for run in layer.runs:
            with run.file.open("r+b") as file:
                for expert in range(layer.experts):
                    file.seek(run.base + expert * run.step)
                    file.write(b"\xff" * run.length)
        with pytest.raises(FlashMoeError, match=where) as raised:
            list(generation(model, 3))
        assert raised.value.remedy is Remedy.VERIFY


def test_the_first_layer_that_is_damaged_is_named(folder: Path) -> None:
    with closing(load(folder, Settings(bank_bytes=1))) as model:
        (norm,) = [
            module
            for name, module in model.model.named_modules()
            if name.endswith("layers.2.input_layernorm")
        ]
        norm.weight = norm.weight * float("inf")
        with pytest.raises(FlashMoeError, match="the attention of layer 2"):
            list(generation(model, 3))


# Loops -------------------------------------------------------------------------------------------


def test_a_reply_in_circles_ends(streamed: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of a real reply is what a model chooses; here it is chosen for it."""
    monkeypatch.setattr(Generation, "_next", lambda self, tokens, *rest: len(tokens) % 3)
    made = generation(streamed, 2000)
    assert len(list(made)) == 256
    assert made.stats.finish_reason == "loop"
    free = generation(streamed, 2000, stop_loops=False)
    assert len(list(free)) == 2000
    assert free.stats.finish_reason == "length"
