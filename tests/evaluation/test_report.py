"""Reports as people read them: complete, and no wider than a terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_moe.engine import Engine
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.figures import Estimate
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.parts import Against, Perplexities, Perplexity, Share
from flash_moe.evaluation.reference import Reference, write_reference
from flash_moe.evaluation.report import Report
from flash_moe.evaluation.routing import LayerRouting, Routing
from flash_moe.evaluation.run_state import RunState, SavedPredictions
from flash_moe.evaluation.tables import (
    Table,
    format_perplexity,
    format_share,
    format_with_error,
)
from tests.evaluation.measuring import measured, subject

NOTHING = Estimate(float("nan"), None)


def width(table: Table) -> int:
    """With two spaces between columns."""
    rows = [tuple(column.name for column in table.columns), *table.rows]
    return sum(max(map(len, cells)) for cells in zip(*rows, strict=True)) + 2 * (len(rows[0]) - 1)


@pytest.fixture(scope="module")
def report(engine: Engine, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """With everything that there is, against itself."""
    folder, held_out = tmp_path_factory.mktemp("report"), read_held_out(data)
    with RunState(folder, "key") as state:
        measured(engine, held_out, recording=True, state=state)
        model = subject().to_json()
        predictions = SavedPredictions(state, len(held_out))
        write_reference(folder / "reference", model, engine.tokenizer, predictions)
    return measured(engine, held_out, constrained=True, reference=Reference(folder / "reference"))


def test_tables_of_everything(report: Report) -> None:
    tables = report.tables()
    assert [table.columns[0].name for table in tables] == [
        "predicted",
        "compared",
        "replies",
        "allowed by grammars",
    ]
    assert [row[0] for row in tables[0].rows] == [
        *("texts", "  prose", "  code"),
        *("right replies", "  sums", "  talk", "  json", "  tools"),
    ]
    assert tables[1].title.splitlines() == [
        "Against reference: demo, 4-bit, 4 experts a token.",
        "9 of 9 items are in both.",
    ]
    assert [row[0] for row in tables[1].rows] == [
        *("everything", "texts", "right replies", "JSON", "calls", "structure"),
    ]
    assert [row[:2] for row in tables[2].rows] == [
        ("questions", "right replies"),
        ("  sums", "right replies"),
        ("  talk", "right replies"),
        ("json", "valid JSON"),
        ("", "valid by the schema"),
        ("", "the expected value"),
        ("tools", "calls that parse"),
        ("", "right functions"),
        ("", "right arguments, too"),
    ]
    assert [row[0] for row in tables[3].rows] == ["everything", "json"]
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert [column.right for column in table.columns[2:]] == [True] * (len(table.columns) - 2)
        assert width(table) <= 80


def test_lines_around_the_tables(report: Report) -> None:
    assert report.heading() == [
        "demo: qwen3_5_moe, 4-bit, 4 experts a token, mlx runtime, constrained"
    ]
    routing, predicting, replying = report.summary()
    assert routing.startswith("Routing entropy: ")
    assert " 9 items in " in routing
    tokens = f"{report.prefill.tokens:,} tokens at "
    assert predicting.startswith(f"Predicting: {tokens}")
    assert predicting.endswith(" MB of experts read a token.")
    assert replying.startswith(f"Replying: {report.decode.tokens:,} tokens at ")


def minimal(**changes: object) -> Report:
    perplexity = Perplexity(Estimate(2.5, None), 1, 10)
    fields: dict[str, object] = {
        "subject": subject(lossy=["fewer bits", "fewer experts"]),
        "items": 1,
        "seconds": 1.0,
        "text": Perplexities(perplexity, {"prose": perplexity}),
        "sections": {},
        "replies": None,
        "allowed_mass": None,
        "against": None,
        "routing": Routing([LayerRouting("layer", np.array([1, 0]))]),
        "prefill": Cost(10, 2.0, 30),
        "decode": Cost(),
    }
    return Report(**{**fields, **changes})  # type: ignore[arg-type]


def test_nothing_is_shown_of_what_was_not_measured() -> None:
    report = minimal()
    assert report.heading()[1:] == ["  less exact: fewer bits", "  less exact: fewer experts"]
    [table] = report.tables()
    assert table.rows == [
        ("texts", "2.50", "", "10", "1"),
        ("  prose", "2.50", "", "10", "1"),
    ]
    assert report.summary() == [
        "Routing entropy: 0.00 of 1.00 bits; experts never used: 1. 1 items in 1.0 s.",
        "Predicting: 10 tokens at 5.0/s, 0.00 MB of experts read a token.",
    ]


def test_a_comparison_without_common_tokens() -> None:
    report = minimal(against=Against(Path("/x/reference"), {}, 0, None, {}))
    table = report.tables()[1]
    assert table.rows == []
    assert table.title.endswith("0 of 1 items are in both.")
    assert report.to_json()["against"] == {
        "file": "/x/reference",
        "reference": {},
        "documents_compared": 0,
        "spans": {},
    }


def test_figures_as_text() -> None:
    assert format_perplexity(Estimate(1234.567, 89.123)) == "1,234.57 ± 89.12"
    assert format_perplexity(Estimate(1234.567, None)) == "1,234.57"
    assert format_perplexity(NOTHING) == "not a number"
    assert format_share(Share(Estimate(0.123, 0.004), 9)) == "12.3 ± 0.4 %"
    assert format_share(Share(Estimate(0.5, None), 1)) == "50.0 %"
    assert format_share(Share(NOTHING, 1)) == "not a number"


def test_digits_end_where_the_error_begins() -> None:
    assert format_with_error(Estimate(0.123456, 0.0123)) == "0.123 ± 0.012"
    assert format_with_error(Estimate(0.123456, 0.0123), 100) == "12.3 ± 1.2"
    assert format_with_error(Estimate(123.456, 45.6)) == "123 ± 46"
    assert format_with_error(Estimate(0.123456, None)) == "0.123"
    assert format_with_error(Estimate(0.0, 0.0)) == "0"
    assert format_with_error(NOTHING) == "not a number"
