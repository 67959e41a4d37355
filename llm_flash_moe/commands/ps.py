"""`llm flash-moe ps`: which models are in memory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.commands.describe import size
from llm_flash_moe.commands.tables import print_table
from llm_flash_moe.durations import in_words
from llm_flash_moe.errors import as_click_errors

if TYPE_CHECKING:
    from flash_moe import hold

COLUMNS = (
    *(("model", False), ("memory", True), ("since", False), ("until", False)),
    ("options", False),
)


@click.command()
@AS_JSON
def ps(as_json: bool) -> None:
    """Show which models are kept in memory, until when, and how much they take.

    Memory is what the process has in all, pages of the system's cache that it uses included.
    """
    from flash_moe import hold

    with as_click_errors():
        holders = hold.holders()
    if as_json:
        models = [asdict(one) | {"resident_bytes": one.resident_bytes} for one in holders]
        click.echo(json.dumps(models, indent=2))
    elif holders:
        print_table(None, COLUMNS, [_row(holder) for holder in holders])
    else:
        click.echo("No model is kept in memory. Keep one with: llm flash-moe keep NAME")


def _row(holder: hold.Holder) -> tuple[str, ...]:
    nbytes = holder.resident_bytes
    memory = "?" if nbytes is None else size(nbytes)
    return (holder.name, memory, _moment(holder.since), _until(holder), holder.settings)


def _until(holder: hold.Holder) -> str:
    if holder.answering:
        return "answering now"
    if holder.until is None:
        return "stopped"
    left = max(0.0, holder.until - time.time())
    return f"{_moment(holder.until)} (in {in_words(left)})"


def _moment(seconds: float) -> str:
    """With its day, unless that is today."""
    moment = datetime.fromtimestamp(seconds)
    today = moment.date() == datetime.now().date()
    return f"{moment:%H:%M}" if today else f"{moment:%Y-%m-%d %H:%M}"
