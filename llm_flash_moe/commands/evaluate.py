"""`llm flash-moe eval`: how good a model is, on data that it never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flash_moe import options as engine_options
from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import AS_JSON, OPTIONS, PATH, expanded, given_options
from llm_flash_moe.commands.tables import print_table
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.progress import StatusLine, item_bar
from llm_flash_moe.registry import Registry

if TYPE_CHECKING:
    from flash_moe import Evaluation


@click.command(name="eval")
@click.argument("name")
@click.option("--data", type=PATH, help="Folder with text.jsonl and dialogues.jsonl")
@OPTIONS
@click.option(
    "--only",
    type=click.Choice(engine_options.EVALUATION_SECTIONS),
    multiple=True,
    help="Measure just this",
)
@click.option("--limit", type=click.IntRange(1), help="Texts, and dialogues of a kind, at most")
@click.option("--save", type=PATH, help="Save predictions to this file, 2 KB a token")
@click.option("--against", type=PATH, help="Compare token by token with predictions saved before")
@click.option("--routing", type=PATH, help="Write expert usage counts to this file")
@click.option("--constrained", is_flag=True, help="Hold JSON to its schema and calls to the tools")
@AS_JSON
def evaluate(
    name: str,
    data: Path | None,
    options: tuple[tuple[str, str], ...],
    only: tuple[str, ...],
    limit: int | None,
    save: Path | None,
    against: Path | None,
    routing: Path | None,
    constrained: bool,
    as_json: bool,
) -> None:
    """Measure how good a model is, on texts and dialogues that it never saw.

    NAME is a model's name or a checkpoint's folder. First the texts and right replies are given
    word by word, and how well the model predicts them is measured (perplexity). Then it replies
    itself, greedily and, without --constrained, free of grammars, and the replies are judged.

    An evaluation that was interrupted goes on where it was when the same command is given again.
    """
    from flash_moe import Evaluation

    model_options = given_options(options)
    loading = StatusLine("loading", " bytes")
    with as_click_errors():
        path, experts = Registry.of_user().find(name)
        with Evaluation(
            path,
            model_options.settings(experts),
            about={"model": name, "options": model_options.loading()},
            data=expanded(data),
            sections=only or engine_options.EVALUATION_SECTIONS,
            limit=limit,
            constrained=constrained,
            save=expanded(save),
            against=expanded(against),
            routing=expanded(routing),
            state_folder=paths.evaluations(),
            progress=loading.update,
        ) as evaluation:
            loading.clear()
            if evaluation.done:
                click.echo(f"Continuing after {_progress_text(evaluation)}.", err=True)
            with _saying_where(evaluation), item_bar(f"Measuring {name}", evaluation.total) as bar:
                report = evaluation.run(bar)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
        return
    click.echo("\n".join(report.heading()))
    for table in report.tables():
        print_table(table.title, table.columns, table.rows)
    click.echo("\n".join(["", *report.summary()]))


@contextmanager
def _saying_where(evaluation: Evaluation) -> Iterator[None]:
    """If it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        done = _progress_text(evaluation)
        click.echo(f"Stopped after {done}: the same command continues from there.", err=True)
        raise


def _progress_text(evaluation: Evaluation) -> str:
    return f"{evaluation.done} of {evaluation.total} items"
