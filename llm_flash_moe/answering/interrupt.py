"""Ctrl-C in `llm chat` stops the reply, which is kept, and not the chat."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import click


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. A second one aborts, as the first does elsewhere: `llm prompt`
    must not end as if a reply that was cut off were whole."""
    pressed = threading.Event()
    context = click.get_current_context(silent=True)
    chatting = context is not None and context.info_name == "chat"
    if not chatting or threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return

    def press(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
