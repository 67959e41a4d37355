"""Residency in the page cache, after the system was asked to drop some of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flash_moe.checkpoint.locations import packed_layer
from flash_moe.format.layout import make_layout
from flash_moe.process import bytes_from_disk
from flash_moe.stream.reader import Reader
from flash_moe.stream.residency import Residency
from flash_moe.stream.store import ExpertStore

EXPERTS = 6
# Large, because a system may cache, and then drop, pieces of 2 MB.
LAYOUT = make_layout([("up_proj", "weight", "uint32", (1024, 2048))], [("up_proj", None)])


def drop(file: Path, offset: int, length: int) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system does not drop pages on request")
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@pytest.mark.skipif(bytes_from_disk() is None, reason="this system does not count them")
def test_bytes_from_the_disk_are_counted(tmp_path: Path) -> None:
    file, stride = tmp_path / "layer", LAYOUT.stride
    file.write_bytes(os.urandom(2 * stride))
    store, reader = ExpertStore([packed_layer("switch", 2, LAYOUT, file)]), Reader()
    read = []
    try:
        for dropped in (False, True):
            if dropped:
                drop(file, 0, 2 * stride)
                if Residency(store).cached(0, 0):
                    pytest.skip("this file system drops nothing")
            before = bytes_from_disk()
            reader.read(store.pieces(0, [0, 1], stride), memoryview(bytearray(2 * stride)))
            now = bytes_from_disk()
            assert before is not None
            assert now is not None
            read.append(now - before)
    finally:
        reader.close()
        store.close()
    assert read[0] < stride
    assert read[1] >= 2 * stride


def test_an_expert_is_cached_until_it_is_dropped(tmp_path: Path) -> None:
    file, stride = tmp_path / "layer", LAYOUT.stride
    file.write_bytes(os.urandom(EXPERTS * stride))
    store = ExpertStore([packed_layer("switch", EXPERTS, LAYOUT, file)])
    residency = Residency(store)
    try:
        assert [residency.cached(0, e) for e in range(EXPERTS)] == [True] * EXPERTS
        drop(file, 2 * stride, 2 * stride)
        cached = [residency.cached(0, e) for e in range(EXPERTS)]
        if all(cached):
            pytest.skip("this file system drops nothing")
        assert cached == [True, True, False, False, True, True]
        # Half of one is not one.
        drop(file, 4 * stride, stride // 2)
        assert not residency.cached(0, 4)
        ((fd, offset, length, _),) = store.pieces(0, [3]).tolist()
        os.pread(fd, length, offset)
        assert residency.cached(0, 3)
        assert not residency.cached(0, 2)
    finally:
        store.close()
