"""One launch of a compiled kernel: in this process, or under a sanitizer in one of its own."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from tests.metal import compiler
from tests.metal.capture import Buffer, KernelCall
from tests.metal.compiler import Build

Array = npt.NDArray[Any]
Guard = Literal["middle", "end", "start"]
Ranges = Mapping[str, Sequence[tuple[int, int]]]

GUARDS = {"middle": 0, "end": 1, "start": 2}
# numpy has no bfloat16: its bits travel as uint16.
_SAME = (
    *("float16", "float32", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool_"),
)
NUMPY = {mx.bfloat16: np.uint16} | {getattr(mx, name): getattr(np, name) for name in _SAME}


class EmulatorError(Exception):
    """The report of a detector; `kind` names it in a word or two."""

    def __init__(self, kind: str, message: str, call: KernelCall) -> None:
        # Lines are counted in the text that MLX generates: the helpers, the kernel, its instance.
        line = re.search(r"(?:at line |\.metal:)(\d+)", message)
        lines = call.source.splitlines()
        number = int(line[1]) if line else 0
        text = f"\n{number} | {lines[number - 1]}" if 0 < number <= len(lines) else ""
        super().__init__(f"{call.file}: {message}{text}")
        self.kind = kind


class _Kernel(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("bind", "thread", "begin", "end")]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("output", ctypes.c_int32),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_uint32 * 3) for n in ("grid", "threadgroup")),
        ("seed", ctypes.c_uint64),
        *((n, ctypes.c_int32) for n in ("schedule", "guard", "buffer_count", "range_count")),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("ranges", ctypes.c_void_p),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_uint64),
    ]


class _Arguments:
    """Arrays as the runtime wants them, and whatever must live as long."""

    def __init__(self, buffers: Sequence[tuple[str, Array, bool]]) -> None:
        self.arrays = [array for _, array, _ in buffers]
        self.structures = (_Buffer * len(buffers))(
            *(
                _Buffer(name.encode(), array.ctypes.data, array.nbytes, output)
                for name, array, output in buffers
            )
        )


def _buffers(call: KernelCall, inputs: list[Array]) -> tuple[_Arguments, list[Array]]:
    """All of a call's buffers in its order, and the outputs among them."""
    buffers: list[tuple[str, Array, bool]] = []
    for buffer, array, (shape, strides, ndim) in zip(call.inputs, inputs, call.facts, strict=True):
        buffers.append((buffer.name, array, False))
        steps = [prod(array.shape[i + 1 :]) for i in range(array.ndim)]
        if shape:
            buffers.append((f"{buffer.name}_shape", np.array(array.shape, np.int32), False))
        if strides:
            buffers.append((f"{buffer.name}_strides", np.array(steps, np.int64), False))
        if ndim:
            buffers.append((f"{buffer.name}_ndim", np.array(array.ndim, np.int32), False))
    outputs = [_blank(buffer, call.init) for buffer in call.outputs]
    buffers += [(b.name, array, True) for b, array in zip(call.outputs, outputs, strict=True)]
    return _Arguments(buffers), outputs


def _blank(buffer: Buffer, init: float | None) -> Array:
    if init is not None:
        return to_numpy(mx.full(buffer.shape, init, buffer.dtype))
    blank = np.empty(buffer.shape, NUMPY[buffer.dtype])
    blank.reshape(-1).view(np.uint8)[:] = 0xFF
    return blank


# The runtime has one set of fibres, and ctypes lets other threads of Python run meanwhile.
_ONE_AT_A_TIME = Lock()


@cache
def _load(path: Path, name: str) -> Any:
    return getattr(ctypes.CDLL(str(path)), name)


@cache
def _kernel(path: Path) -> _Kernel:
    return _Kernel.in_dll(ctypes.CDLL(str(path)), "emulator_kernel")


def run_plain(
    call: KernelCall, inputs: list[Array], schedule: int, seed: int, guard: Guard
) -> list[Array]:
    kernel = _kernel(compiler.kernel(call.text(), "plain"))
    arguments, outputs = _buffers(call, inputs)
    error = ctypes.create_string_buffer(512)
    launch = _Launch(
        (ctypes.c_uint32 * 3)(*call.grid),
        (ctypes.c_uint32 * 3)(*call.threadgroup),
        seed,
        schedule,
        GUARDS[guard],
        len(arguments.structures),
        0,
        arguments.structures,
        None,
        ctypes.cast(error, ctypes.c_char_p),
        len(error),
    )
    launcher = _load(compiler.runtime("plain"), "emulator_launch")
    with _ONE_AT_A_TIME:
        failed = launcher(ctypes.byref(kernel), ctypes.byref(launch))
    if failed:
        message = error.value.decode()
        prefix = re.match(r"(guard|canary): ", message)
        raise EmulatorError(prefix[1] if prefix else "emulator", message, call)
    return outputs


def run_sanitized(
    call: KernelCall, inputs: list[Array], build: Build, schedule: int, seed: int, ranges: Ranges
) -> list[Array]:
    library = compiler.kernel(call.text(), build)
    arguments, outputs = _buffers(call, inputs)
    names = [s.name.decode() for s in arguments.structures]
    places = [(names.index(n), *r) for n, many in ranges.items() for r in many]
    lines = [
        (*call.grid, *call.threadgroup, seed, schedule, len(names), len(places)),
        *((s.name.decode(), s.bytes, s.output) for s in arguments.structures),
        *places,
    ]
    with tempfile.TemporaryDirectory() as scratch:
        manifest, data = Path(scratch) / "launch", Path(scratch) / "data"
        manifest.write_text("\n".join(" ".join(map(str, line)) for line in lines))
        data.write_bytes(b"".join(array.tobytes() for array in arguments.arrays))
        command = [*compiler.program(build), str(library), str(manifest), str(data)]
        environment = os.environ | {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:redzone=512",
            "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
        }
        if symbolizer := compiler.symbolizer():
            environment |= {f"{s}_SYMBOLIZER_PATH": symbolizer for s in ("ASAN", "TSAN", "UBSAN")}
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300)
        if done.returncode:
            raise _sanitizer_error(done.stderr.decode(errors="replace"), call)
        raw = data.read_bytes()[-sum(array.nbytes for array in outputs) :]
    for array in outputs:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(raw[: array.nbytes], np.uint8)
        raw = raw[array.nbytes :]
    return outputs


def _sanitizer_error(report: str, call: KernelCall) -> EmulatorError:
    report = report.split("\nShadow bytes")[0]
    for pattern in (r"AddressSanitizer: ([\w-]+)", r"ThreadSanitizer: ([\w ]+?) \("):
        if match := re.search(pattern, report):
            return EmulatorError(match[1], report, call)
    kinds = {"runtime error: ": "undefined behaviour", "emulator: ": "emulator"}
    kind = next((kind for sign, kind in kinds.items() if sign in report), "crash")
    return EmulatorError(kind, report, call)


def to_numpy(array: mx.array) -> Array:
    flat = array.reshape(-1)
    if array.dtype == mx.bfloat16:
        flat = flat.view(mx.uint16)
    return np.array(flat).reshape(array.shape)


def to_mlx(array: Array, dtype: mx.Dtype) -> mx.array:
    flat = mx.array(array.reshape(-1))
    return (flat.view(dtype) if dtype == mx.bfloat16 else flat).reshape(array.shape)
