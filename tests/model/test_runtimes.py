"""Every runtime that this machine has, and Metal under the emulator, against plain MLX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from flash_moe.decode.loop import Generation
from flash_moe.errors import OptionError, UnsupportedModel
from flash_moe.kernels.native import Native, Resident
from flash_moe.kernels.runtime import Runtime, choose
from flash_moe.model import load as loading
from flash_moe.model.install import heads, refuse_narrow
from flash_moe.model.load import Settings, StreamedModel, load
from flash_moe.model.mixture import StreamedMixture
from flash_moe.model.native_linear import NativeLinear
from flash_moe.synth.model import SHAPES, synthesize
from tests.architectures import random_model, write_checkpoint
from tests.kernels.devices import KIND, ON_GPU, kernels_run

# Of the largest logit. Four to eight layers of float32 rounding come to 1e-5 to 1e-4.
TOLERANCE = 1e-3
PROMPT = [7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99] * 4
TOKENS = 200
RUNTIMES = [KIND] if ON_GPU else ["native", "emulated Metal"]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that `make demo` runs, made as it makes it."""
    path = tmp_path_factory.mktemp("small") / "model"
    synthesize(path, SHAPES["small"])
    return path


@contextmanager
def running(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings whose kernels can run within."""
    with ExitStack() as stack:
        if name == "emulated Metal":
            # Real kernels, really launched; only the question whether there is a GPU is not asked.
            monkeypatch.setattr(loading, "choose", lambda wish: Runtime("metal", "emulated"))
            stack.enter_context(kernels_run())
        yield Settings(runtime="auto" if name == "emulated Metal" else name)


def assert_close(got: mx.array, expected: mx.array) -> None:
    difference = mx.abs(got - expected).max().item()
    largest = mx.abs(expected).max().item()
    assert difference <= TOLERANCE * largest, f"differs by {difference} of {largest}"


def logits(model: StreamedModel) -> list[mx.array]:
    """Of a prompt at once, of three in a batch, and of one token after another."""
    tokens = mx.array(PROMPT)[None]
    found = [model(tokens), model(tokens.reshape(4, 11)[:3])]
    cache = model.make_cache()
    steps = [model(tokens[:, :-3], cache=cache)]
    steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(len(PROMPT) - 3, len(PROMPT))]
    return [*found, mx.concatenate(steps, axis=1)]


@pytest.mark.parametrize("bank_bytes", [1, 1 << 28], ids=["groups", "at once"])
@pytest.mark.parametrize("name", RUNTIMES)
def test_logits_are_plain_mlxs(
    name: str, bank_bytes: int, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(demo_folder, Settings(runtime="mlx", bank_bytes=bank_bytes))
    expected = logits(plain)
    with running(name, monkeypatch) as settings:
        model = load(demo_folder, replace(settings, bank_bytes=bank_bytes))
        assert any(isinstance(m, StreamedMixture) for _, m in model.model.named_modules())
        for got, wanted in zip(logits(model), expected, strict=True):
            assert_close(got, wanted)
        model.streamer.bank.check()
        model.close()
    plain.close()


@pytest.mark.parametrize("name", RUNTIMES)
def test_greedy_tokens_are_plain_mlxs(
    name: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(small, Settings(runtime="mlx"))
    expected = list(Generation(plain, PROMPT, max_tokens=TOKENS))
    assert len(set(expected)) > 50
    with running(name, monkeypatch) as settings:
        model = load(small, settings)
        # The emulator takes 0.15 s a token.
        tokens = 60 if "emulated" in name else TOKENS
        generation = Generation(model, PROMPT, max_tokens=tokens)
        assert list(generation) == expected[:tokens]
        assert generation.stats.runtime == name.split()[-1].lower()
        model.close()
    plain.close()


@pytest.mark.skipif(ON_GPU, reason="MLX is lazy there")
def test_prefill_computes_no_logits(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel is eager, and the 397B has 248,320 words."""
    model = load(small, Settings(runtime="native"))
    (head,) = heads(model.model)
    computed: list[tuple[int, int]] = []
    matmul = Native.matmul

    def counted(self: Native, matrix: Resident, x: np.ndarray) -> np.ndarray:
        computed.append((matrix.rows, x.size // matrix.columns))
        return matmul(self, matrix, x)

    monkeypatch.setattr(Native, "matmul", counted)
    assert len(list(Generation(model, PROMPT, max_tokens=3, chunk=16))) == 3
    assert [tokens for rows, tokens in computed if rows == head.rows] == [1, 1, 1]
    assert any(tokens == 16 for rows, tokens in computed if rows != head.rows)
    model.close()


@pytest.mark.skipif(ON_GPU, reason="MLX is lazy there")
def test_prefill_skips_nothing_but_the_head(tmp_path: Path) -> None:
    """Not even a matrix of as many rows as there are words: here, that of the queries."""
    shape = replace(SHAPES["small"], experts=8, heads=16, head_dim=64)
    synthesize(tmp_path / "model", shape)
    tokens = {}
    for runtime in ("mlx", "native"):
        model = load(tmp_path / "model", Settings(runtime=runtime))
        rows = [m.rows for _, m in model.model.named_modules() if isinstance(m, NativeLinear)]
        tokens[runtime] = list(Generation(model, PROMPT, max_tokens=12, chunk=16))
        model.close()
    assert rows.count(shape.vocabulary) > 1
    assert tokens["native"] == tokens["mlx"]


@pytest.mark.skipif(ON_GPU, reason="a limit of MLX on the CPU")
def test_what_mlx_cannot_compute_on_a_cpu_is_refused(tmp_path: Path) -> None:
    model, config = random_model("qwen3_moe")
    model.set_dtype(mx.bfloat16)
    write_checkpoint(model, config, tmp_path / "model")
    with pytest.raises(OptionError, match="Choose auto"):
        load(tmp_path / "model", Settings(runtime="mlx"))
    widened = load(tmp_path / "model")
    model.set_dtype(mx.float32)
    tokens = mx.array(PROMPT)[None] % 100
    assert_close(widened(tokens), model(tokens))
    widened.close()


@pytest.mark.skipif(ON_GPU, reason="the CPU's choice")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_computes_16_bit_checkpoints_in_float32(dtype: str, tmp_path: Path) -> None:
    """And nothing but rounding comes of it: the same weights, widened on disk, are as close."""
    from mlx_lm.utils import load_model

    synthesize(tmp_path / "model", replace(SHAPES["small"], layers=4, experts=16), dtype=dtype)
    model = load(tmp_path / "model")
    assert choose().widen
    got = model(mx.array(PROMPT)[None])
    assert got.dtype == mx.float32
    linears = [m for _, m in model.model.named_modules() if isinstance(m, NativeLinear)]
    assert linears
    # As they are on disk: the native kernel reads scales of any type.
    assert {m.scales.dtype for m in linears} == {getattr(mx, dtype)}
    resident, _ = load_model(tmp_path / "model")
    resident.set_dtype(mx.float32)
    assert_close(got, resident(mx.array(PROMPT)[None]))
    model.close()


def test_plain_mlx_is_what_mlx_lm_gives_to_the_bit(demo_folder: Path) -> None:
    from mlx_lm.utils import load_model

    resident, _ = load_model(demo_folder)
    model = load(demo_folder, Settings(runtime="mlx"))
    assert model.runtime.name == "mlx"
    tokens = mx.array(PROMPT)[None]
    assert np.array_equal(np.array(model(tokens)), np.array(resident(tokens)))
    model.close()


def test_what_mlx_computes_wrongly_on_cuda_is_refused(demo_folder: Path) -> None:
    from mlx_lm.utils import load_model

    wide, _ = load_model(demo_folder)
    refuse_narrow(wide)
    wide.narrow = nn.QuantizedLinear.from_linear(nn.Linear(64, 32), group_size=64, bits=4)
    with pytest.raises(UnsupportedModel, match="narrow is too narrow"):
        refuse_narrow(wide)


@pytest.mark.parametrize("wish", ["Metal", "", "gpu"])
def test_an_unknown_runtime_is_refused(wish: str) -> None:
    with pytest.raises(OptionError, match="choose auto, metal, cuda, native, mlx"):
        choose(wish)


def test_a_runtime_of_another_machine_is_refused() -> None:
    there = choose().name
    for wish in {"metal", "cuda", "native"} - {there}:
        with pytest.raises(OptionError, match=f"choose auto or {there} or mlx. It "):
            choose(wish)
