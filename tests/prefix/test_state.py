"""Every architecture's state can be taken, written, read and restored without a change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.state import NotSaved, Snapshot, put, take
from tests.architecture_configs import CONFIGS
from tests.architectures import random_model
from tests.prefix.conversations import bits, contents

# Longer than every window of these models, so that rotating caches have wrapped round.
TOKENS, MORE = list(range(1, 41)), 3


def run(model: nn.Module, tokens: list[int], cache: list[object]) -> mx.array:
    logits: mx.array = model(mx.array(tokens)[None], cache=cache)
    mx.eval(logits)
    return logits


def goes_on(model: nn.Module, cache: list[object], chunk_first: bool = True) -> list[bytes]:
    """A chunk and single tokens: caches write these in different ways, some in place."""
    singles = [[token] for token in TOKENS[7 : 7 + MORE]]
    parts = [TOKENS[:7], *singles] if chunk_first else [*singles, TOKENS[:7]]
    return [bits(run(model, part, cache)) for part in parts]


@pytest.mark.parametrize("name", CONFIGS)
def test_architectures_go_on_from_a_snapshot(name: str, tmp_path: Path) -> None:
    model, _ = random_model(name)
    cache = make_prompt_cache(model)
    run(model, TOKENS[:30], cache)
    run(model, TOKENS[30:], cache)
    snapshot = take(cache, TOKENS, (30, 40))
    before = contents(snapshot)
    expected = goes_on(model, cache)
    assert contents(snapshot) == before, "the running cache wrote into the snapshot"

    disk = DiskSnapshots(tmp_path, 1 << 30, "scope", {})
    disk.put("0" * 40, snapshot)
    read = disk.get("0" * 40, TOKENS, (30, 40))
    assert read is not None
    assert contents(read) == before
    for source in (snapshot, snapshot, read):
        restored = make_prompt_cache(model)
        put(source, restored)
        assert goes_on(model, restored) == expected
        restored = make_prompt_cache(model)
        put(source, restored)
        goes_on(model, restored, chunk_first=False)
    assert contents(snapshot) == before, "a restored cache wrote into the snapshot"


def test_room_to_grow_is_not_saved_but_restored() -> None:
    cache = KVCache()
    rows = mx.random.normal((1, 2, 10, 8))
    cache.update_and_fetch(rows, rows)
    assert cache.keys.shape[2] == 256
    snapshot = take([cache], range(10), ())
    assert [array.shape for array in snapshot.arrays] == [(1, 2, 10, 8)] * 2
    restored = KVCache()
    put(snapshot, [restored])
    assert restored.offset == 10
    assert bits(restored.keys) == bits(cache.keys)


@pytest.mark.parametrize("tokens", [3, 8, 13])
def test_a_cache_that_writes_in_place_reaches_no_snapshot(tokens: int) -> None:
    """A window wraps round in one array, token by token, and keys grow into their room."""

    def step(cache: list[Any]) -> None:
        row = mx.random.normal((1, 2, 1, 8))
        for layer in cache[:2]:
            layer.update_and_fetch(row, row)
        # mlx-lm replaces recurrent states, but a model could also write into them.
        cache[2][0][..., :1] = row[0, 0, 0, 0]

    def make() -> list[Any]:
        return [RotatingKVCache(8), KVCache(), ArraysCache(1)]

    running = make()
    running[2][0] = mx.zeros((1, 4))
    for _ in range(tokens):
        step(running)
    snapshot = take(running, range(tokens), ())
    before = contents(snapshot)
    step(running)
    assert contents(snapshot) == before
    for _ in range(2):
        restored = make()
        put(snapshot, restored)
        step(restored)
        assert contents(snapshot) == before


def test_an_empty_state_is_a_state() -> None:
    cache = [KVCache(), RotatingKVCache(8)]
    restored = [KVCache(), RotatingKVCache(8)]
    put(take(cache, (), ()), restored)
    assert [vars(layer) for layer in restored] == [vars(layer) for layer in cache]


def test_a_state_of_another_model_is_refused() -> None:
    snapshot = take([KVCache(), KVCache()], (), ())
    for other in ([KVCache()], [KVCache(), RotatingKVCache(8)]):
        with pytest.raises(NotSaved):
            put(snapshot, other)
    broken = Snapshot((), (), [{"class": "KVCache", "fields": {"keys": {"array": 5}}}], [])
    with pytest.raises(NotSaved):
        put(broken, [KVCache()])


def test_a_cache_of_unknown_types_is_not_saved() -> None:
    cache = KVCache()
    cache.keys = lambda: None
    with pytest.raises(NotSaved, match="contains a function"):
        take([cache], (), ())
