"""`llm flash-moe bench`: how fast a model is here, where its time goes, what the disk could do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from llm_flash_moe.commands.arguments import AS_JSON, OPTIONS, PATH, expanded, given_options
from llm_flash_moe.commands.tables import print_table
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.progress import StatusLine
from llm_flash_moe.registry import Registry

UNITS = {"M": 10**6, "G": 10**9, "T": 10**12, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def _size(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """40G, 1.5GB, 16GiB → bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT]i?)B?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size: write 40G, or 16GiB.")
    return int(float(match[1]) * UNITS[match[2]])


def _lengths(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """32,512 → (32, 512); nothing → ()."""
    lengths = text.split(",") if text else []
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", length) for length in lengths):
        raise click.BadParameter(f"{text!r}: write numbers of tokens, as 32,512.")
    return tuple(map(int, lengths))


@click.command()
@click.argument("name")
@OPTIONS
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Tokens to measure in each state of the page cache",
)
@click.option(
    "--prompts",
    callback=_lengths,
    default="32,512",
    show_default=True,
    metavar="N,N…",
    help="Prompts to read, in tokens; an empty text for none",
)
@click.option(
    "--memory",
    callback=_size,
    metavar="SIZE",
    help="Hold the machine to so much memory, page cache included: 40G",
)
@click.option("--svg", type=PATH, help="Draw a token's time by part into this file")
@AS_JSON
def bench(
    name: str,
    options: tuple[tuple[str, str], ...],
    tokens: int,
    prompts: tuple[int, ...],
    memory: int | None,
    svg: Path | None,
    as_json: bool,
) -> None:
    """Measure how fast a model is here, and where its time goes.

    NAME is a model's name or a checkpoint's folder. Raw reads of as many experts as a token has
    come first. Then tokens: hot (all experts in the page cache), mixed (none at first), cold (none
    before each token) and with nothing read at all. Then prompts, first and again.
    """
    from flash_moe import Benchmark

    line = StatusLine("")
    with as_click_errors():
        path, experts = Registry.of_user().find(name)
        benchmark = Benchmark(
            path,
            given_options(options).settings(experts),
            name=name,
            tokens=tokens,
            prompts=prompts,
            memory=memory,
            picture=expanded(svg),
        )
        try:
            report = benchmark.run(line.say)
        finally:
            line.clear()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    click.echo("\n".join(report.heading()))
    for table in report.tables():
        print_table(table.title, table.columns, table.rows)
    if notes := list(report.left_out()):
        click.echo("\n".join(["", *notes]))
