"""`llm flash-moe cache`: prompts saved on disk for a later command."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.commands.describe import size
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.registry import Registry


@click.command()
@click.argument("name", required=False)
@click.option("--clear", is_flag=True, help="Remove them: all, or those of the model NAME")
@AS_JSON
def cache(name: str | None, clear: bool, as_json: bool) -> None:
    """Show which prompts are saved on disk, and for which models.

    A conversation that goes on, or another with the same instructions, is not read from its start
    again. The files contain the conversations. The least recently used are removed first. With
    --no-log, llm logs off or -o save_prompts 0 nothing is saved.
    """
    from flash_moe import PromptFolder

    with as_click_errors():
        folder, registry = PromptFolder(paths.prompts()), Registry.of_user()
        path = registry.get(name).path if name else None
        freed = folder.clear(path) if clear else None
        groups = folder.by_model()
        if path is not None:
            groups = [group for group in groups if group.model.get("path") == path]
        names = {entry.path: name for name, entry in registry.entries().items()}
    summary = {
        "folder": str(folder.path),
        "prompts": sum(group.prompts for group in groups),
        "bytes": sum(group.nbytes for group in groups),
        "models": [
            {
                "model": names.get(str(group.model.get("path"))),
                **group.model,
                "prompts": group.prompts,
                "tokens": group.tokens,
                "bytes": group.nbytes,
                "last_use": _time(group.last_use),
            }
            for group in groups
        ],
        **({} if freed is None else {"freed_bytes": freed}),
    }
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _print(summary)


def _print(summary: dict[str, Any]) -> None:
    if "freed_bytes" in summary:
        click.echo(f"Removed {size(summary['freed_bytes'])}.")
    if not summary["prompts"]:
        click.echo(f"No prompts are saved in {summary['folder']}.")
        return
    prompts = _count(summary["prompts"])
    click.echo(f"{prompts}, {size(summary['bytes'])}, in {summary['folder']}")
    for line in summary["models"]:
        click.echo(
            f"{line['model'] or line.get('path', 'an unnamed model')}  "
            f"K={line.get('experts_per_token')}, {line.get('bits')}, {line.get('runtime')}: "
            f"{_count(line['prompts'])} of up to {line['tokens']:,} tokens, "
            f"{size(line['bytes'])}, last used {line['last_use']}"
        )


def _count(number: int) -> str:
    return f"{number} prompt{'' if number == 1 else 's'}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
