"""`llm flash-moe plot`: what quality costs, as a picture of several evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llm_flash_moe.errors import PluginError, shown

FILE = click.Path(path_type=Path)
# Where a figure has its value; its standard error stands beside it.
VALUES = ("value", "share", "perplexity")
COST = "cost.decode.expert_bytes_per_token"


@click.command()
@click.argument("results", nargs=-1, required=True, type=FILE)
@click.option("--to", type=FILE, required=True, help="SVG file to write")
@click.option(
    "--figure",
    default="text.perplexity",
    show_default=True,
    help="What to draw, by its names in the JSON: json.equal, against.kl, against.spans.calls.kl …",
)
def plot(results: tuple[Path, ...], to: Path, figure: str) -> None:
    """Draw how good models are over the bytes that a token reads.

    RESULTS are files that `llm flash-moe eval NAME --json > FILE` wrote; each is a dot with its
    standard error, and named after its file.
    """
    from benchmarks.chart import COLOURS, Chart, round_numbers

    with shown():
        dots = [_dot(path.expanduser(), figure) for path in results]
        right = 1.25 * max(x for x, _, _, _ in dots) or 1.0
        low, high = min(y - e for _, y, e, _ in dots), max(y + e for _, y, e, _ in dots)
        room = (high - low) / 10 or abs(high) / 10 or 1.0
        across, up = (0.0, right), (low - room, high + room)
        chart = Chart(f"{figure} over MB of experts read a token", across, up)
        chart.ticks(round_numbers(*across), round_numbers(*up))
        for number, (x, y, error, label) in enumerate(dots):
            chart.dot(x, y, error, label, COLOURS[number % len(COLOURS)])
        chart.write(to.expanduser())


def _dot(path: Path, figure: str) -> tuple[float, float, float, str]:
    """Megabytes, the figure, its error and the name."""
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise PluginError(
            f"{path} is no JSON. Write it with: llm flash-moe eval NAME --json > {path}"
        ) from error
    nbytes, _ = _figure(path, result, COST)
    return nbytes / 1e6, *_figure(path, result, figure), path.stem


def _figure(path: Path, result: Any, figure: str) -> tuple[float, float]:
    found, key = result, ""
    beside: Any = {}
    for key in figure.split("."):
        if not isinstance(found, dict) or key not in found:
            known = ", ".join(found) if isinstance(found, dict) else "no more names"
            raise PluginError(f"{path} has no {figure}: in the place of {key!r} it has {known}.")
        found, beside = found[key], found
    if isinstance(found, dict):
        key = next((name for name in VALUES if name in found), "")
        found, beside = found.get(key), found
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise PluginError(f"{figure} is no number in {path}: choose another with --figure.")
    error = beside.get("standard_error") if key in VALUES else None
    return float(found), float(error or 0)
