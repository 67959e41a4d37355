"""Evaluation from end to end on a random model: its figures are noise, but they are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.built_in import BUILT_IN, NAME
from flash_moe.engine import Engine
from flash_moe.errors import FlashMoeError, OptionError, Remedy
from flash_moe.evaluation.evaluation import Evaluation
from flash_moe.evaluation.limits import DEFAULT_LIMITS, Limits
from flash_moe.evaluation.predictions import TOP
from flash_moe.evaluation.report import Report
from flash_moe.evaluation.spans import SPANS
from flash_moe.options import Settings
from tests.evaluation.data import DIALOGUES, TEXTS, write_data
from tests.evaluation.measuring import figures
from tests.evaluation.test_predictions import Rows, softmax

# A random model never stops.
SHORT = Limits(max_tokens=4)
FEWER = Settings(experts=2)


def evaluated(
    path: Path,
    settings: Settings = Settings(),
    *,
    limits: Limits = SHORT,
    **arguments: Any,
) -> Report:
    with Evaluation(path, settings, limits=limits, **arguments) as evaluation:
        return evaluation.run()


def never_loaded(done: int, total: int) -> None:
    raise AssertionError("the model was loaded")


def test_twice_the_same_and_fewer_experts(demo_folder: Path, data: Path) -> None:
    first, again, fewer = (
        evaluated(demo_folder, settings, data=data, about={"model": "my model"})
        for settings in (Settings(), Settings(), FEWER)
    )
    assert figures(first) == figures(again)
    assert (first.subject.model, first.subject.path) == ("my model", str(demo_folder))
    assert (first.subject.experts_per_token, first.subject.bits, first.items) == (4, "4-bit", 9)
    assert (first.subject.lossy, first.subject.options) == ([], {})
    assert fewer.subject.lossy == ["2 experts of 4 a token, with the weights they have among all"]
    assert fewer.subject.options == {"experts": 2}
    assert first.text is not None
    assert fewer.text is not None
    assert first.text.total.perplexity != fewer.text.total.perplexity
    assert first.text.total.bits_per_byte is not None
    assert first.text.total.bits_per_byte > 0
    for cost in (first.prefill, first.decode):
        assert cost.seconds > 0
        assert cost.expert_bytes > 0


def test_names_in_json_stay(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    """Scripts and saved results rely on them."""
    file, about = tmp_path / "reference", {"model": "demo"}
    evaluated(demo_folder, data=data, save=file, about=about)
    limits = Limits(max_tokens=14)  # the first tokens are forced
    value = evaluated(
        demo_folder, data=data, against=file, constrained=True, limits=limits
    ).to_json()
    assert list(value) == [
        *("model", "path", "architecture", "experts_per_token", "own_experts_per_token", "bits"),
        *("lossy", "runtime", "options", "data", "limit", "constrained", "items", "seconds"),
        *("text", "questions", "json", "tools", "replies", "allowed_mass", "against", "routing"),
        "cost",
    ]
    loss = ["perplexity", "standard_error", "documents", "tokens"]
    assert list(value["text"]) == [*loss, "bits_per_byte", "bytes", "sources"]
    assert list(value["replies"]) == [*loss, "kinds"]
    assert list(value["questions"]) == ["right", "kinds"]
    assert list(value["json"]) == ["valid", "schema", "equal", "kinds"]
    assert list(value["tools"]) == ["parses", "names", "arguments", "kinds"]
    assert list(value["json"]["equal"]) == ["share", "standard_error", "of"]
    masses = value["allowed_mass"]
    assert list(masses) == ["tokens", "mean", "p1", "forced_tokens", "sections"]
    against = value["against"]
    parts = ["kl", "kl_p99", "agreement", "nats_more", "tokens", "documents"]
    assert list(against) == ["file", "reference", "documents_compared", *parts, "spans"]
    assert against["reference"]["model"] == "demo"
    assert list(against["spans"]["json"]) == parts
    assert list(value["routing"]) == ["entropy_bits", "most_bits", "unused_experts"]
    assert list(value["cost"]) == ["prefill", "decode"]


def test_kinds_and_sections(demo_folder: Path, data: Path) -> None:
    report = evaluated(demo_folder, data=data)
    assert {name: set(replies.kinds) for name, replies in report.sections.items()} == {
        "questions": {"sums", "talk"},
        "json": {"json"},
        "tools": {"tools"},
    }
    only = evaluated(demo_folder, data=data, sections=("text",), limit=1)
    assert (only.items, only.replies, only.sections, only.decode.tokens) == (1, None, {}, 0)


def test_with_a_grammar_noise_is_valid(tmp_path: Path, demo_folder: Path) -> None:
    """A random model does not write JSON; held to a schema without room for endless numbers it
    does, and it is valid by the schema."""
    small = {"type": "object", "properties": {"n": {"enum": [3, 4]}}, "required": ["n"]}
    [dialogue] = [dialogue for dialogue in DIALOGUES if dialogue["kind"] == "json"][:1]
    data = write_data(tmp_path / "data")
    line = {**dialogue, "check": {"json": {"n": 3}, "schema": small}}
    (data / "dialogues.jsonl").write_text(json.dumps(line) + "\n")
    free, held = (
        evaluated(
            demo_folder,
            data=data,
            sections=("json",),
            constrained=constrained,
            limits=DEFAULT_LIMITS,
        )
        for constrained in (False, True)
    )
    assert (free.subject.constrained, held.subject.constrained) == (False, True)
    shares = held.sections["json"].total
    assert free.sections["json"].total["valid"].share.value == 0
    assert shares["valid"].share.value == shares["schema"].share.value == 1
    assert free.replies == held.replies


def test_routing_is_written(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "routing.json"
    report = evaluated(demo_folder, data=data, sections=("text",), routing=file)
    written = json.loads(file.read_text())
    assert written["model"] == demo_folder.name
    assert [len(layer["counts"]) for layer in written["layers"]] == [8] * 4
    assert written["entropy_bits"] == report.to_json()["routing"]["entropy_bits"]


def test_a_model_agrees_with_itself(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "reference"
    saved = evaluated(demo_folder, data=data, limit=1, save=file)
    report = evaluated(demo_folder, data=data, against=file)
    against = report.against
    assert against is not None
    assert (report.items, against.documents) == (9, saved.items)
    assert against.model["model"] == demo_folder.name
    assert set(against.spans) == set(SPANS)
    assert against.total is not None
    for part in (against.total, *against.spans.values()):
        assert part.kl.value == part.kl_p99.value == part.nats_more.value == 0
        assert (part.agreement.share.value, part.agreement.of) == (1, part.tokens)
    assert saved.text is not None
    assert saved.replies is not None
    assert against.total.tokens == saved.text.total.tokens + saved.replies.total.tokens


def test_fewer_experts_diverge_as_their_logits_do(
    demo_folder: Path, data: Path, tmp_path: Path
) -> None:
    """Against all logits of both models at once."""
    arguments: dict[str, Any] = {"data": data, "sections": ("text",), "limit": 1}
    evaluated(demo_folder, save=tmp_path / "reference", **arguments)
    report = evaluated(demo_folder, FEWER, against=tmp_path / "reference", **arguments)
    rows: list[Rows] = []
    for experts in (4, 2):
        engine = Engine.load(demo_folder, Settings(experts=experts), prefix=None)
        ids = engine.tokenizer.encode(TEXTS[0]["text"])
        rows.append(softmax(np.array(engine.model(mx.array(ids[:-1])[None])[0])))
        engine.close()
    p, q = rows
    order = np.argsort(-p, -1)
    p, q = (np.take_along_axis(each, order, -1) for each in (p, q))
    p, q = (np.c_[each[:, :TOP], each[:, TOP:].sum(-1)] for each in (p, q))
    divergence = (p * np.log(p / q)).sum(-1)
    assert report.against is not None
    texts = report.against.spans["texts"]
    assert texts.kl.value == pytest.approx(divergence.mean(), rel=1e-3)
    p99 = np.quantile(divergence, 0.99, method="inverted_cdf")
    assert texts.kl_p99.value == pytest.approx(p99, rel=1e-3)
    same = (rows[0].argmax(-1) == rows[1].argmax(-1)).mean()
    assert texts.agreement.share.value == pytest.approx(same)
    assert texts.kl.value > 0


def test_an_interrupted_evaluation_resumes(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": data, "sections": ("text",), "limits": SHORT}
    state = tmp_path / "evaluations"
    expected = figures(evaluated(demo_folder, state_folder=state, **arguments))
    assert list(state.iterdir()) == []

    def interrupt(amount: int) -> None:
        if evaluation.done == 2:
            raise KeyboardInterrupt

    with Evaluation(demo_folder, state_folder=state, **arguments) as evaluation:
        assert (evaluation.done, evaluation.total) == (0, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluation.run(interrupt)
        assert evaluation.done == 2
    assert len(list(state.iterdir())) == 1
    # Another one begins anew.
    with Evaluation(demo_folder, FEWER, state_folder=state, **arguments) as evaluation:
        assert evaluation.done == 0
    amounts: list[int] = []
    with Evaluation(demo_folder, state_folder=state, **arguments) as evaluation:
        assert (evaluation.done, evaluation.total) == (2, 3)
        assert figures(evaluation.run(amounts.append)) == expected
    assert amounts == [1, 1, 1]
    assert list(state.iterdir()) == []


def test_what_cannot_work_is_refused_before_loading(
    demo_folder: Path, data: Path, tmp_path: Path
) -> None:
    file, state = tmp_path / "reference", tmp_path / "evaluations"
    evaluated(demo_folder, data=data, sections=("json",), save=file)
    refused: list[tuple[Path, dict[str, Any], str, Remedy | None]] = [
        (demo_folder, {"data": tmp_path}, "Cannot read", Remedy.EVALUATE_OTHER_DATA),
        (demo_folder, {"sections": ("nope",)}, "sections=nope", None),
        (demo_folder, {"save": tmp_path}, "is a folder", None),
        (demo_folder, {"routing": tmp_path / "no" / "file"}, "folder does not exist", None),
        (demo_folder, {"against": data / "text.jsonl"}, "is not a ref", Remedy.SAVE_REFERENCE),
        (
            demo_folder,
            {"sections": ("tools",), "against": file},
            "has none of these texts",
            Remedy.EVALUATE_SAME_DATA,
        ),
        (BUILT_IN[NAME], {"data": None, "against": file}, "another tokenizer", None),
    ]
    for path, changes, message, remedy in refused:
        arguments: dict[str, Any] = {"data": data, **changes}
        with pytest.raises(FlashMoeError, match=message) as caught:
            Evaluation(path, state_folder=state, progress=never_loaded, **arguments)
        assert caught.value.remedy is remedy
    with pytest.raises(FileNotFoundError):
        Evaluation(demo_folder, data=data, against=tmp_path / "no", progress=never_loaded)
    # Nothing was measured, so there is nothing to resume.
    assert not state.exists()


def test_the_same_evaluation_twice_at_once(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"data": data, "state_folder": tmp_path}
    with (
        Evaluation(demo_folder, **arguments),
        pytest.raises(OptionError, match="Another process"),
    ):
        Evaluation(demo_folder, **arguments)
