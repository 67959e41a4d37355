"""Pictures as plain SVG: python -m training.plots --trained OUT --to FOLDER.

loss.svg, the loss over the tokens seen, and experts.svg, how often every expert of every layer was
chosen on held-out text and dialogues, sorted, 1 being an equal share.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

from benchmarks.chart import COLOURS, Chart


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
