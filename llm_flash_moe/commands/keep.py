"""`llm flash-moe keep`: a model that stays in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

import click

from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import OPTIONS, given_options
from llm_flash_moe.durations import in_words, parse_duration
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.options import SETTINGS
from llm_flash_moe.progress import StatusLine
from llm_flash_moe.registry import Registry, folder_of


def _duration(context: click.Context, parameter: click.Parameter, value: str) -> float:
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    if seconds < 1:
        raise click.BadParameter(
            "choose a second or more. To free a model at once: llm flash-moe stop NAME"
        )
    return seconds


@click.command()
@click.argument("name")
@click.option(
    "--for",
    "seconds",
    default="30m",
    show_default=True,
    callback=_duration,
    metavar="TIME",
    help="How long after its last reply: 10m, 1h30m, 90 (seconds); -1 for ever",
)
@OPTIONS
def keep(name: str, seconds: float, options: Sequence[tuple[str, str]]) -> None:
    """Load a model, and keep it in memory.

    Later commands with this model, and with the same options for loading it, are answered by the
    process that holds it: the first word comes without a start. Options set by `llm models options`
    count here, too.
    """
    from llm.cli import get_model_options  # itself imports this file

    from flash_moe import hold

    with as_click_errors():
        entry = Registry.of_user().get(name)
        defaults = {k: v for k, v in get_model_options(name).items() if k in SETTINGS}
        settings = given_options([*defaults.items(), *options]).settings(entry.experts)
        loading = StatusLine("loading", " bytes")
        try:
            what = hold.Loading(folder_of(name, entry), settings, paths.prompts())
            news = hold.News(loading.update, loading.say)
            with closing(hold.start(what, name, seconds, news)) as held:
                held.wait()
        finally:
            loading.clear()
    if math.isinf(seconds):
        click.echo(f"{name} stays in memory until llm flash-moe stop {name}")
    else:
        click.echo(f"{name} stays in memory until it was not used for {in_words(seconds)}.")
