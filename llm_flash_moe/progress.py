"""Progress on stderr, and only for a person: pipes and logs get none."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def byte_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with GB/s and time left; yields a function to be told of more bytes."""
    if not sys.stderr.isatty():
        yield lambda nbytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


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
        percent = 100 * done // total
        sys.stderr.write(
            f"\r\x1b[2m{self._title} {percent} % of {total:,}{self._unit}\x1b[0m\x1b[K"
        )
        sys.stderr.flush()
        self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shown = False
