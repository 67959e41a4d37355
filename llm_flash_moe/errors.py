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
    """Errors of the engine and of the operating system raised inside are shown as messages."""
    try:
        yield
    except FlashMoeError as error:
        raise PluginError(str(error)) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise PluginError(f"{place}{error.strerror or error}.") from error
