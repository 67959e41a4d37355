"""`llm flash-moe stop`: free what models in memory take."""

from __future__ import annotations

from pathlib import Path

import click

from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import Registry


@click.command()
@click.argument("name", required=False)
def stop(name: str | None) -> None:
    """Free the memory of a model that is kept there, or of all of them.

    A reply that it is making breaks off.
    """
    from flash_moe import hold

    with as_click_errors():
        holders = hold.holders()
        if name is not None and name not in {holder.name for holder in holders}:
            path = Path(Registry.of_user().get(name).path)
            holders = [holder for holder in holders if holder.holds(path)]
        elif name is not None:
            holders = [holder for holder in holders if holder.name == name]
        for holder in holders:
            hold.stop(holder)
            click.echo(f"Freed {holder.name}.")
    if not holders:
        click.echo("No model is kept in memory." if name is None else f"{name} is not in memory.")
