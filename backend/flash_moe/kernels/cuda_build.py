"""Our shaders compiled for an NVIDIA GPU by NVRTC, the compiler that MLX brings along.

mx.fast.cuda_kernel compiles them, too, but behind headers of MLX's that they do not need: 2.2 s a
kernel on the host of an H200, in every process, with five of them before the first token. Without
those headers it is 0.1 s, once: later processes take it from the user's cache. Where NVRTC or
CUDA's headers are not found, MLX compiles.

MLX's own kernels for prompts take it 20 s each. It keeps them in /tmp, until the next start of the
machine; we have it keep them in the user's cache. And it hands operations to the GPU a hundred at a
time, while the GPU waits for the first.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe.native.build import cache_folder

INCLUDES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.uint32: "unsigned int",
}
# Of CUDA 13 and 12; the one that MLX has loaded.
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CudaKernel:
    """Called like what mx.fast.cuda_kernel makes. `header` and `body` are CUDA's text."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        template: Sequence[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: Sequence[tuple[int, ...]],
        output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        launch: dict[str, Any] = {
            "grid": grid,
            "threadgroup": threadgroup,
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
        }
        types = tuple(array.dtype for array in (*inputs,)) + tuple(output_dtypes)
        built = build(self, tuple(template), types)
        if built is None:
            results: list[mx.array] = _by_mlx(self)(
                inputs=list(inputs), template=list(template), **launch
            )
            return results
        return mx.fast.precompiled_cuda_kernel(
            name=built[0],
            compiled_source=built[1],
            inputs=list(inputs),
            scalars=[],
            ensure_row_contiguous=True,
            **launch,
        )


# Of a token of the 397B's shape, 8 layers, nothing read, H200: 5.1 ms, with 8 operations 7.4, with
# MLX's own choice 7.3 to 8.8.
OPERATIONS_A_HAND_OVER = 4


def settle_mlx() -> bool:
    """Before MLX compiles or computes anything; whether something that it compiled is kept already.
    A user's own settings stay. What MLX compiles runs on one kind of GPU, and it would load it on
    any."""
    if folder := cache_folder():
        kept = folder / f"mlx-{version('mlx')}-{_architecture()}"
        os.environ.setdefault("MLX_PTX_CACHE_DIR", str(kept))
    os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", str(OPERATIONS_A_HAND_OVER))
    kept_in = os.environ.get("MLX_PTX_CACHE_DIR")
    return kept_in is not None and Path(kept_in).is_dir() and any(Path(kept_in).iterdir())


def _architecture() -> str:
    info = mx.device_info(mx.default_device())
    major, minor = (info.get(f"compute_capability_{part}") for part in ("major", "minor"))
    return f"sm_{major}{minor}"


@cache
def build(
    kernel: CudaKernel, template: tuple[tuple[str, Any], ...], types: tuple[mx.Dtype, ...]
) -> tuple[str, bytes] | None:
    """The name of a kernel for some constants and types, which no other has, and its code."""
    try:
        source = cuda_source(kernel, template, types, "KERNEL")
        symbol = f"{kernel.name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        return symbol, _kept(source.replace("KERNEL", symbol), symbol)
    except (OSError, KeyError, ValueError) as error:
        log.warning("MLX compiles %s, which takes longer: %s", kernel.name, error)
        return None


def _kept(source: str, symbol: str) -> bytes:
    """From the cache, or compiled and kept there. Like a library's, a file is named after what went
    in and what came out: what is of another compiler, or damaged, is made again."""
    folder, architecture = cache_folder(), _architecture()
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    stem = f"{symbol}-{architecture}-{major.value}.{minor.value}"
    for path in sorted(folder.glob(f"{stem}-*.cubin")) if folder else ():
        code = path.read_bytes()
        if path.name == f"{stem}-{_digest(code)}.cubin":
            return code
    code = compile_source(source, architecture)
    if folder:
        with suppress(OSError):  # then it is compiled again next time
            _keep(folder / f"{stem}-{_digest(code)}.cubin", code)
    return code


def _keep(path: Path, code: bytes) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:24]


def cuda_source(
    kernel: CudaKernel,
    template: Sequence[tuple[str, Any]],
    types: Sequence[mx.Dtype],
    symbol: str,
) -> str:
    """All of a program: the constants in the place of template parameters."""
    spelled = [TYPES[dtype] for dtype in types]
    arguments = [
        f"const {kind}* {name}" for kind, name in zip(spelled, kernel.inputs, strict=False)
    ]
    arguments += [
        f"{kind}* {name}"
        for kind, name in zip(spelled[len(kernel.inputs) :], kernel.outputs, strict=True)
    ]
    constants = "\n".join(f"  {_constant(name, value)};" for name, value in template)
    return (
        f"{INCLUDES}{kernel.header}\n"
        f'extern "C" __global__ void {symbol}({", ".join(arguments)}) {{\n'
        f"{constants}\n{kernel.body}\n}}\n"
    )


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]}"
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()}"
    return f"constexpr int {name} = {value}"


def compile_source(source: str, architecture: str) -> bytes:
    """OSError where NVRTC or headers are not found; ValueError where the text is wrong."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    options = [f"--gpu-architecture={architecture}", f"--include-path={_headers()}", "-std=c++17"]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"flash_moe.cu", 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            raise ValueError(_result(nvrtc, program, "ProgramLog").decode(errors="replace"))
        return _result(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _result(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    nvrtc[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    nvrtc[f"nvrtcGet{what}"](program, buffer)
    return buffer.raw


@cache
def _nvrtc() -> ctypes.CDLL:
    for name in LIBRARIES:
        try:
            return ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)
        except OSError:
            continue
    raise OSError(f"none of {', '.join(LIBRARIES)} is loaded")


@cache
def _headers() -> Path:
    """Where MLX looks for them as well: CUDA's wheels beside its own, then an installation."""
    wheels = Path(mx.__file__).parents[1] / "nvidia"
    places = [wheels / "cu13", wheels / "cuda_runtime"]
    places += [
        Path(value) for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name))
    ]
    for place in (*places, Path("/usr/local/cuda")):
        if (place / "include" / "cuda_fp16.h").is_file():
            return place / "include"
    raise OSError("CUDA's headers are not found. Set CUDA_HOME")


@cache
def _by_mlx(kernel: CudaKernel) -> Any:
    make: Any = mx.fast.cuda_kernel
    names = (list(kernel.inputs), list(kernel.outputs))
    return make(kernel.name, *names, kernel.body, kernel.header)
