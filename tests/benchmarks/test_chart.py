"""Charts that can be read: labels beside their dots, and a colour for each of them."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chart import LETTER, LINE, Box, Chart, colours, round_numbers

SVG = "{http://www.w3.org/2000/svg}"


SHIFTS = {"start": 0.0, "middle": 0.5, "end": 1.0}


def drawn(path: Path, points: list[tuple[float, float]]) -> list[tuple[tuple[float, float], Box]]:
    """Each dot's place, and the box of its label."""
    chart = Chart("title", (0, 100), (0, 100), "caption")
    for number, (point, colour) in enumerate(zip(points, colours(len(points)), strict=True)):
        chart.dot(*point, 3.0, f"the label of {number}", colour)
    chart.write(path)
    tree = ElementTree.parse(path)
    labels = {text.text: text for text in tree.iter(f"{SVG}text")}
    boxes = []
    for number, circle in enumerate(tree.iter(f"{SVG}circle")):
        name = f"the label of {number}"
        text, width = labels[name].attrib, LETTER * len(name)
        left = float(text["x"]) - SHIFTS[text["text-anchor"]] * width
        box = Box(left, float(text["y"]) - 10, left + width, float(text["y"]) + 3)
        boxes.append(((float(circle.attrib["cx"]), float(circle.attrib["cy"])), box))
    return boxes


def distance(dot: tuple[float, float], box: Box) -> float:
    across = max(box.left - dot[0], dot[0] - box.right, 0.0)
    up = max(box.top - dot[1], dot[1] - box.bottom, 0.0)
    return math.hypot(across, up)


def test_labels_do_not_overlap(tmp_path: Path) -> None:
    """Also of dots in one place."""
    boxes = [box for _, box in drawn(tmp_path / "chart.svg", [(50.0, 50.0)] * 6)]
    for at, box in enumerate(boxes):
        assert not any(box.meets(other) for other in boxes[:at])


def test_labels_are_near_their_dots(tmp_path: Path) -> None:
    """Nearer to it than to any other, where there is room."""
    points = [(10.0, 10.0), (10.0, 60.0), (50.0, 30.0), (52.0, 45.0), (90.0, 90.0)]
    labels = drawn(tmp_path / "chart.svg", points)
    for dot, box in labels:
        own = distance(dot, box)
        assert own <= 2 * LINE
        assert own == min(distance(other, box) for other, _ in labels)


@pytest.mark.parametrize("count", [1, 6, 7, 12, 14, 30])
def test_every_dot_has_its_own_colour(count: int) -> None:
    assert len(set(colours(count))) == count


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_round_numbers(low: float, width: float) -> None:
    numbers = list(round_numbers(low, low + width))
    assert 2 <= len(numbers) <= 10
    slack = 1e-9 * max(abs(low), width)
    assert all(low - slack <= value <= low + width + slack for value in numbers)
