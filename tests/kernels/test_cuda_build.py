"""The shaders as CUDA: every one compiles alone, and what NVRTC makes of it is what MLX makes."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.kernels import cuda_build, gpu, gpu_operations, shaders
from flash_moe.kernels.cuda_build import CudaKernel, compile_source, cuda_source
from flash_moe.kernels.interface import Shared
from tests.devices import CUDA
from tests.kernels import reference as ref
from tests.kernels.devices import bits

TOKENS, K = 2, 3


def launches(call: Any = None) -> dict[str, list[mx.array]]:
    """Every shader once, through the functions that the engine calls."""
    rng = np.random.default_rng(0)
    spec = ref.make_spec(128, 64, 4, 32)
    bank = mx.array(
        np.concatenate([ref.random_record(spec, rng) for _ in range(K)]).view(np.uint32)
    )
    x = mx.array(rng.normal(size=(TOKENS, 128)).astype(np.float32)).astype(mx.bfloat16)
    slots = np.tile(np.arange(K, dtype=np.uint32), TOKENS)
    tokens = np.repeat(np.arange(TOKENS, dtype=np.uint32), K)
    weights = mx.array(rng.uniform(size=(TOKENS, K)).astype(np.float32))
    tiles, tuning = gpu.make_tiles(tokens, slots), gpu.Tuning()
    shared = Shared(x, x[:, :1])
    h = gpu.gate_up("cuda", spec, x, bank, tiles, tuning)
    d = gpu.down("cuda", spec, h, bank, tiles, mx.float32, tuning)
    place = np.arange(TOKENS * K, dtype=np.uint32)
    q, v = x.reshape(1, TOKENS, 4, 32), x[:, :80].reshape(1, TOKENS, 4, 20)
    gates, state = weights[None, :, :1] + mx.zeros((1, 1, 4)), mx.zeros((1, 4, 20, 32))
    mixed = mx.concatenate([x, x, x[:, :80]], axis=1)[None]
    raw = gpu_operations.Gates(mx.zeros(4), mx.zeros(4, mx.bfloat16))
    return {
        "gate_up": [h],
        "down": [d],
        "combine": [gpu.combine("cuda", d, place, weights, shared, mx.bfloat16)],
        "down_combine": [
            gpu.down_combine("cuda", spec, h, bank, tiles, weights, shared, mx.bfloat16, tuning)
        ],
        "router": list(gpu.router("cuda", x, K, True)),
        "delta": list(gpu_operations.gated_delta("cuda", q, q, v, gates, gates, state)),
        "raw": list(gpu_operations.gated_delta_raw("cuda", mixed, gates, gates, raw, state, 4)),
        "conv": list(
            gpu_operations.short_conv(
                "cuda", x[None], mx.zeros((1, 3, 128), mx.bfloat16), mx.ones((128, 4, 1))
            )
        ),
    }


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The program of every shader, by its name; nothing is launched."""
    found: dict[str, str] = {}

    def note(kernel: CudaKernel, *, inputs: Any, template: Any, **launch: Any) -> list[mx.array]:
        types = [array.dtype for array in inputs] + list(launch["output_dtypes"])
        found[kernel.name] = cuda_source(kernel, template, types, kernel.name)
        sizes = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
        return [mx.zeros(shape, dtype) for shape, dtype in sizes]

    monkeypatch.setattr(CudaKernel, "__call__", note)
    shaders.kernel.cache_clear()
    launches()
    shaders.kernel.cache_clear()
    return found


def test_every_shader_is_a_program(sources: dict[str, str]) -> None:
    """None of Metal's address spaces is left, and each has its constants and arguments."""
    assert {f"{name}.metal" for name in sources} == {
        path.name for path in shaders.folder().glob("*.metal")
    }
    router = sources["router_topk"]
    assert (
        "void router_topk(const __nv_bfloat16* logits, unsigned int* ids, float* weights)" in router
    )
    assert "constexpr int K = 3;" in router
    assert "constexpr bool RENORMALISE = true;" in router
    for name, source in sources.items():
        body = source[source.index("__global__") :]
        assert "device " not in body.replace("__device__ ", ""), name
        assert f'extern "C" __global__ void {name}(' in source


def require_nvrtc() -> None:
    try:
        cuda_build._nvrtc()
        cuda_build._headers()
    except OSError as error:
        pytest.skip(f"needs NVRTC and CUDA's headers: {error}")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_120"])
def test_every_shader_compiles(sources: dict[str, str], architecture: str) -> None:
    require_nvrtc()
    for source in sources.values():
        assert compile_source(source, architecture).startswith(b"\x7fELF")
    with pytest.raises(ValueError, match="undefined"):
        compile_source(sources["combine"].replace("float total", "float other"), architecture)


def test_a_program_is_compiled_once_for_all_processes(
    sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And again where the file is damaged, or was made for another GPU."""
    require_nvrtc()
    compiled: list[str] = []

    def note(source: str, architecture: str) -> bytes:
        compiled.append(architecture)
        return compile_source(source, architecture)

    def keep() -> bytes:
        return cuda_build._kept(sources["combine"], "combine")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_build, "compile_source", note)
    monkeypatch.setattr(cuda_build, "_architecture", lambda: "sm_90")
    code = keep()
    assert keep() == code
    assert compiled == ["sm_90"]
    (kept,) = (tmp_path / "flash-moe").iterdir()
    kept.write_bytes(code[:-1])
    assert keep() == code
    assert kept.read_bytes() == code
    monkeypatch.setattr(cuda_build, "_architecture", lambda: "sm_80")
    assert keep() != code
    assert compiled == ["sm_90", "sm_90", "sm_80"]


def test_what_mlx_compiles_is_kept_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By version and GPU, because others would load it; a setting of the user stays."""
    monkeypatch.setattr(cuda_build, "_architecture", lambda: "sm_90")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "")
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "")
    monkeypatch.delenv("MLX_MAX_OPS_PER_BUFFER")
    cuda_build.settle_mlx()
    assert os.environ["MLX_PTX_CACHE_DIR"] == str(
        tmp_path / "flash-moe" / f"mlx-{version('mlx')}-sm_90"
    )
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "4"
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", "mine")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "50")
    cuda_build.settle_mlx()
    assert os.environ["MLX_PTX_CACHE_DIR"] == "mine"
    assert os.environ["MLX_MAX_OPS_PER_BUFFER"] == "50"


@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
def test_the_same_bits_as_when_mlx_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which happens where NVRTC is not found, with a warning."""
    ours = launches()
    mx.eval(ours)

    def nothing() -> Any:
        raise OSError("no NVRTC")

    monkeypatch.setattr(cuda_build, "_nvrtc", nothing)
    cuda_build.build.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            theirs = launches()
        mx.eval(theirs)
    finally:
        cuda_build.build.cache_clear()
    assert "no NVRTC" in caplog.text
    for name, arrays in ours.items():
        assert [bits(a) for a in arrays] == [bits(a) for a in theirs[name]], name
