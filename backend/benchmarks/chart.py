"""Charts as plain SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from flash_moe.format.atomic import replacing

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#9c6b4e")
# A letter's width, on the average.
LETTER = 6.2
Points = Sequence[tuple[float, float]]
# Left, top, right and bottom.
Box = tuple[float, float, float, float]


class Chart:
    """Lines and dots in a frame, with ticks where they are told to be."""

    def __init__(self, title: str, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            f'<text x="{MARGIN}" y="22" font-size="14">{escape(title)}</text>',
        ]
        self.labels = 0
        # What dots and their names take; and the names, which are placed when all dots are known.
        self.taken: list[Box] = []
        self.names: list[tuple[float, float, str, str]] = []

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
        right, y = WIDTH - MARGIN, 22 + 16 * self.labels
        self.labels += 1
        self.parts.append(
            f'<text x="{right}" y="{y}" text-anchor="end" fill="{colour}">{escape(label)}</text>'
        )

    def dot(self, x: float, y: float, error: float, label: str, colour: str) -> None:
        """With a bar of one standard error to both sides, and a name where there is room."""
        (at, low), (_, high) = self.place(x, y - error), self.place(x, y + error)
        middle = (low + high) / 2
        self.taken.append((at - 5, min(low, high) - 2, at + 5, max(low, high) + 2))
        self.names.append((at, middle, label, colour))
        self.parts += [
            f'<path d="M{at:.1f} {low:.1f}V{high:.1f}" stroke="{colour}" stroke-width="1.5"/>',
            f'<circle cx="{at:.1f}" cy="{middle:.1f}" r="4" fill="{colour}"/>',
        ]

    def _room(self, at: float, middle: float, width: float) -> tuple[float, float]:
        """Right of a dot, else left of it, else above or below: the first place that is free, or
        the first of all."""
        lines = sorted(range(-6, 7), key=abs)
        places = [
            (left, middle + 4 + 13 * line) for line in lines for left in (at + 8, at - 8 - width)
        ]
        for left, base in places:
            box = (left, base - 10, left + width, base + 3)
            if left >= 0 and box[2] <= WIDTH and not any(_meet(box, other) for other in self.taken):
                self.taken.append(box)
                return left, base
        return places[0]

    def write(self, path: Path) -> None:
        for at, middle, label, colour in self.names:
            left, base = self._room(at, middle, LETTER * len(label))
            self.parts.append(
                f'<text x="{left:.1f}" y="{base:.1f}" fill="{colour}">{escape(label)}</text>'
            )
        with replacing(path) as temporary:
            temporary.write_text("\n".join([*self.parts, "</svg>\n"]), "utf-8")


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def round_numbers(low: float, high: float) -> dict[float, str]:
    """Four to ten of them, from low to high."""
    rough = (high - low) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(times for times in (1, 2, 5, 10) if times * step >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return {at * step: f"{at * step:g}" for at in range(first, last + 1)}
