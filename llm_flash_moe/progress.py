"""Progress on stderr, for a person; pipes and logs get lines of what takes hours, and no bars."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Between lines of progress in a log.
LINE_SECONDS = 30


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with GB/s and time left; yields a function that takes the bytes just done."""
    with _bar(title, total, "DownloadColumn", "TransferSpeedColumn") as advance:
        yield advance


@contextmanager
def lines_or_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """The same; and without a terminal a line each half minute, for what takes hours."""
    if sys.stderr.isatty():
        with byte_bar(title, total) as advance:
            yield advance
        return
    start = last = time.monotonic()
    done = 0

    def line(amount: int) -> None:
        nonlocal last, done
        done += amount
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last, rate = now, done / (now - start)
            left = (total - done) / rate / 60
            sys.stderr.write(
                f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, "
                f"{left:.0f} minutes left\n"
            )
            sys.stderr.flush()

    yield line


@contextmanager
def item_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with a count and time left; yields a function that takes the items just done."""
    with _bar(title, total, "MofNCompleteColumn") as advance:
        yield advance


@contextmanager
def _bar(title: str, total: int, *columns: str) -> Iterator[Callable[[int], None]]:
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich import progress
    from rich.console import Console

    parts = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        *(getattr(progress, column)() for column in columns),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*parts, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class StatusLine:
    """A bar that is there only while something long runs, and gone before the first word.

    `update(done, total)` may be called often; it draws nothing for work shorter than a moment.
    """

    def __init__(self, title: str, unit: str = "") -> None:
        self._title, self._unit = title, unit
        self._shown = False

    def update(self, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if done >= total:
            self.clear()
            return
        self.say(f"{self._title} {100 * done // total} % of {total:,}{self._unit}")

    def say(self, text: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[2m{text}\x1b[0m\x1b[K")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
