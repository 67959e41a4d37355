"""What a run foresaw, kept and compared: against the whole softmax in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.engine import Engine
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.evaluation import replies
from flash_moe.evaluation.reference import (
    TOP,
    Comparison,
    Foresight,
    Reference,
    divided,
    key_of,
    kl,
    likeliest,
    write_reference,
)
from flash_moe.model.load import Settings
from tests.evaluation.data import TEXTS, write_data
from tests.plugin.terminal import fails, works

Rows = np.ndarray[Any, np.dtype[Any]]
# About as many as are kept, and far more.
widths = st.sampled_from([2, TOP - 1, TOP, TOP + 1, TOP + 2, 900])


def softmax(rows: Rows) -> Rows:
    wide = rows.astype(np.float64)
    powers = np.exp(wide - wide.max(-1, keepdims=True))
    found: Rows = powers / powers.sum(-1, keepdims=True)
    return found


def told(rows: Rows, watch: Foresight | Comparison, cuts: list[int]) -> dict[str, Rows]:
    """As evaluation tells it: log-probabilities, some rows at a time."""
    log = mx.array(rows) - mx.logsumexp(mx.array(rows), axis=-1, keepdims=True)
    for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True):
        if start < end:
            watch(log[start:end], [0] * (end - start))
    return watch.arrays()


def drawn(seed: int, width: int, scale: float, step: float) -> tuple[Rows, Rows]:
    """Logits of two models of which one is a little like the other; with a step many are equal."""
    draw = np.random.default_rng(seed)
    first = scale * draw.normal(size=(7, width))
    second = first + draw.normal(size=first.shape)
    if step:
        first, second = (step * np.round(rows / step) for rows in (first, second))
    return first.astype(np.float32), second.astype(np.float32)


seeds, scales = st.integers(0, 2**32), st.floats(0.1, 20)
steps = st.sampled_from([0, 0.5, 4])


@settings(max_examples=60)
@given(seeds, widths, scales, steps)
def test_divergence_is_that_of_all_words_less_that_among_the_rest(
    seed: int, width: int, scale: float, step: float
) -> None:
    """The chain rule, word for word in float64: putting words together loses what they differ in
    among themselves, and nothing else."""
    first, second = drawn(seed, width, scale, step)
    kept = told(first, Foresight(), [])
    found = told(second, Comparison(kept), [])
    p, q = softmax(first), softmax(second)
    whole = (p * np.log(p / q)).sum(-1)
    lost = np.zeros(len(p))
    for row in range(len(p)):
        rest = np.setdiff1d(np.arange(width), kept["ids"][row])
        if len(rest):
            a, b = p[row][rest], q[row][rest]
            lost[row] = (a * np.log((a / a.sum()) / (b / b.sum()))).sum()
    assert (found["kl"] >= 0).all()
    assert found["kl"] == pytest.approx(whole - lost, rel=1e-4, abs=5e-5)
    assert found["same"].tolist() == (first.argmax(-1) == second.argmax(-1)).tolist()
    assert found["more"] == pytest.approx(np.log(p[:, 0] / q[:, 0]), rel=1e-4, abs=1e-4)


@given(seeds, widths, scales, steps, st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)))
def test_a_run_is_exactly_itself(
    seed: int, width: int, scale: float, step: float, cuts: set[int], others: set[int]
) -> None:
    rows, _ = drawn(seed, width, scale, step)
    kept = told(rows, Foresight(), sorted(cuts))
    found = told(rows, Comparison(kept), sorted(others))
    assert (found["kl"] == 0).all()
    assert (found["more"] == 0).all()
    assert (found["same"] == 1).all()


@given(seeds, widths, st.floats(-1e-3, 1e-3))
def test_rounding_is_no_divergence(seed: int, width: int, off: float) -> None:
    """Probabilities that do not quite sum to one are those that do."""
    first, second = (rows.astype(np.float64) for rows in drawn(seed, width, 3, 0))
    assert kl(first + off, second) == pytest.approx(kl(first, second), rel=1e-9, abs=1e-12)
    assert kl(first, first + off) == pytest.approx(0, abs=1e-12)


@given(seeds, widths, scales, steps)
def test_the_likeliest_are_kept(seed: int, width: int, scale: float, step: float) -> None:
    rows, _ = drawn(seed, width, scale, step)
    log = mx.array(rows) - mx.logsumexp(mx.array(rows), axis=-1, keepdims=True)
    ids = likeliest(log)
    values, rest = divided(log, ids)
    ordered = -np.sort(-np.array(log), -1)
    assert (-np.sort(-values, -1) == ordered[:, :TOP]).all()
    others = np.exp(ordered[:, TOP:].astype(np.float64)).sum(-1)
    assert np.exp(rest.astype(np.float64)) == pytest.approx(others, rel=1e-4, abs=1e-30)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference"
    rows, _ = drawn(1, 300, 3, 0)
    kept = {key_of([at, 2], 1): told(rows[:at], Foresight(), []) for at in (1, 7)}
    arrays = {f"{key}.{name}": array for key, a in kept.items() for name, array in a.items()}
    write_reference(path, {"model": "one"}, load_tokenizer(demo_folder), arrays)
    return path


def test_documents_come_back_as_they_were(file: Path) -> None:
    rows, _ = drawn(1, 300, 3, 0)
    reference = Reference(file)
    kept, wanted = reference.find(key_of([7, 2], 1)), told(rows, Foresight(), [])
    assert kept is not None
    assert {name: array.tolist() for name, array in kept.items()} == {
        name: array.tolist() for name, array in wanted.items()
    }
    assert reference.find(key_of([7, 2], 2)) is None
    assert [path.name for path in file.parent.iterdir()] == ["reference"]


@settings(max_examples=40)
@given(st.data())
def test_no_damage_goes_unnoticed(file: Path, data: st.DataObject) -> None:
    sound = file.read_bytes()
    broken = file.with_name("broken")
    if data.draw(st.booleans()):
        broken.write_bytes(sound[: data.draw(st.integers(0, len(sound) - 1))])
    else:
        at = data.draw(st.integers(0, len(sound) - 1))
        broken.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
    with pytest.raises(CheckpointError, match="no reference, or is damaged"):
        Reference(broken)
    broken.unlink()


def test_few_files_are_open(demo_folder: Path, tmp_path: Path) -> None:
    """There may be a thousand documents, and macOS gives 256 files to a process."""
    row = told(drawn(1, 300, 3, 0)[0][:1], Foresight(), [])
    arrays = {f"{at}.{name}": array for at in range(60) for name, array in row.items()}
    write_reference(tmp_path / "many", {}, load_tokenizer(demo_folder), arrays)
    before = len(os.listdir("/dev/fd"))
    reference = Reference(tmp_path / "many")
    assert reference.find("59") is not None
    assert len(os.listdir("/dev/fd")) <= before + 1


def test_words_that_another_model_has_not(file: Path) -> None:
    kept = Reference(file).find(key_of([7, 2], 1))
    assert kept is not None
    with pytest.raises(OptionError, match="other words"):
        told(np.zeros((7, 20), np.float32), Comparison(kept), [])


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never stops."""
    monkeypatch.setattr(replies, "MAX_TOKENS", 4)


