"""`llm flash-moe path`: where things are."""

from __future__ import annotations

import click

from llm_flash_moe import paths
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import Registry


@click.command()
@click.argument("name", required=False)
def path(name: str | None) -> None:
    """Print the folder of a model, or the folder of everything that is written here."""
    with as_click_errors():
        click.echo(Registry.of_user().get(name).path if name else paths.home())
