"""A whole benchmark of a small model: what its report must say whatever the machine is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flash_moe import Benchmark, Checkpoint, Engine, Request, Settings
from flash_moe.errors import OptionError
from flash_moe.measure import bench, bench_tokens
from flash_moe.measure.bench_picture import COLOURS, LEFT, RIGHT, WIDTH, draw
from flash_moe.measure.bench_report import BenchReport
from flash_moe.measure.eviction import KEPT, NO_CALL, Eviction
from flash_moe.model.load import StreamedModel, load
from flash_moe.stream.residency import Residency

STATES = ["hot", "mixed", "cold", "nothing read"]


@pytest.fixture(scope="module")
def report(demo_folder: Path) -> BenchReport:
    return Benchmark(demo_folder, name="demo & co", tokens=2, prompts=(1, 40)).run()


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> Iterator[StreamedModel]:
    model = load(demo_folder)
    yield model
    model.close()


def measured(model: StreamedModel) -> BenchReport:
    """Of a model that is loaded; nothing is copied."""
    return Benchmark(model.path, tokens=1, prompts=(3,)).measure(model, 1e9, None)


def test_bytes_are_what_headers_say(report: BenchReport, demo_folder: Path) -> None:
    """Layers × K × record, whether they were read or mapped."""
    plan = Checkpoint(demo_folder).plan()
    record = plan.expert_bytes // plan.layers // plan.experts
    assert plan.token_bytes == plan.layers * plan.experts_per_token * record
    for cost in report.tokens:
        used = 0 if cost.state == "nothing read" else plan.token_bytes
        assert cost.nbytes == used
        assert 0 <= cost.mapped <= used
        assert cost.from_disk is None or 0 <= cost.from_disk <= used
    one, forty = report.prompts
    for run in (one.first, one.again):
        assert run.nbytes == plan.token_bytes
    for run in (forty.first, forty.again):
        # Random words use most of the experts, and each is read once.
        assert plan.expert_bytes // 2 < run.nbytes <= plan.expert_bytes


def test_states_and_what_is_cached_in_them(report: BenchReport) -> None:
    states = [cost.state for cost in report.tokens]
    assert states == (STATES if report.no_eviction is None else ["hot", "nothing read"])
    rates = {cost.state: cost.hit_rate for cost in report.tokens}
    assert rates["nothing read"] is None
    if report.no_eviction is None and rates["hot"] is not None:
        assert rates["cold"] == 0
        assert rates["cold"] <= (rates["mixed"] or 0) <= 1
        # Memory is plenty; but another program may have wanted it.
        assert rates["hot"] > 0.5


def test_parts_are_all_of_the_time(report: BenchReport) -> None:
    for cost in report.tokens:
        parts = cost.parts.to_json()
        assert list(parts) == list(COLOURS)
        assert sum(cost.parts.shares().values()) == pytest.approx(1)
        assert all(parts[name] > 0 for name in ("mixers", "experts", "head", "sampling", "ours"))
        assert (cost.reading > 0, parts["reading"] > 0) == (cost.state != "nothing read",) * 2


def test_json_is_the_report(report: BenchReport) -> None:
    value = report.to_json()
    assert json.loads(json.dumps(value)) == value
    assert value["model"] == "demo & co"
    for cost in report.tokens:
        row = value["tokens"][cost.state]
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(1)
        assert row["shares"].keys() == row["parts"].keys()
    assert [prompt["tokens"] for prompt in value["prompts"]] == [1, 40]


def test_the_picture_has_a_bar_for_each_state(report: BenchReport, tmp_path: Path) -> None:
    report.write_picture(tmp_path / "picture.svg")
    assert os.listdir(tmp_path) == ["picture.svg"]
    text = (tmp_path / "picture.svg").read_text()
    assert text == draw("demo & co", report.tokens, report.roofline)
    root = ElementTree.fromstring(text)
    words = [element.text or "" for element in root.iter() if element.tag.endswith("}text")]
    assert words[0].startswith("demo & co: ")
    bars = [element for element in root.iter() if element.get("height") == "26"]
    assert len(bars) == len(report.tokens) * len(COLOURS)
    longest = max(cost.seconds for cost in report.tokens)
    for number, cost in enumerate(report.tokens):
        assert cost.state in words
        parts = bars[number * len(COLOURS) :][: len(COLOURS)]
        width = sum(float(part.get("width", 0)) for part in parts)
        # Nothing is longer than the longest bar, or its floor.
        assert width <= (WIDTH - LEFT - RIGHT) * cost.seconds / longest + 1


# Machines that cannot measure all of it -----------------------------------------------------------


def test_without_eviction_nothing_is_measured_cold(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    report = measured(model)
    assert report.no_eviction == NO_CALL
    assert [cost.state for cost in report.tokens] == ["hot", "nothing read"]
    assert report.roofline.cold is None
    assert report.to_json()["left_out"] == [f"Nothing was measured cold: {NO_CALL}."]
    assert len(report.tables()[1].rows) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops pages on request")
def test_a_file_system_that_keeps_its_pages_is_noticed(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model.path).close()
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: None)
    store = model.streamer.store
    for file, offset, length, _ in store.pieces(0, [0]).tolist():
        os.pread(file, length, offset)
    assert Eviction(model.streamer).why_not == KEPT


def test_where_the_system_does_not_count_what_came_from_the_disk(
    model: StreamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_tokens, "bytes_from_disk", lambda: None)
    report = measured(model)
    for cost in report.tokens:
        assert (cost.hit_rate, cost.floor(report.roofline)) == (None, None)
    assert any("floors are unknown" in line for line in report.left_out())
    draw("", report.tokens, report.roofline)


@pytest.mark.parametrize("changed", [False, True])
def test_what_is_evicted_is_gone(model: StreamedModel, changed: bool) -> None:
    """Mapped pages, too, which the system would keep; and those that no disk has yet."""
    evict, mapping = Eviction(model.streamer), model.streamer.mapping
    if evict.why_not:
        pytest.skip(evict.why_not)
    measured(model)
    if changed:
        for layer in model.streamer.store.layers:
            for file in {run.file for run in layer.runs}:
                with file.open("r+b") as opened:
                    content = opened.read()
                    opened.seek(0)
                    opened.write(content)
    evict()
    layers, residency = model.streamer.store.layers, Residency(model.streamer.store)
    cached = [
        residency.cached(number, expert)
        for number, layer in enumerate(layers)
        for expert in range(layer.experts)
    ]
    assert not any(cached)
    assert mapping is None or (mapping.mapped == 0 and mapping.limit > 0)


# The model afterwards -----------------------------------------------------------------------------


def test_replies_before_and_after_are_the_same_to_the_byte(demo_folder: Path) -> None:
    engine = Engine.load(demo_folder, prefix=None)
    ask = Request(
        messages=[{"role": "user", "content": "Hello"}], max_tokens=24, temperature=0.8, seed=5
    )
    before = "".join(engine.reply(ask))
    report = measured(engine.model)
    reply = engine.reply(ask)
    assert "".join(reply) == before
    assert reply.stats.expert_bytes >= report.subject.token_bytes
    engine.close()


# What is refused ----------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused_before_anything_is_loaded(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load", lambda *arguments: pytest.fail("it was loaded"))
    with pytest.raises(OptionError, match="tokens=0: choose 1 or more"):
        Benchmark(demo_folder, tokens=0)
    with pytest.raises(OptionError, match="prompts=0: choose 1 token or more"):
        Benchmark(demo_folder, prompts=(4, 0))
    with pytest.raises(OptionError, match=r"memory=1,000,000: choose [\d,]+ or more"):
        Benchmark(demo_folder, memory=1_000_000)
    with pytest.raises(OptionError, match="Choose less, or set no limit"):
        Benchmark(demo_folder, memory=10**15)
    with pytest.raises(OptionError, match="is a folder"):
        Benchmark(demo_folder, picture=tmp_path)
    with pytest.raises(OptionError, match="its folder does not exist"):
        Benchmark(demo_folder, picture=tmp_path / "no" / "picture.svg")


def test_a_model_is_mapped_as_on_a_machine_of_that_size(
    demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the memory that it is held to; what is asked for otherwise stays."""
    given: list[Settings] = []

    def stop(path: Path, settings: Settings) -> None:
        given.append(settings)
        raise OptionError("enough")

    monkeypatch.setattr(bench, "load", stop)
    monkeypatch.setattr(bench, "held_to", lambda *arguments: nullcontext())
    limit = (bench.inspect_machine().page_cache_bytes or 0) * 3 // 4
    for settings in (Settings(), Settings(mapped_bytes=5)):
        with pytest.raises(OptionError, match="enough"):
            Benchmark(demo_folder, settings, memory=limit).run()
    assert [one.mapped_bytes for one in given] == [limit // 2, 5]
