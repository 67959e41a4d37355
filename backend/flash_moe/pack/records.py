"""Fill the file of one layer of a pack: a record an expert, with its checksums."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from flash_moe.arrays import mlx_dtype, raw_bytes
from flash_moe.callbacks import Advance
from flash_moe.checkpoint.locations import ExpertLayer
from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.errors import NotContiguous
from flash_moe.format.atomic import write_at
from flash_moe.format.layout import Layout, Part
from flash_moe.pack.transform import Arrays, ExpertTransform
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import ExpertStore

# One batch of records is read while the one before is hashed and written.
BATCH_BYTES = 64 << 20


class Checksums(NamedTuple):
    """A CRC-32 for each record, and the SHA-256 of the file."""

    records: list[int]
    sha256: str


def write_records(
    file: Path, skeleton: Skeleton, path: str, transform: ExpertTransform | None, progress: Advance
) -> Checksums:
    """The experts of one switch layer, transformed if asked."""
    if transform is not None:
        return transform_records(file, skeleton, path, transform, progress)
    try:
        layer = skeleton.layer(path)
    except NotContiguous:
        return compute_records(file, skeleton, path, progress)
    return copy_records(file, layer, progress)


def copy_records(file: Path, layer: ExpertLayer, progress: Advance) -> Checksums:
    """Copy the records of a layer that can be read expert by expert: one of two buffers is filled
    while the other is written."""
    stride = layer.layout.stride
    batch = max(1, min(layer.experts, BATCH_BYTES // stride))
    buffers = [memoryview(bytearray(batch * stride)) for _ in range(2)]
    records: list[int] = []
    digest = hashlib.sha256()

    def write(out: BinaryIO, data: memoryview) -> None:
        records.extend(zlib.crc32(data[at : at + stride]) for at in range(0, len(data), stride))
        digest.update(data)
        out.write(data)
        progress(len(data))

    with _opened(layer) as (store, reader), file.open("wb") as out, ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for turn, first in enumerate(range(0, layer.experts, batch)):
            buffer = buffers[turn % 2]
            experts = range(first, min(first + batch, layer.experts))
            reader.read(store.pieces(0, experts, stride), buffer)
            if pending is not None:
                pending.result()
            pending = writer.submit(write, out, buffer[: len(experts) * stride])
        if pending is not None:
            pending.result()
    return Checksums(records, digest.hexdigest())


def compute_records(file: Path, skeleton: Skeleton, path: str, progress: Advance) -> Checksums:
    """Records of a layer whose arrays mlx-lm has to compute (dequantize, transpose): one part of
    all experts in memory at a time, scattered to its place in every record."""
    layout, experts = skeleton.layout(path), skeleton.expert_count(path)
    with file.open("wb") as out:
        out.truncate(experts * layout.stride)
        for part in layout.parts:
            array = skeleton.switches[path][part.projection][part.param]
            data = _bytes_of(array)
            for expert in range(experts):
                out.seek(expert * layout.stride + part.offset)
                out.write(data[expert * part.nbytes : (expert + 1) * part.nbytes])
            progress(part.nbytes * experts)
    return read_back(file, layout)


def transform_records(
    file: Path, skeleton: Skeleton, path: str, transform: ExpertTransform, progress: Advance
) -> Checksums:
    """Records whose weights are transformed, one projection of one expert at a time."""
    records = TransformedRecords(skeleton.layout(path), path, transform)
    with file.open("wb") as out:
        out.truncate(skeleton.expert_count(path) * records.layout.stride)
        for expert, name, arrays in _projections(skeleton, path):
            progress(records.write(out.fileno(), expert, name, arrays))
    return read_back(file, records.layout)


class TransformedRecords:
    """The records of one layer, filled a projection of an expert at a time, in any order."""

    def __init__(self, source: Layout, path: str, transform: ExpertTransform) -> None:
        self.layout = transform.layout(source, path)
        self._path, self._transform = path, transform
        self._offsets = {part.name: part.offset for part in self.layout.parts}
        self._quantization = dict(source.quantization)

    def write(self, fd: int, expert: int, name: str, arrays: Arrays) -> int:
        """Transform and write; returns how many bytes it became."""
        quantization = self._quantization[name]
        results = self._transform.apply(arrays, quantization, self._path, name, expert)
        for param, array in results.items():
            at = expert * self.layout.stride + self._offsets[f"{name}.{param}"]
            write_at(fd, _bytes_of(array), at)
        return sum(array.nbytes for array in results.values())


def release_arrays(projection: nn.Module) -> None:
    """Drop lazy arrays: those that were evaluated hold their weights in memory."""
    for param, array in _arrays_of(projection).items():
        projection[param] = mx.zeros(array.shape, array.dtype)


def _projections(skeleton: Skeleton, path: str) -> Iterator[tuple[int, str, Arrays]]:
    """(expert, projection, arrays) for a whole layer: read expert by expert where they lie so, else
    a projection of all experts at a time, as mlx-lm computes it."""
    try:
        layer = skeleton.layer(path)
    except NotContiguous:
        yield from _computed_projections(skeleton, path)
        return
    stride = layer.layout.stride
    buffer = memoryview(bytearray(stride))
    with _opened(layer) as (store, reader):
        for expert in range(layer.experts):
            reader.read(store.pieces(0, [expert]), buffer)
            for name, _ in layer.layout.quantization:
                parts = [part for part in layer.layout.parts if part.projection == name]
                yield (
                    expert,
                    name,
                    {part.param: array_of(buffer[part.offset :], part) for part in parts},
                )


def _computed_projections(skeleton: Skeleton, path: str) -> Iterator[tuple[int, str, Arrays]]:
    for name, _ in skeleton.layout(path).quantization:
        projection = skeleton.switches[path][name]
        arrays = _arrays_of(projection)
        for expert in range(skeleton.expert_count(path)):
            yield expert, name, {param: array[expert] for param, array in arrays.items()}
        release_arrays(projection)


@contextmanager
def _opened(layer: ExpertLayer) -> Iterator[tuple[ExpertStore, Reader]]:
    store, reader = ExpertStore([layer], in_order=True), Reader()
    try:
        yield store, reader
    finally:
        reader.close()
        store.close()


def _arrays_of(projection: nn.Module) -> Arrays:
    return {param: array for param, array in projection.items() if isinstance(array, mx.array)}


def array_of(data: memoryview, part: Part) -> mx.array:
    """A copy: MLX computes later, when the memory holds something else."""
    raw = np.frombuffer(data, np.uint8, part.nbytes)
    return mx.array(raw).view(mlx_dtype(part.dtype)).reshape(part.shape)


def _bytes_of(array: mx.array) -> memoryview:
    return raw_bytes(mx.contiguous(array).reshape(-1).view(mx.uint8))


def read_back(file: Path, layout: Layout) -> Checksums:
    """The checksums of records that lie in a file."""
    digest, records = hashlib.sha256(), []
    with file.open("rb") as written:
        while data := written.read(layout.stride):
            digest.update(data)
            records.append(zlib.crc32(data))
    return Checksums(records, digest.hexdigest())
