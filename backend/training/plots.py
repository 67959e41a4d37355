"""Pictures as plain SVG: python -m training.plots --trained OUT --to FOLDER.

loss.svg, the loss over the tokens seen, and experts.svg, how often every expert of every layer was
chosen on held-out text and dialogues, sorted, 1 being an equal share.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#9c6b4e")
Points = Sequence[tuple[float, float]]


class Chart:
    """Lines in a frame, with ticks where they are told to be."""

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{MARGIN}" y="22" font-size="14">{title}</text>',
        ]
        self.labels = 0

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            MARGIN + across * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN + up * (2 * MARGIN - HEIGHT),
        )

    def ticks(self, across: dict[float, str], up: dict[float, str]) -> None:
        for value, text in across.items():
            x, y = self.place(value, self.y[0])
            self.parts.append(
                f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{text}</text>'
            )
        for value, text in up.items():
            x, y = self.place(self.x[0], value)
            right = WIDTH - MARGIN
            self.parts.append(f'<path d="M{x:.1f} {y:.1f}H{right}" stroke="#ddd"/>')
            self.parts.append(
                f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
            )

    def line(self, points: Points, label: str, colour: str, faint: bool = False) -> None:
        path = " ".join("{:.1f},{:.1f}".format(*self.place(x, y)) for x, y in points)
        opacity = ' stroke-opacity="0.45"' if faint else ""
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{opacity}/>'
        )
        y = 22 + 16 * self.labels
        self.labels += 1
        self.parts.append(
            f'<text x="{WIDTH - MARGIN}" y="{y}" text-anchor="end" fill="{colour}">{label}</text>'
        )

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>\n"]), "utf-8")


def loss_chart(table: Path, target: Path) -> None:
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    millions = {row["step"]: int(row["tokens"]) / 1e6 for row in rows}
    end = max(millions.values())
    chart = Chart("Loss (nats a token) over millions of tokens", (0, end), (0, 5))
    step = 10 ** math.floor(math.log10(end / 2))
    chart.ticks(
        {at * step: f"{at * step:g}" for at in range(int(end / step) + 1)},
        {float(at): str(at) for at in range(6)},
    )
    lines = {"loss": "trained on", "text": "held-out text", "dialogues": "held-out dialogues"}
    for (column, label), colour in zip(lines.items(), COLOURS, strict=False):
        points = [(millions[r["step"]], min(5.0, float(r[column]))) for r in rows if r.get(column)]
        chart.line(points, label, colour, faint=column == "loss")
    chart.write(target)


def expert_chart(usage: Path, target: Path) -> None:
    layers = [
        [(a + b) / 2 for a, b in zip(text, talk, strict=True)]
        for text, talk in zip(*json.loads(usage.read_text()).values(), strict=True)
    ]
    count = len(layers[0])
    tallest = max(max(layer) for layer in layers) * count
    chart = Chart("Use of the experts, sorted; 1 = an equal share", (0, count - 1), (0, tallest))
    chart.ticks(
        {0: "most used", count - 1: "least used"},
        {float(at): str(at) for at in range(math.ceil(tallest))},
    )
    for number, (layer, colour) in enumerate(zip(layers, COLOURS, strict=True)):
        ordered = sorted((share * count for share in layer), reverse=True)
        bits = -sum(p * math.log2(p) for p in layer if p)
        label = f"layer {number}: least {ordered[-1]:.2f}, {2**bits:.0f} of {count} in effect"
        chart.line(list(enumerate(ordered)), label, colour)
    chart.write(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    given = parser.parse_args()
    loss_chart(given.trained / "loss.csv", given.to / "loss.svg")
    expert_chart(given.trained / "usage.json", given.to / "experts.svg")


if __name__ == "__main__":
    main()
