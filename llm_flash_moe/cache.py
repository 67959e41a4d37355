"""`llm flash-moe cache`: the prompts that are kept on disk for a later command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_flash_moe import places
from llm_flash_moe.describe import size
from llm_flash_moe.errors import shown

if TYPE_CHECKING:
    from flash_moe.prefix.folder import Entry


def folder() -> Path:
    return places.home() / "prompts"


@click.command()
@click.option("--clear", is_flag=True, help="Remove them all")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def cache(clear: bool, as_json: bool) -> None:
    """Show which prompts are kept on disk, and for which models.

    A conversation that goes on, or another with the same instructions, is not read from its start
    again. Files hold what was said. The least recently used are removed first.
    """
    from flash_moe.prefix.folder import clear as remove
    from flash_moe.prefix.folder import entries

    with shown():
        freed = remove(folder()) if clear else None
        kept = entries(folder())
        names = {entry.path: name for name, entry in places.registry().entries().items()}
    found = {
        "folder": str(folder()),
        "prompts": len(kept),
        "bytes": sum(entry.nbytes for entry in kept),
        "models": _by_model(kept, names),
        **({} if freed is None else {"freed_bytes": freed}),
    }
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _by_model(kept: Sequence[Entry], names: dict[str, str]) -> list[dict[str, Any]]:
    """One line a model, K, bits and runtime: what one of these keeps is of no use to another."""
    groups: dict[str, list[Entry]] = {}
    for entry in kept:
        groups.setdefault(json.dumps(entry.model, sort_keys=True), []).append(entry)
    return [
        {
            "model": names.get(str(group[0].model.get("path"))),
            **group[0].model,
            "prompts": len(group),
            "tokens": max(entry.tokens for entry in group),
            "bytes": sum(entry.nbytes for entry in group),
            "last_use": _time(max(entry.last_use for entry in group)),
        }
        for group in groups.values()
    ]


def _print(found: dict[str, Any]) -> None:
    if "freed_bytes" in found:
        click.echo(f"Removed {size(found['freed_bytes'])}.")
    if not found["prompts"]:
        click.echo(f"No prompts are kept in {found['folder']}.")
        return
    click.echo(f"{_count(found['prompts'])}, {size(found['bytes'])}, in {found['folder']}")
    for line in found["models"]:
        click.echo(
            f"{line['model'] or line.get('path', 'a model that is not named')}  "
            f"K={line.get('experts_per_token')}, {line.get('bits')}, {line.get('runtime')}: "
            f"{_count(line['prompts'])} of up to {line['tokens']:,} tokens, "
            f"{size(line['bytes'])}, last used {line['last_use']}"
        )


def _count(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
