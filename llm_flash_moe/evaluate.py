"""`llm flash-moe eval`: how good a model is, on data that it never saw."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llm_flash_moe import places
from llm_flash_moe.errors import shown
from llm_flash_moe.progress import StatusLine, item_bar

if TYPE_CHECKING:
    from flash_moe.engine import Engine
    from flash_moe.model.load import Settings, Weights

# As flash_moe.quant.held_out has them, which imports the tokenizers.
SECTIONS = ("text", "questions", "json", "tools")
FOLDER = click.Path(path_type=Path)
# What the names of the figures mean, in the order of their columns.
SHARES = {
    "right": "right replies",
    "valid": "valid JSON",
    "schema": "valid by the schema",
    "equal": "the expected value",
    "parses": "calls that parse",
    "names": "right functions",
    "arguments": "right arguments, too",
}


@click.command(name="eval")
@click.argument("name")
@click.option("--data", type=FOLDER, help="Folder with text.jsonl and dialogues.jsonl")
@click.option("--experts", type=click.IntRange(1), help="Experts a token uses, if not the model's")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Measure just this")
@click.option("--limit", type=click.IntRange(1), help="Texts, and dialogues of a kind, at most")
@click.option("--routing", type=FOLDER, help="File to write how often each expert was chosen to")
@click.option("--runtime", default="auto", help="What computes the experts, as -o runtime")
@click.option(
    "--weights",
    type=click.Choice(["auto", "keep", "renormalise"]),
    default="auto",
    help="Weights of fewer experts, as -o weights",
)
@click.option("--constrained", is_flag=True, help="Hold JSON to its schema and calls to the tools")
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def evaluate(
    name: str,
    data: Path | None,
    experts: int | None,
    only: tuple[str, ...],
    limit: int | None,
    routing: Path | None,
    runtime: str,
    weights: Weights,
    constrained: bool,
    as_json: bool,
) -> None:
    """Measure how good a model is, on texts and dialogues that it never saw.

    NAME is a model's name or a checkpoint's folder. Texts and right replies are given word by word
    and the model's surprise is counted (perplexity); then it replies itself, greedily and, without
    --constrained, free of grammars, and the replies are judged.
    """
    from flash_moe.built_in import HELD_OUT
    from flash_moe.checkpoint.atomic import write_json
    from flash_moe.model.load import Settings
    from flash_moe.quant import evaluate as measuring
    from flash_moe.quant.held_out import read_held_out

    with shown():
        path, own = places.find(name)
        held_out = read_held_out(data.expanduser() if data else HELD_OUT, only or SECTIONS, limit)
        engine = _load(path, Settings(experts=experts or own, runtime=runtime, weights=weights))
        try:
            with item_bar(f"Measuring {name}", len(held_out)) as progress:
                found = measuring.evaluate(engine, held_out, progress, constrained=constrained)
        finally:
            engine.close()
        asked = {"data": str(held_out.folder), "limit": limit, "constrained": constrained}
        about = {**_about(name, path, engine), **asked}
        if routing:
            write_json(routing.expanduser(), {**about, **found.routing.to_json()})
    result = {**about, **found.to_json()}
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def _load(path: Path, settings: Settings) -> Engine:
    from flash_moe.engine import Engine

    loading = StatusLine("loading", " bytes")
    try:
        return Engine.load(path, settings, loading.update, prefix=None)
    finally:
        loading.clear()


def _about(name: str, path: Path, engine: Engine) -> dict[str, Any]:
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
    }


def _print(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['model']}: {result['architecture']}, {result['bits']}, "
        f"{result['experts_per_token']} experts a token, {result['runtime']} runtime"
        + (", constrained" if result["constrained"] else "")
    )
    for lossy in result["lossy"]:
        click.echo(f"  less exact: {lossy}")
    _table(("foreseen", "perplexity", "bits a byte", "tokens", "documents"), _foreseen(result))
    _table(("replied", "", "share", "of"), _replied(result))
    used = result["routing"]
    click.echo(
        f"\nExperts are chosen with {used['entropy_bits']:.2f} bits of {used['most_bits']:.2f}; "
        f"{used['unused_experts']} never. {result['items']} items in {result['seconds']:.1f} s."
    )


def _foreseen(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of texts by source, and of right replies by kind."""
    for title, key, by in (("texts", "text", "sources"), ("right replies", "replies", "kinds")):
        if key in result:
            yield title, *_surprise(result[key])
            for name, part in result[key][by].items():
                yield f"  {name}", *_surprise(part)


def _surprise(found: dict[str, Any]) -> tuple[str, ...]:
    perplexity, error = found["perplexity"], found["standard_error"]
    text = "not a number" if perplexity is None else f"{perplexity:,.2f}"
    text += "" if error is None else f" ± {error:,.2f}"
    bits = found.get("bits_per_byte")
    return text, f"{bits:.3f}" if bits else "", f"{found['tokens']:,}", f"{found['documents']:,}"


def _replied(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for section in SECTIONS:
        if section in result and section != "text":
            yield from _shares(section, result[section])
            kinds = result[section]["kinds"]
            for kind, part in kinds.items() if set(kinds) != {section} else ():
                yield from _shares(f"  {kind}", part)


def _shares(title: str, part: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, meaning in SHARES.items():
        if key in part:
            found = part[key]
            share = f"{100 * found['share']:.1f} ± {100 * found['standard_error']:.1f} %"
            yield title, meaning, share, f"{found['of']:,}"
            title = ""


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    """Nothing, if there are no rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        words = number == 0 or not column
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        click.echo()
        Console(highlight=False).print(table)
