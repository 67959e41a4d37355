"""Fill the file of one layer of a pack: a record an expert, with its checksums."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.errors import NotContiguous
from flash_moe.format.layout import Layout, Part
from flash_moe.pack.recast import Change
from flash_moe.stream.reader import Reader, Target
from flash_moe.stream.store import ExpertLayer, ExpertStore

Progress = Callable[[int], None]

# One batch of records is read while the one before is hashed and written.
BATCH_BYTES = 64 << 20


def copy_records(file: Path, layer: ExpertLayer, progress: Progress) -> tuple[list[int], str]:
    """Copy records of a layer that lies contiguous: two buffers, reading beside writing."""
    stride = layer.layout.stride
    batch = max(1, min(layer.experts, BATCH_BYTES // stride))
    store, reader = ExpertStore([layer]), Reader()
    buffers = [bytearray(batch * stride) for _ in range(2)]
    records: list[int] = []
    digest = hashlib.sha256()
    with file.open("wb", buffering=0) as out, ThreadPoolExecutor(1) as behind:
        pending: Future[None] | None = None
        try:
            for turn, first in enumerate(range(0, layer.experts, batch)):
                view = memoryview(buffers[turn % 2])
                experts = range(first, min(first + batch, layer.experts))
                reader.read(_targets(store, experts, view, stride))
                if pending is not None:
                    pending.result()

                def finish(data: memoryview) -> None:
                    for at in range(0, len(data), stride):
                        records.append(zlib.crc32(data[at : at + stride]))
                    digest.update(data)
                    _write_fully(out.fileno(), data)
                    progress(len(data))

                pending = behind.submit(finish, view[: len(experts) * stride])
            if pending is not None:
                pending.result()
        finally:
            reader.close()
            store.close()
    return records, digest.hexdigest()


def _targets(store: ExpertStore, experts: range, view: memoryview, stride: int) -> list[Target]:
    found: list[Target] = []
    for slot, expert in enumerate(experts):
        for segment in store.segments(0, expert):
            at = slot * stride + segment.at
            found.append((segment, view[at : at + segment.length]))
    return found


def compute_records(
    file: Path, skeleton: Skeleton, path: str, progress: Progress
) -> tuple[list[int], str]:
    """Records of a layer whose arrays mlx-lm has to compute (dequantize, transpose): one part
    of all experts in memory at a time, scattered to its place in every record."""
    layout, experts = skeleton.layout(path), skeleton.expert_count(path)
    with file.open("wb", buffering=0) as out:
        out.truncate(experts * layout.stride)
        for part in layout.parts:
            array = skeleton.switches[path][part.projection][part.param]
            rows = np.array(mx.contiguous(array).reshape(experts, -1).view(mx.uint8), copy=False)
            for expert, row in enumerate(rows):
                at = expert * layout.stride + part.offset
                _write_fully(out.fileno(), np.ascontiguousarray(row).data, at)
            progress(part.nbytes * experts)
    return _read_back(file, layout)


def recast_records(
    file: Path, skeleton: Skeleton, path: str, recast: Change, progress: Progress
) -> tuple[list[int], str]:
    """Records whose weights are changed; one projection of one expert is computed at a time."""
    source = skeleton.layout(path)
    layout, experts = recast.layout(source, path), skeleton.expert_count(path)
    places = {part.name: part.offset for part in layout.parts}
    quantization = dict(source.quantization)
    with file.open("wb", buffering=0) as out:
        out.truncate(experts * layout.stride)
        for expert, name, arrays in _projections(skeleton, path):
            made = recast.projection(arrays, quantization[name], path, name, expert)
            done = 0
            for param, array in made.items():
                raw = np.array(mx.contiguous(array).reshape(-1).view(mx.uint8), copy=False)
                at = expert * layout.stride + places[f"{name}.{param}"]
                _write_fully(out.fileno(), np.ascontiguousarray(raw).data, at)
                done += array.nbytes
            progress(done)
    return _read_back(file, layout)


def _projections(skeleton: Skeleton, path: str) -> Iterator[tuple[int, str, dict[str, mx.array]]]:
    """Every projection of every expert of a layer: read one by one where they lie so, else a
    projection of all experts at a time, as mlx-lm computes it."""
    try:
        layer = skeleton.layer(path)
    except NotContiguous:
        for name, _ in skeleton.layout(path).quantization:
            projection = skeleton.switches[path][name]
            arrays = {k: v for k, v in projection.items() if isinstance(v, mx.array)}
            for expert in range(skeleton.expert_count(path)):
                yield expert, name, {param: array[expert] for param, array in arrays.items()}
            forget(projection)
        return
    store, reader = ExpertStore([layer]), Reader()
    buffer = bytearray(layer.layout.stride)
    try:
        for expert in range(layer.experts):
            segments = store.segments(0, expert)
            reader.read([(s, memoryview(buffer)[s.at : s.at + s.length]) for s in segments])
            for name, _ in layer.layout.quantization:
                parts = [part for part in layer.layout.parts if part.projection == name]
                yield expert, name, {part.param: _array(buffer, part) for part in parts}
    finally:
        reader.close()
        store.close()


def _array(buffer: bytearray, part: Part) -> mx.array:
    """A copy: MLX computes later, and the buffer is read into again."""
    raw = np.frombuffer(buffer, np.uint8, part.nbytes, part.offset)
    return mx.array(raw).view(getattr(mx, part.dtype)).reshape(part.shape)


def forget(projection: nn.Module) -> None:
    """Drop lazy arrays: those that were evaluated hold their weights in memory."""
    for param, array in list(projection.items()):
        if isinstance(array, mx.array):
            projection[param] = mx.zeros(array.shape, array.dtype)


def _read_back(file: Path, layout: Layout) -> tuple[list[int], str]:
    digest, records = hashlib.sha256(), []
    with file.open("rb") as written:
        while data := written.read(layout.stride):
            digest.update(data)
            records.append(zlib.crc32(data))
    return records, digest.hexdigest()


def _write_fully(fd: int, data: memoryview, at: int | None = None) -> None:
    done = 0
    while done < len(data):
        if at is None:
            done += os.write(fd, data[done:])
        else:
            done += os.pwrite(fd, data[done:], at + done)
