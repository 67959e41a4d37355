"""Draw the record two-bits.md: questions answered right over the bytes that a token reads.

    python backend/benchmarks/two_bits_picture.py

The figures are those of the record's tables of every way to fewer bits, so the picture needs no
measuring, and cannot show others.
"""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.chart import Chart, colours, round_numbers

RECORD = Path(__file__).with_name("two-bits.md")
PICTURE = RECORD.with_suffix(".svg")
# Of the 200 dialogues, those that are a question with one answer.
QUESTIONS = 150

Rows = dict[str, dict[str, str]]


def main() -> None:
    draw(RECORD, PICTURE)


def draw(record: Path, picture: Path) -> None:
    read = rows_with("MB a token", record.read_text("utf-8"))
    answered = rows_with("questions", record.read_text("utf-8"))
    chart = Chart(
        "Questions answered right, %, over MB of experts read a token",
        (0, 4.5),
        (0, 100),
        f"flash-moe-tiny, first 25 held-out dialogues of each kind ({QUESTIONS} questions); "
        "bars: one standard error",
        height=440,
    )
    chart.ticks(round_numbers(0, 4.5), round_numbers(0, 100))
    dots = sorted((float(row["MB a token"]), way) for way, row in read.items())
    for (megabytes, way), colour in zip(dots, colours(len(dots)), strict=True):
        share = float(answered[way]["questions"].removesuffix(" %")) / 100
        error = math.sqrt(share * (1 - share) / QUESTIONS)
        chart.dot(megabytes, 100 * share, 100 * error, way, colour)
    chart.write(picture)


def rows_with(column: str, text: str) -> Rows:
    """The table with this column, by the names of its rows."""
    blocks = "\n".join(line if line.startswith("|") else "" for line in text.splitlines())
    for block in blocks.split("\n\n"):
        header, *rows = map(_cells, block.strip().splitlines() or [""])
        if column in header:
            return {row[0]: dict(zip(header[1:], row[1:], strict=True)) for row in rows[1:]}
    raise LookupError(f"no table has the column {column!r}")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


if __name__ == "__main__":
    main()
