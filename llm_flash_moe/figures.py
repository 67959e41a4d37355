"""What `llm flash-moe eval` found, as tables of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

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
SECTIONS = ("questions", "json", "tools")
SPANS = {
    "texts": "texts",
    "replies": "right replies",
    "json": "JSON",
    "calls": "calls",
    "structural": "structure",
}


def show(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['model']}: {result['architecture']}, {result['bits']}, "
        f"{result['experts_per_token']} experts a token, {result['runtime']} runtime"
        + (", constrained" if result["constrained"] else "")
    )
    for lossy in result["lossy"]:
        click.echo(f"  less exact: {lossy}")
    _table(("foreseen", "perplexity", "bits a byte", "tokens", "documents"), _foreseen(result))
    if "against" in result:
        _show_against(result["against"], result["items"])
    _table(("replied", "", "share", "of"), _replied(result))
    if "allowed_mass" in result:
        _table(("allowed by grammars", "mean", "p1", "tokens"), _allowed(result["allowed_mass"]))
    used = result["routing"]
    click.echo(
        f"\nExperts are chosen with {used['entropy_bits']:.2f} bits of {used['most_bits']:.2f}; "
        f"{used['unused_experts']} never. {result['items']} items in {result['seconds']:.1f} s."
    )
    for title, key in (("Foreseeing", "prefill"), ("Replying", "decode")):
        if result["cost"][key]["tokens"]:
            click.echo(_cost(title, result["cost"][key]))


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


def _show_against(against: dict[str, Any], items: int) -> None:
    before = against["reference"]
    click.echo(
        f"\nAgainst {Path(against['file']).name}: {before['model']}, {before['bits']}, "
        f"{before['experts_per_token']} experts a token.\n"
        f"Both have {against['documents_compared']} of {items} items."
    )
    parts = {"everything": against, **{SPANS[k]: v for k, v in against["spans"].items()}}
    columns = ("compared", "mean KL, nats", "p99", "same choice", "tokens")
    _table(columns, (_divergence(title, part) for title, part in parts.items()))


def _divergence(title: str, part: dict[str, Any]) -> tuple[str, ...]:
    kl, p99 = _sure(part["kl"]), _sure(part["kl_p99"])
    return title, kl, p99, _percent(part["agreement"]), f"{part['tokens']:,}"


def _replied(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for section in SECTIONS:
        if section in result:
            yield from _shares(section, result[section])
            kinds = result[section]["kinds"]
            for kind, part in kinds.items() if set(kinds) != {section} else ():
                yield from _shares(f"  {kind}", part)


def _shares(title: str, part: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, meaning in SHARES.items():
        if key in part:
            yield title, meaning, _percent(part[key]), f"{part[key]['of']:,}"
            title = ""


def _allowed(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for title, part in {"everything": found, **found["sections"]}.items():
        if part["tokens"]:
            mean, p1 = (_sure(part[name], 100) for name in ("mean", "p1"))
            yield title, f"{mean} %", f"{p1} %", f"{part['tokens']:,}"


def _cost(title: str, cost: dict[str, Any]) -> str:
    return (
        f"{title}: {cost['tokens']:,} tokens at {cost['tokens_per_second']:,.1f}/s, "
        f"{cost['expert_bytes_per_token'] / 1e6:,.2f} MB of experts read a token."
    )


def _percent(found: dict[str, Any]) -> str:
    share, error = found["share"], found["standard_error"]
    if share is None:
        return "not a number"
    return f"{100 * share:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def _sure(found: dict[str, Any], unit: float = 1.0) -> str:
    """As many digits as the error has a meaning of."""
    value, error = found["value"], found["standard_error"]
    if value is None:
        return "not a number"
    value, error = value * unit, error and error * unit
    if not error:
        return f"{value:.3g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


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
