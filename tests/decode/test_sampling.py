"""A token is chosen from the same logits as mlx-lm chooses it, with the same seed."""

from __future__ import annotations

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.decode.sampling import Sampler
from flash_moe.options import Sampling
from tests.decode.test_loop import mlx_lm_sampler

VOCABULARY = 300

# MLX compiles mlx-lm's filters anew for every number.
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_p=st.sampled_from([None, 0.0, 0.01, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([None, 0, 1, 20, VOCABULARY - 1]),
    min_p=st.sampled_from([None, 0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 2**63 - 1),
)


def logprobs(seed: int, dtype: mx.Dtype) -> mx.array:
    logits = 3 * mx.random.normal((1, VOCABULARY), key=mx.random.key(seed))
    return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(dtype)


@settings(max_examples=100, deadline=None)
@given(samplings, st.sampled_from([mx.float32, mx.bfloat16]), st.integers(0, 1000))
def test_tokens_of_a_seed_are_mlx_lms(sampling: Sampling, dtype: mx.Dtype, first: int) -> None:
    """For one token after another, each from other logits."""
    inputs = [logprobs(first + step, dtype) for step in range(6)]
    sampler = Sampler(sampling)
    tokens = [sampler(one).item() for one in inputs]
    mx.random.seed(sampling.seed or 0)
    theirs = mlx_lm_sampler(sampling)
    assert tokens == [theirs(one).item() for one in inputs]


@pytest.mark.parametrize("temperature", [None, 0.0])
def test_without_temperature_the_likeliest_token_is_chosen(temperature: float | None) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_k=5, seed=1))
    one = logprobs(1, mx.float32)
    assert [sampler(one).item() for _ in range(3)] == [mx.argmax(one).item()] * 3


@pytest.mark.parametrize("top_k", [VOCABULARY, VOCABULARY + 1, 1_000_000])
def test_top_k_of_the_whole_vocabulary_filters_nothing(top_k: int) -> None:
    inputs = [logprobs(step, mx.float32) for step in range(6)]
    tokens = []
    for k in (None, top_k):
        sampler = Sampler(Sampling(temperature=1.5, top_k=k, seed=9))
        tokens.append([sampler(one).item() for one in inputs])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("top_p", [1e-300, 1e-45, 1e-39, 1e-20, 1e-7])
def test_the_smallest_top_p_leaves_the_likeliest_token(top_p: float) -> None:
    """Where it is 0 in float32, mlx-lm reads beyond the end of the logits."""
    inputs = [logprobs(step, mx.float32) for step in range(6)]
    sampler = Sampler(Sampling(temperature=2.0, top_p=top_p, seed=9))
    assert [sampler(one).item() for one in inputs] == [mx.argmax(one).item() for one in inputs]
