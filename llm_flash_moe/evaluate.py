"""`llm flash-moe eval`: how good a model is, on data that it never saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from llm_flash_moe import places
from llm_flash_moe.errors import PluginError, shown
from llm_flash_moe.figures import show
from llm_flash_moe.options import SETTINGS, ModelOptions
from llm_flash_moe.progress import StatusLine, item_bar

if TYPE_CHECKING:
    from flash_moe.engine import Engine
    from flash_moe.evaluation.evaluate import Wanted
    from flash_moe.evaluation.findings import Evaluation
    from flash_moe.evaluation.held_out import HeldOut
    from flash_moe.evaluation.resume import Unfinished
    from flash_moe.model.load import Settings

# As flash_moe.evaluation.held_out has them, which imports the tokenizers.
SECTIONS = ("text", "questions", "json", "tools")
FOLDER = click.Path(path_type=Path)


@click.command(name="eval")
@click.argument("name")
@click.option("--data", type=FOLDER, help="Folder with text.jsonl and dialogues.jsonl")
@click.option(
    "-o",
    "--option",
    "options",
    type=(str, str),
    multiple=True,
    metavar="KEY VALUE",
    help=f"As llm -o, of what a model is loaded with: {', '.join(SETTINGS)}",
)
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Measure just this")
@click.option("--limit", type=click.IntRange(1), help="Texts, and dialogues of a kind, at most")
@click.option("--save", type=FOLDER, help="File to keep what is foreseen in, 2 KB a token")
@click.option("--against", type=FOLDER, help="Such a file, to compare with token by token")
@click.option("--routing", type=FOLDER, help="File to write how often each expert was chosen to")
@click.option("--constrained", is_flag=True, help="Hold JSON to its schema and calls to the tools")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
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

    NAME is a model's name or a checkpoint's folder. Texts and right replies are given word by word
    and the model's surprise is counted (perplexity); then it replies itself, greedily and, without
    --constrained, free of grammars, and the replies are judged.

    An evaluation that was interrupted goes on where it was when the same command is given again.
    """
    from flash_moe.built_in import HELD_OUT
    from flash_moe.evaluation.evaluate import Wanted
    from flash_moe.evaluation.held_out import read_held_out
    from flash_moe.evaluation.reference import Reference
    from flash_moe.format.atomic import write_json
    from flash_moe.model.load import Settings

    chosen = _options(options)
    with shown():
        path, own = places.find(name)
        held_out = read_held_out(data.expanduser() if data else HELD_OUT, only or SECTIONS, limit)
        save, routing = _target(save), _target(routing)
        reference = Reference(against.expanduser()) if against else None
        wanted = Wanted(constrained, save is not None, reference)
        engine = _load(path, Settings(**dict(chosen.settings(own))))
        asked = {"data": str(held_out.folder), "limit": limit, "constrained": constrained}
        about = {**_about(name, path, engine, chosen), **asked}
        try:
            found = _measured(engine, held_out, wanted, about, save)
        finally:
            engine.close()
        if routing:
            write_json(routing, {**about, **found.routing.to_json()})
    result = {**about, **found.to_json()}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show(result)


def _options(given: Sequence[tuple[str, str]]) -> ModelOptions:
    """Replies are greedy, and their length is set: only what a model is loaded with can differ."""
    known = f"Choose {', '.join(SETTINGS)}."
    for key, _ in given:
        if key not in SETTINGS:
            what = "changes nothing here" if key in ModelOptions.model_fields else "is no option"
            raise PluginError(f"-o {key} {what}. {known}")
    try:
        return ModelOptions(**dict(given))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        raise PluginError(f"-o {first['loc'][0]} {first['input']}: {said}.") from error


def _target(path: Path | None) -> Path | None:
    """Where a file is to be written, found before hours are spent on what is in it."""
    if path is None:
        return None
    path = path.expanduser().resolve()
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else "is in no folder that there is"
        raise PluginError(f"{path} {why}: choose another place for the file.")
    return path


def _load(path: Path, settings: Settings) -> Engine:
    from flash_moe.engine import Engine

    loading = StatusLine("loading", " bytes")
    try:
        return Engine.load(path, settings, loading.update, prefix=None)
    finally:
        loading.clear()


def _measured(
    engine: Engine, held_out: HeldOut, wanted: Wanted, about: dict[str, Any], save: Path | None
) -> Evaluation:
    from flash_moe.evaluation.evaluate import evaluate
    from flash_moe.evaluation.reference import write_reference
    from flash_moe.evaluation.resume import Foreseen, Unfinished, key_of_run

    digest = wanted.against.digest if wanted.against else None
    key = key_of_run(engine, held_out, about, wanted.keeping, digest)
    with Unfinished(places.home() / "evaluations", key) as unfinished:
        if unfinished.done:
            click.echo(f"Going on after {_of(unfinished, held_out)}.", err=True)
        try:
            with item_bar(f"Measuring {about['model']}", len(held_out)) as progress:
                found = evaluate(engine, held_out, progress, wanted, unfinished)
        except KeyboardInterrupt:
            done = _of(unfinished, held_out)
            click.echo(f"Stopped after {done}: the same command goes on from there.", err=True)
            raise
        if save:
            write_reference(save, about, engine.tokenizer, Foreseen(unfinished, len(held_out)))
    return found


def _of(unfinished: Unfinished, held_out: HeldOut) -> str:
    return f"{unfinished.done} of {len(held_out)} items"


def _about(name: str, path: Path, engine: Engine, options: ModelOptions) -> dict[str, Any]:
    """What was measured: figures of another K, other bits or another runtime are other figures."""
    plan = engine.model.plan
    return {
        "model": name,
        "path": str(path),
        "architecture": plan.architecture,
        "experts_per_token": plan.experts_per_token,
        "own_experts_per_token": plan.own_experts_per_token,
        "bits": plan.bits,
        "lossy": plan.lossy,
        "runtime": engine.model.runtime.name,
        "options": dict(options.settings()),
    }
