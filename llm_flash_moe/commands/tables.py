"""Tables of an engine's report, on stdout."""

from __future__ import annotations

from collections.abc import Sequence

import click


def print_table(
    title: str | None, columns: Sequence[tuple[str, bool]], rows: Sequence[tuple[str, ...]]
) -> None:
    """After an empty line, unless there is no title. Columns are (name, whether it is aligned to
    the right)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name, right in columns:
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if title is not None:
        click.echo(f"\n{title}" if title else "")
    if rows:
        Console(highlight=False).print(table)
