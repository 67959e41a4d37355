"""The roofline: that raw reads get the bytes of records, and the arithmetic of floors."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.measure.bench_tokens import TokenCost
from flash_moe.measure.eviction import Eviction
from flash_moe.measure.parts import Parts
from flash_moe.measure.raw_reads import RawReads, Roofline, _lay_out, measure_roofline
from flash_moe.model.load import StreamedModel, load
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import AT, LENGTH, OFFSET

rates = st.floats(1e6, 1e12)
sizes = st.integers(0, 10**10)


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> Iterator[StreamedModel]:
    model = load(demo_folder)
    yield model
    model.close()


@pytest.fixture
def raw(model: StreamedModel) -> Iterator[RawReads]:
    raw = RawReads.of(model)
    yield raw
    raw.close()


def test_a_token_of_raw_reads_is_a_tokens_records(model: StreamedModel, raw: RawReads) -> None:
    plan, tokens = model.plan, [raw._token() for _ in range(2)]
    for layers in tokens:
        assert len(layers) == plan.layers
        assert sum(int(pieces[:, LENGTH].sum()) for pieces in layers) == plan.token_bytes
    assert any(not np.array_equal(one, other) for one, other in zip(*tokens, strict=True)), (
        "the same experts each time"
    )


def test_whole_pages_hold_the_records(raw: RawReads) -> None:
    """Read past the page cache where that is possible, from a file of any length."""
    try:
        wide = [(pieces, raw._whole_pages(pieces)) for pieces in raw._token()]
    except OSError:
        pytest.skip("this file system reads nothing past the page cache")
    reader = Reader()
    for pieces, pages in wide:
        buffer = memoryview(mmap.mmap(-1, _lay_out(pages)))
        reader.read(pages, buffer)
        for (file, offset, length, _), page in zip(pieces.tolist(), pages.tolist(), strict=True):
            assert page[OFFSET] % 4096 == page[LENGTH] % 4096 == page[AT] % 4096 == 0
            got = buffer[page[AT] : page[AT] + page[LENGTH]][offset - page[OFFSET] :][:length]
            assert len(got) > length - 4096
            assert bytes(got) == os.pread(file, len(got), offset)
    reader.close()


def test_the_models_own_counters_are_left_alone(model: StreamedModel) -> None:
    before = replace(model.streamer.reader.counters)
    roofline = measure_roofline(model, Eviction(model.streamer), copy=1e9)
    assert model.streamer.reader.counters == before
    assert roofline.cached > 0
    assert roofline.copy == 1e9


def test_a_file_system_without_direct_reads(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.open

    def refuse(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument", path)
        return own(path, flags, *arguments, **named)

    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no such flag")
    monkeypatch.setattr(os, "open", refuse)
    roofline = measure_roofline(model, Eviction(model.streamer), copy=1e9)
    assert roofline.direct is None
    assert roofline.disk == roofline.cold


# Floors -------------------------------------------------------------------------------------------


@given(rates, rates, rates, sizes, sizes)
def test_a_floor_is_the_better_way_to_the_disk_and_the_page_cache(
    direct: float, cold: float, cached: float, from_disk: int, from_cache: int
) -> None:
    roofline = Roofline(direct, cold, cached, copy=1e9)
    expected = from_disk / max(direct, cold) + from_cache / cached
    assert roofline.seconds(from_disk, from_cache) == pytest.approx(expected)
    unknown = Roofline(None, None, cached, copy=1e9)
    if from_disk:
        assert unknown.seconds(from_disk, from_cache) is None
    else:
        assert unknown.seconds(0, from_cache) == pytest.approx(expected)


def cost(nbytes: int, mapped: int, from_disk: int | None, reading: float) -> TokenCost:
    return TokenCost("hot", 1, 1.0, nbytes, mapped, from_disk, reading, Parts(ours=1.0))


@given(rates, rates, st.integers(1, 10**10), st.data())
def test_reading_as_fast_as_raw_reads_is_all_of_them(
    cold: float, cached: float, nbytes: int, data: st.DataObject
) -> None:
    """Whatever was mapped and needed no reading."""
    roofline = Roofline(None, cold, cached, copy=1e9)
    read = data.draw(st.integers(1, nbytes))
    from_disk = data.draw(st.integers(0, read))
    seconds = roofline.seconds(from_disk, read - from_disk)
    assert seconds is not None
    one = cost(nbytes, nbytes - read, from_disk, seconds)
    assert one.share_of_raw(roofline) == pytest.approx(1)
    twice = cost(nbytes, nbytes - read, from_disk, 2 * seconds)
    assert twice.share_of_raw(roofline) == pytest.approx(0.5)
    assert one.rate == pytest.approx(read / seconds)
    floor = one.floor(roofline)
    assert floor is not None
    assert floor >= seconds or floor == pytest.approx(seconds)
    assert one.hit_rate == 1 - from_disk / nbytes


def test_what_is_not_known_stays_unknown() -> None:
    roofline = Roofline(1e9, 1e9, 1e10, copy=1e9)
    untold = cost(1000, 0, None, 1.0)
    assert (untold.hit_rate, untold.floor(roofline), untold.share_of_raw(roofline)) == (None,) * 3
    mapped = cost(1000, 1000, 0, 1e-6)
    assert (mapped.rate, mapped.share_of_raw(roofline), mapped.hit_rate) == (None, None, 1)
