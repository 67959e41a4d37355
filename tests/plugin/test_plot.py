"""Results of evaluations as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chart import round_numbers
from tests.plugin.terminal import fails, works

SVG = "{http://www.w3.org/2000/svg}"


def result(megabytes: float, perplexity: float, error: float | None) -> dict[str, Any]:
    return {
        "text": {"perplexity": perplexity, "standard_error": error},
        "json": {"equal": {"share": 1 / perplexity, "standard_error": 0.01, "of": 9}},
        "cost": {"decode": {"expert_bytes_per_token": megabytes * 1e6}},
        "lossy": [],
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = {"four": (1.2, 30.0, 4.0), "ten": (3.3, 20.0, 3.0), "two & <bits>": (0.8, 100.0, None)}
    for name, found in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result(*found)))
    return [tmp_path / f"{name}.json" for name in made]


def dots(path: Path) -> list[tuple[float, float]]:
    circles = ElementTree.parse(path).iter(f"{SVG}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]


def test_a_dot_a_run(files: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "plot.svg"
    works("flash-moe", "plot", *files, "--to", target)
    found = dots(target)
    texts = [text.text for text in ElementTree.parse(target).iter(f"{SVG}text")]
    assert {"four", "ten", "two & <bits>"} <= set(texts)
    # More bytes are further right, and a higher perplexity is further up.
    assert found[2][0] < found[0][0] < found[1][0]
    assert found[2][1] < found[0][1] < found[1][1]
    # To scale.
    ratio = (found[0][1] - found[1][1]) / (found[2][1] - found[1][1])
    assert ratio == pytest.approx(10 / 80, abs=0.02)
    works("flash-moe", "plot", files[0], files[1], "--to", target, "--figure", "json.equal")
    assert dots(target)[1][1] < dots(target)[0][1]


def test_names_do_not_lie_on_each_other(tmp_path: Path) -> None:
    names = [f"a name of some length {n}" for n in range(5)]
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps(result(1.0, 20.0, 1.0)))
    works("flash-moe", "plot", *tmp_path.glob("*.json"), "--to", tmp_path / "plot.svg")
    texts = ElementTree.parse(tmp_path / "plot.svg").iter(f"{SVG}text")
    places = [(t.attrib["x"], float(t.attrib["y"])) for t in texts if t.text in names]
    assert len(places) == 5
    for at, (x, y) in enumerate(places):
        assert all(x != other or abs(y - above) >= 13 for other, above in places[:at])


def test_one_dot_alone(files: list[Path], tmp_path: Path) -> None:
    for file in (files[0], files[2]):
        works("flash-moe", "plot", file, "--to", tmp_path / "plot.svg")
        assert len(dots(tmp_path / "plot.svg")) == 1


def test_what_cannot_be_drawn(files: list[Path], tmp_path: Path) -> None:
    plot = ("flash-moe", "plot", files[0], "--to", tmp_path / "plot.svg")
    assert "it has text, json, cost, lossy" in fails(*plot, "--figure", "nope.x")
    assert "it has perplexity" in fails(*plot, "--figure", "text.nope")
    assert "lossy is no number" in fails(*plot, "--figure", "lossy")
    assert "it has equal" in fails(*plot, "--figure", "json.valid")
    files[0].write_text(json.dumps(result(1, math.nan, 1)).replace("NaN", "null"))
    assert "text.perplexity is no number" in fails(*plot)
    files[0].write_text("perplexity 12")
    assert "is no JSON" in fails(*plot)
    files[0].unlink()
    assert "No such file" in fails(*plot)
    assert not (tmp_path / "plot.svg").exists()


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_round_numbers(low: float, width: float) -> None:
    found = list(round_numbers(low, low + width))
    assert 2 <= len(found) <= 10
    slack = 1e-9 * max(abs(low), width)
    assert all(low - slack <= value <= low + width + slack for value in found)
