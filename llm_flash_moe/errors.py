"""The engine's errors, as llm and click want them: one line for the user, never a traceback.

`llm chat` catches nothing but ClickException, callers of the Python API expect llm.ModelError;
so ours are both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import llm

from flash_moe.errors import FlashMoeError


class PluginError(click.ClickException, llm.ModelError):
    pass


@contextmanager
def shown() -> Iterator[None]:
    """Engine errors raised inside are shown as messages."""
    try:
        yield
    except FlashMoeError as error:
        raise PluginError(str(error)) from error
