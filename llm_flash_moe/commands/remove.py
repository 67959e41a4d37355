"""`llm flash-moe remove`: take a model off the list."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from llm_flash_moe import paths
from llm_flash_moe.commands.describe import size
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import Registry, Unfinished


@click.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask before deleting files")
def remove(name: str, yes: bool) -> None:
    """Remove a model from the list, and its saved prompts.

    Its memory is freed, if it is kept there. Of a pull or a pack that is unfinished, what it left
    is deleted. Its files are deleted only if llm flash-moe wrote them into llm's own folder.
    """
    from flash_moe import PromptFolder, hold

    with as_click_errors():
        registry = Registry.of_user()
        if name in (begun := registry.unfinished()):
            _discard(registry, name, begun[name], yes)
            return
        entry = registry.get(name)
        ours = entry.managed and Path(entry.path).is_dir()
        if ours and not yes:
            click.confirm(f"Delete {entry.path} as well?", abort=True)
        for holder in hold.holders():
            if holder.holds(Path(entry.path)):
                hold.stop(holder)
        if ours:
            # Before the entry goes: what a failure leaves can be removed again.
            shutil.rmtree(entry.path)
        registry.remove(name)
        if entry.path not in {other.path for other in registry.entries().values()}:
            PromptFolder(paths.prompts()).clear(entry.path)
    stay = f"; its files stay in {entry.path}" if Path(entry.path).is_dir() else ""
    click.echo(f"Removed {name}{stay}.")


def _discard(registry: Registry, name: str, work: Unfinished, yes: bool) -> None:
    """What a pull or a pack left that was not finished."""
    from flash_moe import PullJob

    nbytes = size(PullJob.left_by(work.target))
    if not yes:
        click.confirm(f"Delete the unfinished {work.folder} ({nbytes})?", abort=True)
    PullJob.discard(work.target)
    registry.forget(name)
    click.echo(f"Removed the unfinished {name}; {nbytes} are free again.")
