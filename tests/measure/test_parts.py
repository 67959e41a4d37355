"""Which part of a token took the time, by a clock that goes on only where the test says so; and
that a model is left as it was, whatever happens in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_moe.kernels.interface import Kernels
from flash_moe.measure.bench_tokens import TokenBench, nothing_read
from flash_moe.measure.eviction import Eviction
from flash_moe.measure.parts import Borders, Parts
from flash_moe.model.load import StreamedModel, load
from flash_moe.options import Settings
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import Pieces
from tests.devices import RUNTIMES
from tests.strategies import TINY, tiny_checkpoint

LAYERS = TINY.layers
seconds = st.floats(0, 1e3)


@pytest.fixture(scope="module", params=RUNTIMES)
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StreamedModel]:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("parts") / "tiny", seed=3)
    model = load(folder, Settings(runtime=request.param))
    yield model
    model.close()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def slow(self, seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same, which takes so long."""

        def slowly(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return call(*arguments, **named)

        return slowly


class SlowKernels:
    def __init__(self, kernels: Kernels, clock: Clock) -> None:
        self.one_hand_over = kernels.one_hand_over
        self.prefers_mlx = kernels.prefers_mlx
        self.route = clock.slow(100, kernels.route)
        self.mixture = clock.slow(1000, kernels.mixture)


class SlowReader(Reader):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def read(self, pieces: Pieces, into: memoryview) -> None:
        super().read(pieces, into)
        self.clock.now += 10
        self.counters.seconds += 10


def test_every_part_has_what_it_took(model: StreamedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer, clock = model.streamer, Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(streamer, "reader", SlowReader(clock))
    monkeypatch.setattr(streamer, "mapping", None)
    monkeypatch.setattr(streamer, "observer", lambda layer, chosen: None)
    experts, router = 0, 0
    if streamer.kernels is not None:
        monkeypatch.setattr(
            streamer, "kernels", cast(Kernels, SlowKernels(streamer.kernels, clock))
        )
        experts, router = 1000, 100
    head = mx.argmax
    with Borders(model) as borders:
        borders.begin()
        clock.now += 2  # Python, before the first router
        logits = model(mx.array([[7]]), cache=model.make_cache())
        clock.now += 3
        borders.logits(logits)
        clock.slow(5, head)(logits)
        parts = borders.end()
    expected = Parts(
        reading=10 * LAYERS,
        mixers=2,
        router=router * LAYERS,
        experts=experts * LAYERS,
        head=3,
        sampling=5,
    )
    assert parts == expected
    assert parts.total == clock.now


@given(st.lists(st.builds(Parts, *[seconds] * 7), min_size=1))
def test_parts_add_up(several: list[Parts]) -> None:
    mean = Parts.mean(several)
    assert mean.total == pytest.approx(sum(parts.total for parts in several) / len(several))
    if mean.total:
        assert sum(mean.shares().values()) == pytest.approx(1)


def test_borders_change_no_bit(model: StreamedModel) -> None:
    own = model(mx.array([[7, 9, 11]]), cache=model.make_cache())
    with Borders(model) as borders:
        borders.begin()
        same = model(mx.array([[7, 9, 11]]), cache=model.make_cache())
    assert mx.array_equal(own, same)


def state(model: StreamedModel) -> tuple[Any, ...]:
    streamer = model.streamer
    limit = streamer.mapping.limit if streamer.mapping else None
    return (
        *(streamer.kernels, streamer.observer, streamer.recorder, streamer.reader),
        *(streamer.mapping, streamer.phase, streamer.bank, limit),
    )


@pytest.mark.parametrize("context", [Borders, nothing_read])
def test_an_error_leaves_a_model_as_it_was(
    model: StreamedModel, context: Callable[[StreamedModel], Any]
) -> None:
    before = state(model)

    def fail() -> None:
        with context(model):
            model(mx.array([[7]]), cache=model.make_cache())
            assert state(model) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert state(model) == before


def test_ctrl_c_anywhere_leaves_a_model_as_it_was(model: StreamedModel) -> None:
    """At every token of every state, one after the other."""
    before, evict, left = state(model), Eviction(model.streamer), 0
    logits = model(mx.array([[7]]), cache=model.make_cache())

    def hear(text: str) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    stops = 0
    while left <= 0:
        stops += 1
        left = stops
        try:
            TokenBench(model, 1, evict, hear).measure()
        except KeyboardInterrupt:
            left = 0
        assert state(model) == before
    assert stops > 10
    assert mx.array_equal(model(mx.array([[7]]), cache=model.make_cache()), logits)
