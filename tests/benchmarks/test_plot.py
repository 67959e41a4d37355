"""Results of evaluations as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.plot import main

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
    results = {
        "four": (1.2, 30.0, 4.0),
        "ten": (3.3, 20.0, 3.0),
        "two & <bits>": (0.8, 100.0, None),
    }
    for name, numbers in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result(*numbers)))
    return [tmp_path / f"{name}.json" for name in results]


def plot(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def dots(path: Path) -> list[tuple[float, float]]:
    circles = ElementTree.parse(path).iter(f"{SVG}circle")
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in circles]


def test_a_dot_for_each_run(files: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "plot.svg"
    plot(*files, "--to", target)
    four, ten, two = dots(target)
    texts = [text.text for text in ElementTree.parse(target).iter(f"{SVG}text")]
    assert {"four", "ten", "two & <bits>"} <= set(texts)
    # More bytes are further right, and a higher perplexity is further up.
    assert two[0] < four[0] < ten[0]
    assert two[1] < four[1] < ten[1]
    # To scale.
    assert (four[1] - ten[1]) / (two[1] - ten[1]) == pytest.approx(10 / 80, abs=0.02)
    plot(files[0], files[1], "--to", target, "--figure", "json.equal")
    assert dots(target)[1][1] < dots(target)[0][1]


def test_one_dot_alone(files: list[Path], tmp_path: Path) -> None:
    for file in (files[0], files[2]):
        plot(file, "--to", tmp_path / "plot.svg")
        assert len(dots(tmp_path / "plot.svg")) == 1


def fails(*arguments: object) -> str:
    """The message, in one line."""
    with pytest.raises(SystemExit) as caught:
        plot(*arguments)
    (line,) = str(caught.value.code).splitlines()
    assert line.startswith("Error: ")
    return line


def test_what_cannot_be_drawn(files: list[Path], tmp_path: Path) -> None:
    arguments = (files[0], "--to", tmp_path / "plot.svg")
    assert "it has text, json, cost, lossy" in fails(*arguments, "--figure", "nope.x")
    assert "it has perplexity" in fails(*arguments, "--figure", "text.nope")
    assert "it has no more names" in fails(*arguments, "--figure", "text.perplexity.nope")
    assert "lossy is not a number" in fails(*arguments, "--figure", "lossy")
    assert "it has equal" in fails(*arguments, "--figure", "json.valid")
    files[0].write_text(json.dumps(result(1, math.nan, 1)).replace("NaN", "null"))
    assert "text.perplexity is not a number" in fails(*arguments)
    files[0].write_text("perplexity 12")
    message = fails(*arguments)
    assert "is not JSON" in message
    assert "llm flash-moe eval" in message
    files[0].unlink()
    assert f"{files[0]}: No such file" in fails(*arguments)
    assert not (tmp_path / "plot.svg").exists()


def test_a_folder_that_does_not_exist(files: list[Path], tmp_path: Path) -> None:
    assert "No such file" in fails(files[0], "--to", tmp_path / "no" / "plot.svg")


def test_arguments_are_required(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((files[0],), ("--to", tmp_path / "plot.svg")):
        with pytest.raises(SystemExit) as caught:
            plot(*arguments)
        assert caught.value.code == 2
        assert "required" in capsys.readouterr().err
