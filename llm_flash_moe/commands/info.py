"""`llm flash-moe info`: what a model is and needs."""

from __future__ import annotations

import json

import click

from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.commands.describe import describe
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.progress import byte_bar
from llm_flash_moe.registry import Registry, folder_of


@click.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Read a pack against its checksums")
@AS_JSON
def info(name: str, verify: bool, as_json: bool) -> None:
    """Show what a model is and what it needs, without loading it."""
    from flash_moe import Checkpoint

    with as_click_errors():
        entry = Registry.of_user().get(name)
        checkpoint = Checkpoint(folder_of(name, entry))
        description = describe(name, checkpoint, entry.experts)
        faults: list[str] | None = None
        if verify:
            with byte_bar("Verifying", checkpoint.nbytes) as progress:
                faults = checkpoint.verify(progress)
    if as_json:
        plan = checkpoint.plan(entry.experts).to_json()
        checked = {} if faults is None else {"faults": faults}
        click.echo(json.dumps({"name": name, "path": entry.path, **plan, **checked}, indent=2))
    else:
        click.echo(description)
        click.echo(f"Folder: {entry.path}")
        for fault in faults or ():
            click.echo(fault, err=True)
        if faults == []:
            click.echo("Every file and record is as it was written.")
    if faults:
        raise PluginError("The pack is damaged. Remove it and pack the model again.")
