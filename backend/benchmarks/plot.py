"""Draw evaluations: a figure of each model over the bytes of experts that a token reads.

    python backend/benchmarks/plot.py RESULT… --to FILE.svg [--figure json.equal]

Results are files that `llm flash-moe eval NAME --json > RESULT` wrote. Each becomes a dot with its
standard error, labelled with the name of its file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.chart import Chart, colours, round_numbers

# Where a figure has its value; its standard error is beside it.
VALUES = ("value", "share", "perplexity")
COST = "cost.decode.expert_bytes_per_token"


class PlotError(Exception):
    pass


class Dot(NamedTuple):
    megabytes: float
    value: float
    error: float
    label: str


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT")
    parser.add_argument("--to", type=Path, required=True, help="SVG file to write")
    parser.add_argument(
        "--figure",
        default="text.perplexity",
        help="by its names in the JSON: json.equal, against.kl, against.spans.calls.kl, … "
        "(default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        plot([_dot(path, options.figure) for path in options.results], options.figure, options.to)
    except PlotError as error:
        sys.exit(f"Error: {error}")
    except OSError as error:
        sys.exit(f"Error: {error.filename}: {error.strerror}.")


def plot(dots: Sequence[Dot], figure: str, to: Path) -> None:
    right = 1.25 * max(dot.megabytes for dot in dots) or 1.0
    low = min(dot.value - dot.error for dot in dots)
    high = max(dot.value + dot.error for dot in dots)
    room = (high - low) / 10 or abs(high) / 10 or 1.0
    across, up = (0.0, right), (low - room, high + room)
    chart = Chart(f"{figure} over MB of experts read a token", across, up)
    chart.ticks(round_numbers(*across), round_numbers(*up))
    for dot, colour in zip(dots, colours(len(dots)), strict=True):
        chart.dot(*dot, colour)
    chart.write(to)


def _dot(path: Path, figure: str) -> Dot:
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:
        raise PlotError(
            f"{path} is not JSON. Write it with: llm flash-moe eval NAME --json > {path}"
        ) from error
    nbytes, _ = _figure(path, result, COST)
    return Dot(nbytes / 1e6, *_figure(path, result, figure), path.stem)


def _figure(path: Path, result: Any, figure: str) -> tuple[float, float]:
    """A value and its standard error, which is 0 where there is none."""
    value: Any = result
    beside: Any = {}
    key = ""
    for key in figure.split("."):
        if not isinstance(value, dict) or key not in value:
            names = ", ".join(value) if isinstance(value, dict) else "no more names"
            raise PlotError(f"{path} has no {figure}: in the place of {key!r} it has {names}.")
        value, beside = value[key], value
    if isinstance(value, dict):
        key = next((name for name in VALUES if name in value), "")
        value, beside = value.get(key), value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlotError(f"{figure} is not a number in {path}: choose another with --figure.")
    error = beside.get("standard_error") if key in VALUES else None
    return float(value), float(error or 0)


if __name__ == "__main__":
    main()
