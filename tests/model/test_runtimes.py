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
from mlx_lm.utils import load_model

from flash_moe.arrays import mlx_dtype
from flash_moe.decode.loop import Generation, TokenRequest
from flash_moe.errors import OptionError, UnsupportedModel
from flash_moe.kernels.native import Native
from flash_moe.kernels.native_backend import NativeLinear
from flash_moe.kernels.runtime import Runtime, choose_runtime
from flash_moe.kernels.structs import Resident
from flash_moe.model import load as loading
from flash_moe.model.families import FAMILIES
from flash_moe.model.install import refuse_narrow
from flash_moe.model.load import StreamedModel, load
from flash_moe.model.mixture import Mixture
from flash_moe.options import Settings
from flash_moe.synth.model import SHAPES, synthesize
from tests.architectures import random_model, write_checkpoint
from tests.devices import (
    GPU,
    RUNTIMES,
    assert_exact_on_cpu,
    needs_native,
    relative_difference,
)
from tests.kernels.devices import kernels_run

# Of the largest logit. Four to eight layers of float32 rounding come to 1e-5 to 1e-4.
TOLERANCE = 1e-3
PROMPT = [7, 300, 12, 45, 500, 9, 81, 33, 256, 18, 99] * 4
TOKENS = 200
# The emulator takes 0.15 s a token.
EMULATED, EMULATED_TOKENS = "emulated Metal", 60
KERNELS = [name for name in RUNTIMES if name != "mlx"] + ([] if GPU else [EMULATED])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape that users synthesize by default."""
    path = tmp_path_factory.mktemp("small") / "model"
    synthesize(path, SHAPES["small"])
    return path


@contextmanager
def running(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Settings of a runtime, whose kernels can run within."""
    with ExitStack() as stack:
        if name == EMULATED:
            # Real kernels, really launched; only the question whether there is a GPU is skipped.
            metal = Runtime("metal", "emulated")
            monkeypatch.setattr(loading, "choose_runtime", lambda runtime: metal)
            stack.enter_context(kernels_run())
        yield Settings(runtime="auto" if name == EMULATED else name)


def assert_close(got: mx.array, expected: mx.array) -> None:
    assert relative_difference(got, expected) <= TOLERANCE


def tokens_of(model: StreamedModel, count: int, chunk: int | None = None) -> list[int]:
    request = TokenRequest(prompt=PROMPT, max_tokens=count)
    return list(Generation(model, request, chunk=chunk))


def native_matrices(model: StreamedModel) -> list[NativeLinear]:
    return [m for _, m in model.model.named_modules() if isinstance(m, NativeLinear)]


def logits(model: StreamedModel) -> list[mx.array]:
    """Of a prompt at once, of three in a batch, and of one token after another."""
    tokens = mx.array(PROMPT)[None]
    at_once = [model(tokens), model(tokens.reshape(4, 11)[:3])]
    cache = model.make_cache()
    steps = [model(tokens[:, :-3], cache=cache)]
    steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(len(PROMPT) - 3, len(PROMPT))]
    return [*at_once, mx.concatenate(steps, axis=1)]


