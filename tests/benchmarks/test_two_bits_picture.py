"""The picture of a record shows the record's own figures."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.two_bits_picture import PICTURE, RECORD, draw, rows_with

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_that_of_the_record(tmp_path: Path) -> None:
    draw(RECORD, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text("utf-8") == PICTURE.read_text("utf-8")


def test_every_way_has_its_dot_label_and_colour() -> None:
    tree, ways = ElementTree.parse(PICTURE), rows_with("questions", RECORD.read_text("utf-8"))
    circles = list(tree.iter(f"{SVG}circle"))
    texts = {text.text for text in tree.iter(f"{SVG}text")}
    assert len(circles) == len(ways) == 14
    assert set(ways) <= texts
    assert len({circle.attrib["fill"] for circle in circles}) == len(ways)
    assert any("first 25 held-out dialogues of each kind" in str(text) for text in texts)


def test_tables_are_found_by_a_column() -> None:
    first = "| | a | b |\n|---|--:|--:|\n| x | 1 | 2 % |"
    text = f"# Title\n\n{first}\n\ntext\n\n| | c |\n|---|--:|\n| y | 3 |\n"
    assert rows_with("b", text) == {"x": {"a": "1", "b": "2 %"}}
    assert rows_with("c", text) == {"y": {"c": "3"}}
    with pytest.raises(LookupError, match="no table has the column 'd'"):
        rows_with("d", text)
