"""What one token costs, hot, mixed and cold: as it is, and again part by part.

The text is the model's own, drawn at random with a fixed seed, and the same in every state: so its
experts are used as often as in a reply, and what is hot was read for the very same words.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import mlx.core as mx

from flash_moe.callbacks import Notice, no_notice
from flash_moe.decode.sampling import Sampler
from flash_moe.measure.eviction import Eviction
from flash_moe.measure.parts import Borders, Parts
from flash_moe.measure.raw_reads import Roofline
from flash_moe.model.load import StreamedModel
from flash_moe.options import Sampling
from flash_moe.process import bytes_from_disk
from flash_moe.stream.reader import Reader
from flash_moe.stream.store import Pieces

TEXT = Sampling(temperature=1.0, seed=0)


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Medians over tokens. `nbytes` are the experts that one used, `mapped` of them computed where
    the page cache had them, `from_disk` fetched from the disk (None: the system does not tell).
    `reading` are seconds. `parts` are means of a second run, slower because nothing overlaps in
    it."""

    state: str
    tokens: int
    seconds: float
    nbytes: float
    mapped: float
    from_disk: float | None
    reading: float
    parts: Parts

    @property
    def hit_rate(self) -> float | None:
        if self.from_disk is None or not self.nbytes:
            return None
        return 1 - self.from_disk / self.nbytes

    @property
    def rate(self) -> float | None:
        """Bytes a second while reading; None where all was mapped."""
        read = self.nbytes - self.mapped
        return read / self.reading if read and self.reading else None

    def floor(self, roofline: Roofline) -> float | None:
        """Seconds that raw reads of the same bytes take."""
        if self.from_disk is None:
            return None
        return roofline.seconds(self.from_disk, self.nbytes - self.from_disk)

    def share_of_raw(self, roofline: Roofline) -> float | None:
        """How fast what was read came, of what raw reads do."""
        if self.rate is None or self.from_disk is None:
            return None
        read = self.nbytes - self.mapped
        from_disk = min(self.from_disk, read)
        seconds = roofline.seconds(from_disk, read - from_disk)
        return None if seconds is None else seconds / self.reading

    def to_json(self, roofline: Roofline) -> dict[str, Any]:
        return {
            **asdict(self),
            "tokens_per_second": 1 / self.seconds,
            "hit_rate": self.hit_rate,
            "bytes_per_second": self.rate,
            "floor": self.floor(roofline),
            "share_of_raw": self.share_of_raw(roofline),
            "shares": self.parts.shares(),
        }


@dataclass(frozen=True, slots=True)
class _Sample:
    """One token. `from_disk` is None where the system does not tell."""

    seconds: float
    nbytes: int
    mapped: int
    from_disk: int | None
    reading: float


class TokenBench:
    """Every state's run is `2 * count` tokens long, the second half of which counts. Leaves the
    model as it was."""

    def __init__(
        self, model: StreamedModel, count: int, evict: Eviction, notice: Notice = no_notice
    ) -> None:
        self.model, self.count, self.evict, self._notice = model, count, evict, notice
        self.words = 0
        self._title = "writing a text"
        self._text = self._write(2 * count)

    def measure(self) -> list[TokenCost]:
        """In this order, because the text has just been read. Without eviction neither mixed nor
        cold."""
        costs = [self.cost("hot")]
        with nothing_read(self.model):
            costs.append(self.cost("nothing read"))
        if self.evict.why_not is None:
            costs.insert(1, self.cost("mixed", first=self.evict))
            costs.insert(2, self.cost("cold", each=self.evict))
        return costs

    def cost(
        self,
        state: str,
        first: Callable[[], None] | None = None,
        each: Callable[[], None] | None = None,
    ) -> TokenCost:
        """`first` is called before the run, `each` before every token that counts."""
        self._title = f"a token, {state}"
        samples, _ = self._run(first, each)
        self._title = f"a token by part, {state}"
        with Borders(self.model) as borders:
            _, parts = self._run(first, each, borders)
        from_disk = [sample.from_disk for sample in samples if sample.from_disk is not None]
        return TokenCost(
            state,
            self.count,
            statistics.median(sample.seconds for sample in samples),
            statistics.median(sample.nbytes for sample in samples),
            statistics.median(sample.mapped for sample in samples),
            statistics.median(from_disk) if from_disk else None,
            statistics.median(sample.reading for sample in samples),
            Parts.mean(parts),
        )

    def _write(self, length: int) -> list[int]:
        """The model's own text, from a word at random. Every word goes through the model, so that
        what it needs has been read."""
        with self._replying():
            logits = self.model(mx.array([[0]]), cache=self.model.make_cache())
            self.words = int(logits.shape[-1])
            cache, sample = self.model.make_cache(), Sampler(TEXT)
            text = [random.Random(0).randrange(self.words)]
            for number in range(length):
                self._notice(f"{self._title}, {number} of {length} tokens")
                text.append(self._token(text[-1], cache, sample))
        return text[:length]

    def _run(
        self,
        first: Callable[[], None] | None,
        each: Callable[[], None] | None,
        borders: Borders | None = None,
    ) -> tuple[list[_Sample], list[Parts]]:
        samples, parts = list[_Sample](), list[Parts]()
        if first is not None:
            first()
        with self._replying():
            cache, sample = self.model.make_cache(), Sampler(TEXT)
            for number, word in enumerate(self._text):
                self._notice(f"{self._title}, {number} of {len(self._text)}")
                if each is not None and number >= self.count:
                    each()
                watch = _Watch(self.model)
                self._token(word, cache, sample, borders)
                parts += [borders.end()] if borders is not None else []
                samples.append(watch.stop())
        return samples[self.count :], parts[self.count :]

    def _token(
        self, word: int, cache: list[Any], sample: Sampler, borders: Borders | None = None
    ) -> int:
        """As the loop that makes replies computes one."""
        if borders is not None:
            borders.begin()
        logits = self.model(mx.array([[word]]), cache=cache)[:, -1, :]
        if borders is not None:
            borders.logits(logits)
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return cast(int, sample(log_probabilities).item())

    @contextmanager
    def _replying(self) -> Iterator[None]:
        streamer = self.model.streamer
        phase, streamer.phase = streamer.phase, "reply"
        try:
            yield
        finally:
            streamer.phase = phase


class _Watch:
    """Starts when it is made."""

    def __init__(self, model: StreamedModel) -> None:
        self._counters = model.streamer.reader.counters
        self._before = replace(self._counters)
        self._disk, self._start = bytes_from_disk(), time.perf_counter()

    def stop(self) -> _Sample:
        seconds = time.perf_counter() - self._start
        now, before, disk = self._counters, self._before, bytes_from_disk()
        nbytes, from_disk = now.nbytes - before.nbytes, None
        if disk is not None and self._disk is not None:
            # Read-ahead may fetch more than was asked for.
            from_disk = min(disk - self._disk, nbytes)
        mapped, reading = now.mapped - before.mapped, now.seconds - before.seconds
        return _Sample(seconds, nbytes, mapped, from_disk, reading)


class _NoReader(Reader):
    """What is in the bank stays there."""

    def read(self, pieces: Pieces, into: memoryview) -> None:
        pass


@contextmanager
def nothing_read(model: StreamedModel) -> Iterator[None]:
    """Within, a token computes with whatever is in the bank: all of its time is the engine's."""
    streamer = model.streamer
    own = streamer.reader, streamer.mapping
    streamer.bank.drain()
    streamer.reader, streamer.mapping = _NoReader(native=False), None
    try:
        yield
    finally:
        streamer.bank.drain()
        streamer.reader, streamer.mapping = own
