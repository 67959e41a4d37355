"""The Metal text of the kernels that a Python call would launch, and the C++ that it is part of."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

IDS = {
    *("thread_position_in_grid", "thread_position_in_threadgroup", "threads_per_grid"),
    *("threadgroup_position_in_grid", "threadgroups_per_grid", "threads_per_threadgroup"),
    *("dispatch_threads_per_threadgroup", "thread_index_in_threadgroup"),
    *("thread_index_in_simdgroup", "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup"),
}
CONSTANT_IDS = {"threads_per_simdgroup": "32u", "thread_execution_width": "32u"}


@dataclass(frozen=True, slots=True)
class Buffer:
    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One launch. An output's `init` is not part of what MLX exports: `emulated` fills it in."""

    name: str
    source: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    inputs: tuple[Buffer, ...]
    outputs: tuple[Buffer, ...]
    # What the text asks to know of each input: its shape, strides, number of dimensions.
    facts: tuple[tuple[bool, bool, bool], ...]
    init: float | None = None

    @property
    def file(self) -> str:
        """What errors call the source; the name goes on with all constants and types."""
        return f"{self.name.removeprefix('custom_kernel_').split('__')[0]}.metal"

    def text(self) -> str:
        """The C++ of a library: the source untouched, between a header and a call of it."""
        return _library(self)


def capture(fn: Callable[..., Any], *arrays: mx.array) -> list[KernelCall]:
    """The custom kernels that fn(*arrays) would launch, in order. Nothing is computed."""
    nodes: list[dict[str, Any]] = []
    mx.export_function(nodes.append, fn, *arrays)
    return [_call(n) for n in nodes if n["type"] == "primitive" and n["name"] == "CustomKernel"]


def _call(node: dict[str, Any]) -> KernelCall:
    name, source, *launch = node["arguments"]
    grid, threadgroup = tuple(launch[:3]), tuple(launch[3:6])
    facts, contiguous = launch[6:8]
    if not contiguous:
        raise NotImplementedError(f"{name}: ensure_row_contiguous=False")
    names = [p.name for p in _parameters(name, source) if p.buffer is not None]
    inputs = []
    for (_, shape, dtype), asked in zip(node["inputs"], facts, strict=True):
        inputs.append(Buffer(names.pop(0), tuple(shape), dtype))
        del names[: sum(asked)]
    outputs = [
        Buffer(name, tuple(shape), dtype)
        for name, (_, shape, dtype) in zip(names, node["outputs"], strict=True)
    ]
    return KernelCall(
        name, source, grid, threadgroup, tuple(inputs), tuple(outputs), tuple(map(tuple, facts))
    )


@dataclass(frozen=True, slots=True)
class _Parameter:
    type: str
    reference: bool
    name: str
    buffer: int | None
    attribute: str


def _parameters(name: str, source: str) -> list[_Parameter]:
    signature = re.search(rf"\b{re.escape(name)}\(\n(.*?)\) \{{\n", source, re.S)
    assert signature, source
    parameters = []
    for line in signature[1].split(",\n"):
        match = re.fullmatch(r"\s*(.+?)([*&]?)\s+(\w+) \[\[(\w+)(?:\((\d+)\))?\]\]", line)
        assert match, line
        kind, mark, parameter, attribute, number = match.groups()
        buffer = int(number) if number else None
        parameters.append(_Parameter(kind, mark == "&", parameter, buffer, attribute))
    return parameters


def _library(call: KernelCall) -> str:
    instance = re.search(r"\n(template \[\[host_name\(.*?decltype\((.+?)\) .*)", call.source, re.S)
    source = call.source[: instance.start()] if instance else call.source
    arguments = []
    for p in _parameters(call.name, source):
        if p.buffer is not None:
            arguments.append(f"{'*' if p.reference else ''}({p.type}*)buffers[{p.buffer}]")
        elif p.attribute in CONSTANT_IDS:
            arguments.append(CONSTANT_IDS[p.attribute])
        elif p.attribute not in IDS:
            raise NotImplementedError(f"{call.name}: [[{p.attribute}]]")
        elif p.type == "uint3":
            arguments.append(
                "uint3{" + ", ".join(f"ids->{p.attribute}[{i}]" for i in range(3)) + "}"
            )
        else:
            arguments.append(f"ids->{p.attribute}")
    return f"""#include "runtime.h"
#include "metal_on_host.h"
namespace shader {{
#line 1 "{call.file}"
{source}
}}
#line 1 "launcher"
static const emulator::Host* host;
extern "C" {{
const void* metal_host_exchange(const void* value, size_t size, int site, uint* active) {{
  return host->exchange(value, size, site, active);
}}
void metal_host_barrier(int whole, int orders, int site) {{ host->barrier(whole, orders, site); }}
uint metal_host_lane() {{ return host->lane(); }}
}}
static void bind(const emulator::Host* launcher) {{ host = launcher; }}
static void call(const emulator::Ids* ids, void** buffers) {{
  shader::{instance[2] if instance else call.name}({", ".join(arguments)});
}}
#ifdef __APPLE__
extern "C" char first __asm("section$start$__DATA$metal_tg");
extern "C" char last __asm("section$end$__DATA$metal_tg");
#else
extern "C" char first[] __asm("__start_metal_tg") __attribute__((weak, visibility("hidden")));
extern "C" char last[] __asm("__stop_metal_tg") __attribute__((weak, visibility("hidden")));
#endif
extern "C" emulator::Kernel emulator_kernel = {{bind, call, (char*)&first, (char*)&last}};
"""
