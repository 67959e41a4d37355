"""Charts as plain SVG, without a library."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Literal, NamedTuple

from flash_moe.format.atomic import replacing

WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#4269d0", "#ff725c", "#3ca951", "#efb118", "#a463f2", "#9c6b4e")
# The average width of a letter, and the height of a line.
LETTER, LINE = 6.2, 13
Points = Sequence[tuple[float, float]]


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def holds(self, other: Box) -> bool:
        across = self.left <= other.left and other.right <= self.right
        return across and self.top <= other.top and other.bottom <= self.bottom


class Place(NamedTuple):
    """Of a text: the base line, and the place of its start, middle or end."""

    x: float
    base: float
    anchor: Literal["start", "middle", "end"]

    def box(self, width: float) -> Box:
        left = self.x - width * ("start", "middle", "end").index(self.anchor) / 2
        return Box(left, self.base - 10, left + width, self.base + 3)


class Label(NamedTuple):
    """The text of a dot, which is at `x` and whose error bar goes from `top` to `bottom`."""

    text: str
    colour: str
    x: float
    top: float
    bottom: float

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2

    @property
    def width(self) -> float:
        return LETTER * len(self.text)


class Chart:
    """Lines and dots in a frame. `caption` is a smaller line below the title."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        caption: str = "",
        height: int = HEIGHT,
    ) -> None:
        self.x, self.y, self.height = x, y, height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="{MARGIN}" y="22" font-size="14">{escape(title)}</text>',
        ]
        if caption:
            text = f'<text x="{MARGIN}" y="38" font-size="11" fill="#666">{escape(caption)}</text>'
            self.parts.append(text)
        self._lines = 0
        # Labels are placed when all dots are known; `_taken` are boxes where none may be.
        self._labels: list[Label] = []
        self._taken: list[Box] = []

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            MARGIN + across * (WIDTH - 2 * MARGIN),
            self.height - MARGIN + up * (2 * MARGIN - self.height),
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
        right, y = WIDTH - MARGIN, 22 + 16 * self._lines
        self._lines += 1
        self.parts.append(
            f'<text x="{right}" y="{y}" text-anchor="end" fill="{colour}">{escape(label)}</text>'
        )

    def dot(self, x: float, y: float, error: float, label: str, colour: str) -> None:
        """With a bar of one standard error up and down, and a label beside it."""
        (at, bottom), (_, top) = self.place(x, y - error), self.place(x, y + error)
        dot = Label(label, colour, at, top, bottom)
        self._taken.append(
            Box(at - 5, min(top, dot.middle - 5), at + 5, max(bottom, dot.middle + 5))
        )
        self._labels.append(dot)
        self.parts += [
            f'<path d="M{at:.1f} {bottom:.1f}V{top:.1f}" stroke="{colour}" stroke-width="1.5"/>',
            f'<circle cx="{at:.1f}" cy="{dot.middle:.1f}" r="4" fill="{colour}"/>',
        ]

    def write(self, path: Path) -> None:
        for label in self._labels:
            self._write_label(label)
        with replacing(path) as temporary:
            temporary.write_text("\n".join([*self.parts, "</svg>\n"]), "utf-8")

    def _write_label(self, label: Label) -> None:
        place = self._room(label)
        self._taken.append(place.box(label.width))
        self.parts.append(
            f'<text x="{place.x:.1f}" y="{place.base:.1f}" text-anchor="{place.anchor}" '
            f'fill="{label.colour}">{escape(label.text)}</text>'
        )

    def _room(self, label: Label) -> Place:
        """The nearest free place for a label, or the first of all."""
        places = sorted(_places(label), key=lambda place: _distance(label, place))
        frame = Box(MARGIN, 0, WIDTH, self.height - MARGIN)
        for place in places:
            box = place.box(label.width)
            if frame.holds(box) and not any(box.meets(other) for other in self._taken):
                return place
        return places[0]


def colours(count: int) -> list[str]:
    """As many different ones, all dark enough for text; neighbours differ most."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    step = next(step for step in range(count // 2, 0, -1) if math.gcd(step, count) == 1)
    hues = [step * at % count / count for at in range(count)]
    levels = (0.3, 0.42)
    return [_hex(hue, levels[at % len(levels)]) for at, hue in enumerate(hues)]


def round_numbers(low: float, high: float) -> dict[float, str]:
    """Four to ten of them, from low to high."""
    rough = (high - low) / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(times for times in (1, 2, 5, 10) if times * step >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return {at * step: f"{at * step:g}" for at in range(first, last + 1)}


def _hex(hue: float, level: float) -> str:
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, level, 0.7)
    )


def _places(label: Label) -> Iterator[Place]:
    """Right and left of a dot, also some lines higher or lower; above and below its error bar."""
    for line in range(-6, 7):
        base = label.middle + 4 + LINE * line
        yield Place(label.x + 8, base, "start")
        yield Place(label.x - 8, base, "end")
    for line in range(4):
        yield Place(label.x, label.top - 5 - LINE * line, "middle")
        yield Place(label.x, label.bottom + 12 + LINE * line, "middle")


def _distance(label: Label, place: Place) -> int:
    """From the dot to the nearest point of the text, in whole pixels."""
    across = 0 if place.anchor == "middle" else abs(place.x - label.x)
    return round(math.hypot(across, place.base - 4 - label.middle))
