"""A token's time by part. MLX computes lazily, so that parts can only be told apart by evaluating
at the borders between them; that takes away overlap, so a token measured so is slower."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import TracebackType
from typing import Any, cast

import mlx.core as mx

from flash_moe.kernels.interface import Kernels
from flash_moe.kernels.spec import U32
from flash_moe.model.load import StreamedModel
from flash_moe.stream.streamed import StreamedLayer


@dataclass(slots=True)
class Parts:
    """Seconds. `mixers`: from the experts of one layer to the router of the next, on the host:
    Python, launches, and what computes at once. `router`: waiting for its choice, and so for what
    computes lazily before it. `ours`: all that is left, between the router's choice and the
    experts' kernels."""

    reading: float = 0.0
    mixers: float = 0.0
    router: float = 0.0
    experts: float = 0.0
    head: float = 0.0
    sampling: float = 0.0
    ours: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.to_json().values())

    def shares(self) -> dict[str, float]:
        """Of all the time; they sum to one."""
        total = self.total
        return {name: seconds / total for name, seconds in self.to_json().items()}

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def mean(cls, several: list[Parts]) -> Parts:
        return cls(
            *(
                sum(getattr(one, part.name) for one in several) / len(several)
                for part in fields(cls)
            )
        )


# Of the kernels' calls, which part each is.
CALLS = {"route": "router", "rows": "experts", "mixture": "experts", "combine": "experts"}


class Borders:
    """In a `with`, a model's tokens are computed part by part. `begin`, let the model compute,
    `logits`, sample, `end`. The results stay the same.

    Experts of layers that no kernel covers, in a model where kernels cover others, count as what
    comes after them."""

    def __init__(self, model: StreamedModel) -> None:
        self._streamer = model.streamer
        self._parts = Parts()
        self._start = self._last = 0.0
        self._reading = self._waited = 0.0

    def __enter__(self) -> Borders:
        streamer = self._streamer
        self._own = streamer.kernels, streamer.observer, streamer.recorder
        if streamer.kernels is None:
            streamer.recorder = self._record
        else:
            streamer.kernels = cast(Kernels, _Bordered(streamer.kernels, self._timed))
        streamer.observer = self._chosen
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        streamer = self._streamer
        streamer.kernels, streamer.observer, streamer.recorder = self._own

    def begin(self) -> None:
        self._parts = Parts()
        self._reading = self._streamer.reader.counters.seconds
        self._waited = self._streamer.readback_seconds
        self._start = self._last = time.perf_counter()

    def logits(self, logits: mx.array) -> None:
        mx.eval(logits)
        self._parts.head = self._since_last()

    def end(self) -> Parts:
        """Everything is evaluated."""
        parts = self._parts
        parts.sampling = self._since_last()
        parts.reading = self._streamer.reader.counters.seconds - self._reading
        parts.ours = self._last - self._start - parts.total
        return parts

    def _chosen(self, layer: int, experts: U32) -> None:
        """The router's choice is there."""
        waited = self._streamer.readback_seconds - self._waited
        self._waited += waited
        self._parts.router += waited
        self._parts.mixers += self._since_last() - waited
        if observer := self._own[1]:
            observer(layer, experts)

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Evaluates what a kernel gives; a router's time is no mixer's."""
        start = time.perf_counter()
        output = call(*arguments, **named)
        mx.eval(output)
        end = time.perf_counter()
        setattr(self._parts, part, getattr(self._parts, part) + end - start)
        self._last = end if part == "experts" else self._last + end - start
        return output

    def _record(
        self, layer: StreamedLayer, experts: list[int], x: mx.array, slots: mx.array
    ) -> mx.array:
        return cast(mx.array, self._timed("experts", layer.switch, x, slots))

    def _since_last(self) -> float:
        last, self._last = self._last, time.perf_counter()
        return self._last - last


class _Bordered:
    """Kernels whose results are evaluated, and timed, at once."""

    def __init__(self, kernels: Kernels, timed: Callable[..., Any]) -> None:
        self._kernels, self._timed = kernels, timed

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._kernels, name)
        return partial(self._timed, CALLS[name], value) if name in CALLS else value