@pytest.mark.usefixtures("short")
def test_the_command(demo_folder: Path, tmp_path: Path) -> None:
    data, kept = write_data(tmp_path / "data"), tmp_path / "kept"
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--json")
    saved = json.loads(works(*ask, "--limit", 1, "--save", kept).stdout)
    again = json.loads(works(*ask, "--against", kept).stdout)
    found = again["against"]
    assert (again["items"], found["documents_compared"]) == (9, saved["items"])
    assert found["reference"]["model"] == str(demo_folder)
    assert set(found["spans"]) == {"texts", "replies", "json", "calls", "structural"}
    for part in (found, *found["spans"].values()):
        for name in ("kl", "kl_p99", "nats_more"):
            assert part[name]["value"] == 0
        assert part["agreement"] == {**part["agreement"], "share": 1, "of": part["tokens"]}
    assert found["tokens"] == sum(saved[part]["tokens"] for part in ("text", "replies"))
    # Two experts of four, as a table: nothing cut off, and nothing wider than a terminal.
    fewer = works(*ask[:-1], "-o", "experts", 2, "--only", "json", "--against", kept).stdout
    assert "Both have 1 of 1 items." in fewer
    assert "…" not in fewer
    tables = [line for line in fewer.splitlines()[2:] if not line.startswith("Against ")]
    assert max(map(len, tables)) <= 80


@pytest.mark.usefixtures("short")
def test_what_the_command_refuses(demo_folder: Path, tmp_path: Path, llm_home: Path) -> None:
    data, kept = write_data(tmp_path / "data"), tmp_path / "kept"
    ask = ("flash-moe", "eval", demo_folder, "--data", data)
    works(*ask, "--only", "json", "--save", kept)
    assert "has none of these texts" in fails(*ask, "--only", "tools", "--against", kept)
    assert "another tokenizer" in fails(
        "flash-moe", "eval", "flash-moe-tiny", "--limit", 1, "--against", kept
    )
    assert "No such file" in fails(*ask, "--against", tmp_path / "nothing")
    assert "is a folder" in fails(*ask, "--save", tmp_path)
    assert "in no folder that there is" in fails(*ask, "--routing", tmp_path / "no" / "file")
    # Nothing was measured, so there is nothing to go on with.
    assert list((llm_home / "llm-flash-moe" / "evaluations").iterdir()) == []


def test_fewer_experts_diverge_as_their_logits_do(demo_folder: Path, tmp_path: Path) -> None:
    """From end to end, against all logits of both models at once."""
    data, kept = write_data(tmp_path / "data"), tmp_path / "kept"
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text", "--limit", 1)
    works(*ask, "--save", kept)
    result = json.loads(works(*ask, "-o", "experts", 2, "--against", kept, "--json").stdout)
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
    found = result["against"]["spans"]["texts"]
    assert found["kl"]["value"] == pytest.approx(divergence.mean(), rel=1e-3)
    p99 = np.quantile(divergence, 0.99, method="inverted_cdf")
    assert found["kl_p99"]["value"] == pytest.approx(p99, rel=1e-3)
    same = (rows[0].argmax(-1) == rows[1].argmax(-1)).mean()
    assert found["agreement"]["share"] == pytest.approx(same)
    assert result["against"]["kl"]["value"] > 0
