"""`llm flash-moe models`: the list."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import BUILT_IN_ENTRIES, Entry, Registry


@click.command()
@AS_JSON
def models(as_json: bool) -> None:
    """List the models: built in, added, packed or made here."""
    with as_click_errors():
        entries = Registry.of_user().entries()
    if as_json:
        click.echo(json.dumps({name: _to_json(e) for name, e in entries.items()}, indent=2))
        return
    for name, entry in entries.items():
        click.echo(f"{name}  {entry.path}{_remarks(name, entry)}")
    if not entries.keys() - BUILT_IN_ENTRIES.keys():
        click.echo("Use a checkpoint of your own with: llm flash-moe add PATH")


def _remarks(name: str, entry: Entry) -> str:
    from flash_moe import Checkpoint

    path = Path(entry.path)
    remarks = [f"{entry.experts} experts a token"] if entry.experts else []
    if name in BUILT_IN_ENTRIES:
        remarks.append("built in")
    if requantized := Checkpoint(path).requantized:
        remarks.append(str(requantized))
    if not path.is_dir():
        remarks.append("the folder is gone")
    return "".join(f"  ({remark})" for remark in remarks)


def _to_json(entry: Entry) -> dict[str, Any]:
    from flash_moe import Checkpoint

    requantized = Checkpoint(Path(entry.path)).requantized
    changes = {"requantized": asdict(requantized)} if requantized else {}
    return {"path": entry.path, "experts": entry.experts, **changes}
