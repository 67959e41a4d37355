"""`llm flash-moe add`: use a model where it is."""

from __future__ import annotations

from pathlib import Path

import click

from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import EXPERTS, NAME, PATH
from llm_flash_moe.commands.describe import describe
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.registry import Entry, Registry


@click.command()
@click.argument("path", type=PATH)
@NAME
@EXPERTS
def add(path: Path, name: str | None, experts: int | None) -> None:
    """Use a checkpoint folder or a pack where it is, without a copy.

    PATH is a folder with config.json and model*.safetensors, as downloaded, or one that
    `llm flash-moe pack` wrote.
    """
    from flash_moe import Checkpoint

    with as_click_errors():
        if len(path.parts) == 2 and not path.exists() and not path.is_absolute():
            raise PluginError(
                f"There is no folder {path} here. To fetch a repository of that name: "
                f"llm flash-moe pull {path}"
            )
        path, name = path.expanduser().resolve(), name or paths.default_name(path)
        registry = Registry.of_user()
        registry.require_free(name)
        checkpoint = Checkpoint(path)
        description = describe(name, checkpoint, experts)
        checkpoint.require_tokenizer()
        registry.add(name, Entry(str(path), experts))
    click.echo(description)
    click.echo(f'Ready: llm -m {name} "your prompt"')