@pytest.mark.parametrize("bank_bytes", [1, 1 << 28], ids=["groups", "at once"])
@pytest.mark.parametrize("name", KERNELS)
def test_logits_are_plain_mlxs(
    name: str, bank_bytes: int, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(family, Settings(runtime="mlx", bank_bytes=bank_bytes))
    expected = logits(plain)
    with running(name, monkeypatch) as settings:
        model = load(family, replace(settings, bank_bytes=bank_bytes))
        blocks = [m for _, m in model.model.named_modules() if isinstance(m, Mixture)]
        assert len(blocks) == model.plan.layers
        assert all(type(block) in FAMILIES and block.fused for block in blocks)
        for got, right in zip(logits(model), expected, strict=True):
            assert_close(got, right)
        model.streamer.bank.check()
        model.close()
    plain.close()


def test_plain_mlx_gives_mlx_lms_logits(family: Path) -> None:
    """To the bit on a CPU: mlx-lm's own blocks stay where they are."""
    resident, _ = load_model(family)
    model = load(family, Settings(runtime="mlx"))
    assert model.runtime.name == "mlx"
    assert not any(isinstance(m, Mixture) for _, m in model.model.named_modules())
    tokens = mx.array(PROMPT)[None]
    assert_exact_on_cpu(model(tokens), resident(tokens), tolerance=TOLERANCE)
    model.close()


def assert_same_tokens(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    plain = load(folder, Settings(runtime="mlx"))
    expected = tokens_of(plain, TOKENS)
    plain.close()
    with running(name, monkeypatch) as settings:
        model = load(folder, settings)
        count = EMULATED_TOKENS if name == EMULATED else TOKENS
        assert tokens_of(model, count) == expected[:count]
        model.close()
    return expected


@pytest.mark.parametrize("name", KERNELS)
def test_greedy_tokens_are_plain_mlxs(
    name: str, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = assert_same_tokens(name, small, monkeypatch)
    assert len(set(expected)) > 50


@pytest.mark.parametrize("name", KERNELS)
def test_greedy_tokens_of_another_family_are_plain_mlxs(
    name: str, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = assert_same_tokens(name, families["qwen3_moe"], monkeypatch)
    assert len(set(expected)) > 5


@pytest.mark.parametrize("name", KERNELS)
def test_statistics_name_the_runtime(
    name: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(name, monkeypatch) as settings:
        model = load(demo_folder, settings)
        generation = Generation(model, TokenRequest(prompt=PROMPT, max_tokens=1))
        list(generation)
        assert generation.stats.runtime == name.split()[-1].lower()
        model.close()


# -- matrices that the native kernel multiplies ---------------------------------------------------


@needs_native
def test_prefill_computes_no_logits(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernel is eager, and the 397B has 248,320 words."""
    model = load(small, Settings(runtime="native"))
    (head,) = model.heads
    computed: list[tuple[int, int]] = []
    matmul = Native.matmul

    def counted(self: Native, matrix: Resident, x: np.ndarray) -> np.ndarray:
        computed.append((matrix.rows, x.size // matrix.columns))
        return matmul(self, matrix, x)

    monkeypatch.setattr(Native, "matmul", counted)
    assert len(tokens_of(model, 3, chunk=16)) == 3
    assert [tokens for rows, tokens in computed if rows == head.rows] == [1, 1, 1]
    assert any(tokens == 16 for rows, tokens in computed if rows != head.rows)
    model.close()


@needs_native
def test_prefill_skips_nothing_but_the_head(tmp_path: Path) -> None:
    """Not even a matrix with as many rows as there are words: here, that of the queries."""
    shape = replace(SHAPES["small"], experts=8, heads=16, head_dim=64)
    synthesize(tmp_path / "model", shape)
    tokens = {}
    for runtime in ("mlx", "native"):
        model = load(tmp_path / "model", Settings(runtime=runtime))
        rows = [matrix.rows for matrix in native_matrices(model)]
        tokens[runtime] = tokens_of(model, 12, chunk=16)
        model.close()
    assert rows.count(shape.vocabulary) > 1
    assert tokens["native"] == tokens["mlx"]


@needs_native
def test_native_matrices_are_opened_at_their_first_use(demo_folder: Path) -> None:
    """Only then are their arrays certain to be in memory."""
    model = load(demo_folder, Settings(runtime="native"))
    matrices = native_matrices(model)
    assert matrices
    assert all(matrix.resident is None for matrix in matrices)
    mx.eval(model(mx.array(PROMPT)[None]))
    for matrix in matrices:
        assert matrix.resident is not None
        assert matrix.resident.rows == matrix.rows
    model.close()


# -- 16 bits on a CPU -----------------------------------------------------------------------------


@pytest.mark.skipif(GPU, reason="a limit of MLX on the CPU")
def test_experts_that_mlx_cannot_compute_on_a_cpu_are_refused(tmp_path: Path) -> None:
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


@pytest.mark.skipif(GPU, reason="a GPU computes in 16 bits")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_computes_16_bit_checkpoints_in_float32(dtype: str, tmp_path: Path) -> None:
    """And only rounding comes of it: the same weights, widened on disk, give the same logits."""
    synthesize(tmp_path / "model", replace(SHAPES["small"], layers=4, experts=16), dtype=dtype)
    model = load(tmp_path / "model")
    assert choose_runtime().widen
    got = model(mx.array(PROMPT)[None])
    assert got.dtype == mx.float32
    # As they are on disk: the native kernel reads scales of any type.
    kinds = {matrix.scales.dtype for matrix in native_matrices(model)}
    assert kinds == ({mlx_dtype(dtype)} if model.runtime.name == "native" else set())
    resident, _ = load_model(tmp_path / "model")
    resident.set_dtype(mx.float32)
    assert_close(got, resident(mx.array(PROMPT)[None]))
    model.close()


# -- refusals -------------------------------------------------------------------------------------


def test_matrices_that_mlx_computes_wrongly_on_cuda_are_refused(demo_folder: Path) -> None:
    wide, _ = load_model(demo_folder)
    refuse_narrow(wide)
    wide.narrow = nn.QuantizedLinear.from_linear(nn.Linear(64, 32), group_size=64, bits=4)
    with pytest.raises(UnsupportedModel, match="narrow is too narrow"):
        refuse_narrow(wide)


@pytest.mark.parametrize("runtime", ["Metal", "", "gpu"])
def test_an_unknown_runtime_is_refused(runtime: str) -> None:
    with pytest.raises(OptionError, match="choose auto, metal, cuda, native, mlx"):
        choose_runtime(runtime)


def test_a_runtime_of_another_machine_is_refused() -> None:
    own = choose_runtime().name
    choices = " or ".join(dict.fromkeys(("auto", own, "mlx")))
    for runtime in {"metal", "cuda", "native"} - {own}:
        with pytest.raises(OptionError, match=rf"choose {choices}\. \S"):
            choose_runtime(runtime)


def test_on_the_cpu_no_runtime_needs_a_gpu(on_cpu: None) -> None:
    """Also on a machine that has one."""
    assert choose_runtime().name in ("native", "mlx")
