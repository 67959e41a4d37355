"""Measure a loaded model, as Evaluation does it."""

from __future__ import annotations

import json
from typing import Any

from flash_moe.callbacks import Advance, no_advance
from flash_moe.chat.tool_calls import find_tool_format
from flash_moe.engine import Engine
from flash_moe.evaluation.documents import Document, make_document
from flash_moe.evaluation.held_out import HeldOut
from flash_moe.evaluation.limits import Limits
from flash_moe.evaluation.measure import Measurer
from flash_moe.evaluation.parts import Subject
from flash_moe.evaluation.reference import Reference
from flash_moe.evaluation.report import Report
from flash_moe.evaluation.run_state import RunState

# A random model never stops.
SHORT = Limits(max_tokens=8)


def documents_of(engine: Engine, held_out: HeldOut, limits: Limits = SHORT) -> list[Document]:
    tool_format = find_tool_format(engine.model.path, engine.tokenizer)
    items = held_out.items
    return [make_document(engine.tokenizer, item, tool_format, limits.window) for item in items]


def measured(
    engine: Engine,
    held_out: HeldOut,
    limits: Limits = SHORT,
    *,
    constrained: bool = False,
    recording: bool = False,
    reference: Reference | None = None,
    state: RunState | None = None,
    advance: Advance = no_advance,
) -> Report:
    tool_format = find_tool_format(engine.model.path, engine.tokenizer)
    measurer = Measurer(engine, tool_format, limits, constrained, recording, reference)
    totals = measurer.measure_all(documents_of(engine, held_out, limits), state, advance)
    return totals.report(subject(constrained=constrained), reference)


def subject(**changes: Any) -> Subject:
    fields: dict[str, Any] = {
        "model": "demo",
        "path": "/models/demo",
        "architecture": "qwen3_5_moe",
        "experts_per_token": 4,
        "own_experts_per_token": 4,
        "bits": "4-bit",
        "lossy": [],
        "runtime": "mlx",
        "options": {},
        "data": "/data",
        "limit": None,
        "constrained": False,
    }
    return Subject(**{**fields, **changes})


def figures(report: Report) -> dict[str, Any]:
    """As JSON, without seconds, which are never the same."""
    value: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert value.pop("seconds") > 0
    for cost in value["cost"].values():
        del cost["seconds"], cost["tokens_per_second"]
    return value
