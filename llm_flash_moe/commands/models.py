"""`llm flash-moe models`: the list."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.commands.describe import size
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import BUILT_IN_ENTRIES, Entry, Registry, Unfinished


@click.command()
@AS_JSON
def models(as_json: bool) -> None:
    """List the models: built in, added, packed or made here."""
    with as_click_errors():
        registry = Registry.of_user()
        entries, begun = registry.entries(), registry.unfinished()
    if as_json:
        listed = {name: _to_json(e) for name, e in entries.items()}
        listed |= {name: _unfinished_to_json(work) for name, work in begun.items()}
        click.echo(json.dumps(listed, indent=2))
        return
    for name, entry in entries.items():
        click.echo(f"{name}  {entry.path}{_remarks(name, entry)}")
    for name, work in begun.items():
        click.echo(
            f"{name}  {work.folder}  (unfinished: {size(_left_by(work))} so far)\n"
            f"  Go on with: {work.command}\n  Or delete it: llm flash-moe remove {name}"
        )
    if not entries.keys() - BUILT_IN_ENTRIES.keys():
        click.echo(
            "Fetch one with: llm flash-moe pull ORG/REPO, or use a folder: llm flash-moe add PATH"
        )


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


def _unfinished_to_json(work: Unfinished) -> dict[str, Any]:
    return {
        "path": str(work.folder),
        "unfinished_bytes": _left_by(work),
        "command": work.command,
    }


def _left_by(work: Unfinished) -> int:
    from flash_moe import PullJob

    return PullJob.left_by(work.target)
