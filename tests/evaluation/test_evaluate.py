"""Evaluation from end to end on a random model: its figures are noise, but they are right."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import open_folder
from flash_moe.engine import Engine
from flash_moe.errors import CheckpointError
from flash_moe.evaluation import evaluate as measuring
from flash_moe.evaluation import likelihood, replies
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.evaluate import evaluate
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.evaluation.likelihood import Surprise, text_nats
from flash_moe.evaluation.replies import Given, expected, greedy
from flash_moe.evaluation.routing import Routing, entropy
from flash_moe.model.load import Settings
from flash_moe.pack.job import plan_pack
from flash_moe.pack.requantize import make_recast
from llm_flash_moe.options import SETTINGS
from tests.evaluation.data import DIALOGUES, TEXTS, write_data
from tests.plugin.terminal import fails, llm, logged, works

FEWER = "2 experts of 4 a token, with the weights they have among all"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "heldout")


@pytest.fixture(scope="module")
def engine(demo_folder: Path) -> Engine:
    return Engine.load(demo_folder, Settings(runtime="mlx"))


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never stops."""
    monkeypatch.setattr(replies, "MAX_TOKENS", 8)


def plain_nats(folder: Path, ids: list[int]) -> float:
    """Of all tokens but the first, by mlx-lm alone."""
    model, _ = load_model(folder)
    logits = np.array(model(mx.array(ids[:-1])[None])[0], np.float64)
    top = logits.max(-1, keepdims=True)
    log = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(-log[np.arange(len(ids) - 1), ids[1:]].sum())


def test_perplexity_is_that_of_a_plain_forward(engine: Engine, demo_folder: Path) -> None:
    text = TEXTS[0]["text"]
    ids = engine.tokenizer.encode(text)
    nats, tokens, nbytes = text_nats(engine.model, engine.tokenizer, text)
    assert tokens == len(ids) - 1
    assert nbytes == len(text.encode()) - len(engine.tokenizer.decode(ids[:1]).encode())
    assert nats == pytest.approx(plain_nats(demo_folder, ids), rel=1e-5)


def test_windows_and_chunks_count_every_token_once(
    engine: Engine, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TEXTS[0]["text"]
    ids = engine.tokenizer.encode(text)
    monkeypatch.setattr(likelihood, "WINDOW", 16)
    pieces = [ids[at : at + 17] for at in range(0, len(ids) - 1, 16)]
    assert len(pieces) > 2
    whole = sum(plain_nats(demo_folder, piece) for piece in pieces)
    monkeypatch.setattr(likelihood, "LOGIT_BYTES", 5 * 4 * 2048)
    nats, tokens, _ = text_nats(engine.model, engine.tokenizer, text)
    assert tokens == len(ids) - 1
    assert nats == pytest.approx(whole, rel=1e-5)


def test_texts_too_short_to_be_foreseen(engine: Engine) -> None:
    assert text_nats(engine.model, engine.tokenizer, "") == (0.0, 0, 0)


def test_replies_are_scored_given_their_prompt(
    engine: Engine, demo_folder: Path, data: Path
) -> None:
    dialogues = read_held_out(data, ["questions", "tools"]).dialogues
    found = evaluate(engine, read_held_out(data, ["questions", "tools"]))
    for kind in ("sums", "tools"):
        nats = 0.0
        for dialogue in dialogues:
            if dialogue.kind == kind:
                prompt, reply, *_ = expected(engine, dialogue)
                nats += plain_nats(demo_folder, prompt + reply) - plain_nats(demo_folder, prompt)
        assert sum(found.replies[kind].nats) == pytest.approx(nats, rel=1e-4)


def test_the_right_reply_is_what_the_template_adds(engine: Engine, data: Path) -> None:
    dialogues = read_held_out(data).dialogues
    replies = [
        engine.tokenizer.tokenizer.decode(expected(engine, d).reply, skip_special_tokens=False)
        for d in dialogues
    ]
    assert replies[0] == "2<|im_end|>"
    assert replies[1] == "Two and two.\n</think>\n\n4<|im_end|>"
    assert replies[4].startswith("<tool_call>\n<function=weather>\n<parameter=place>\nBonn\n")
    assert replies[4].endswith("</tool_call><|im_end|>")
    # What is foreseen follows what is replied to.
    for dialogue in dialogues:
        prompt = expected(engine, dialogue).prompt
        asked = greedy(engine, dialogue).asked
        assert engine.tokenizer.tokenizer.decode(prompt, skip_special_tokens=False) == asked


def test_a_model_that_replies_rightly_gets_full_marks(
    engine: Engine, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(engine: Engine, dialogue: Any, grammar: None) -> Given:
        prompt, reply, *_ = expected(engine, dialogue)
        decode = engine.tokenizer.tokenizer.decode
        text = decode(reply, skip_special_tokens=False).removesuffix("<|im_end|>")
        asked = decode(prompt, skip_special_tokens=False)
        return Given(text, asked, Cost(), [], 0)

    monkeypatch.setattr(measuring, "greedy", told)
    found = evaluate(engine, read_held_out(data)).to_json()
    assert [found[s]["kinds"].keys() for s in ("questions", "json", "tools")] == [
        {"sums", "talk"},
        {"json"},
        {"tools"},
    ]
    for section, names in (
        ("questions", ["right"]),
        ("json", ["valid", "schema", "equal"]),
        ("tools", ["parses", "names", "arguments"]),
    ):
        assert [found[section][name]["share"] for name in names] == [1.0] * len(names)


def test_routing_counts_what_was_forced_and_nothing_else(engine: Engine, data: Path) -> None:
    held_out = read_held_out(data)
    found = evaluate(engine, held_out)
    tokens = sum(len(engine.tokenizer.encode(text.text)) - 1 for text in held_out.texts)
    for dialogue in held_out.dialogues:
        prompt, reply, *_ = expected(engine, dialogue)
        tokens += len(prompt) + len(reply) - 1
    k = engine.model.plan.experts_per_token
    assert [int(counts.sum()) for counts in found.routing.counts] == [tokens * k] * 4
    assert engine.model.streamer.watch is None


@pytest.mark.parametrize("runtime", ["mlx", "auto"])
def test_routing_is_what_the_gates_say(runtime: str, demo_folder: Path) -> None:
    resident, _ = load_model(demo_folder)
    tokens = mx.array([[7, 300, 12, 45, 500]])
    block = resident.language_model.model.layers[0].mlp
    seen: list[mx.array] = []
    switch = block.switch_mlp

    def watched(x: mx.array, indices: mx.array) -> Any:
        seen.append(indices)
        return switch(x, indices)

    block.switch_mlp = watched
    mx.eval(resident(tokens))
    wanted = np.bincount(np.array(seen[0]).reshape(-1), minlength=8)
    engine = Engine.load(demo_folder, Settings(runtime=runtime))
    routing = Routing(engine.model.streamer)
    with routing.watching():
        mx.eval(engine.model(tokens))
    assert routing.counts[0].tolist() == wanted.tolist()
    engine.close()


def test_entropy() -> None:
    assert entropy(np.array([5, 5, 5, 5])) == pytest.approx(2)
    assert entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.array([0, 0])) == 0


def test_standard_errors() -> None:
    """Of equally long documents it is that of their mean, times the perplexity."""
    nats = [1.0, 2.0, 4.0]
    surprise = Surprise(nats=[10 * n for n in nats], tokens=[10] * 3)
    spread = np.std(nats, ddof=1) / math.sqrt(3)
    assert surprise.perplexity == pytest.approx(math.exp(7 / 3))
    assert surprise.standard_error == pytest.approx(math.exp(7 / 3) * spread)
    assert Surprise(nats=[1.0], tokens=[1]).standard_error is None
    broken = Surprise(nats=[math.nan, 1e9], tokens=[1, 1], nbytes=1).to_json()
    json.dumps(broken, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "dialogues.jsonl, line 2"),
        ({"check": {"calls": 3}}, "is no check"),
        ({"check": {"json": 1, "schema": {"oneOf": []}}}, "uses 'oneOf'"),
        ({"messages": []}, "messages are no list"),
        ({"reply": {"role": "user"}}, "no message of the assistant"),
        ({"thinking": "yes"}, "thinking is neither"),
        ({"kind": 3}, "kind is no text"),
    ],
)
def test_data_that_cannot_be_judged(line: Any, message: str, tmp_path: Path) -> None:
    second = line if isinstance(line, str) else json.dumps({**DIALOGUES[0], **line})
    lines = f"{json.dumps(DIALOGUES[0])}\n{second}\n"
    (tmp_path / "dialogues.jsonl").write_text(lines)
    with pytest.raises(CheckpointError, match=message):
        read_held_out(tmp_path, ["json"])
    with pytest.raises(CheckpointError, match="--data FOLDER"):
        read_held_out(tmp_path, ["text"])


def test_limits_and_sections(data: Path) -> None:
    found = read_held_out(data, limit=1)
    assert (len(found.texts), [d.kind for d in found.dialogues]) == (
        1,
        ["sums", "talk", "json", "tools"],
    )
    assert [d.kind for d in read_held_out(data, ["json"]).dialogues] == ["json"]


def test_with_a_grammar_noise_is_valid(tmp_path: Path, demo_folder: Path) -> None:
    """What a random model says is no JSON; held to a schema without room for endless numbers, it
    is, and as the schema wants it."""
    small = {"type": "object", "properties": {"n": {"enum": [3, 4]}}, "required": ["n"]}
    [asked] = [dialogue for dialogue in DIALOGUES if dialogue["kind"] == "json"][:1]
    data = write_data(tmp_path / "data")
    line = {**asked, "check": {"json": {"n": 3}, "schema": small}}
    (data / "dialogues.jsonl").write_text(json.dumps(line) + "\n")
    ask = ("--data", data, "--only", "json", "--json")
    free, held = (
        json.loads(works("flash-moe", "eval", demo_folder, *ask, *more).stdout)
        for more in ((), ("--constrained",))
    )
    assert (free["constrained"], held["constrained"]) == (False, True)
    assert free["json"]["valid"]["share"] == 0
    assert held["json"]["valid"]["share"] == held["json"]["schema"]["share"] == 1
    assert free["replies"] == held["replies"]


def test_the_command(demo_folder: Path, data: Path, tmp_path: Path) -> None:
    """By name and by folder, twice the same; with another K, and with fewer bits."""
    works("flash-moe", "add", demo_folder, "--name", "demo")
    as_json = ("--data", data, "--json")
    first, again, by_folder, fewer = (
        json.loads(works("flash-moe", "eval", *which, *as_json).stdout)
        for which in (("demo",), ("demo",), (demo_folder,), ("demo", "-o", "experts", 2))
    )
    for result in (first, again, by_folder, fewer):
        assert result.pop("seconds") > 0
        for cost in result["cost"].values():
            assert cost.pop("seconds") > 0
            assert cost.pop("tokens_per_second") > 0
    assert first == again
    assert {**by_folder, "model": "demo"} == first
    assert (first["experts_per_token"], first["bits"], first["items"]) == (4, "4-bit", 9)
    assert (first["lossy"], fewer["lossy"]) == ([], [FEWER])
    assert first["text"]["perplexity"] != fewer["text"]["perplexity"]
    assert first["text"]["bits_per_byte"] > 0

    routes = tmp_path / "routes.json"
    ask = ("--data", data, "--only", "text", "--routing", routes)
    shown = works("flash-moe", "eval", "demo", *ask)
    assert "perplexity" in shown.stdout
    assert re.search(r"Foreseeing: [\d,]+ tokens at [\d,.]+/s, [\d.]+ MB of experts", shown.stdout)
    assert "Replying" not in shown.stdout
    assert "replied" not in shown.stdout
    written = json.loads(routes.read_text())
    assert written["model"] == "demo"
    assert [len(layer["counts"]) for layer in written["layers"]] == [8] * 4
    assert "--data FOLDER" in fails("flash-moe", "eval", "demo", "--data", tmp_path)
    assert "no model 'nope'" in fails("flash-moe", "eval", "nope", "--data", data)


def test_options_are_those_of_llm(demo_folder: Path, data: Path) -> None:
    """Of loading: others would change nothing, and are refused with those that do."""
    ask = ("flash-moe", "eval", demo_folder, "--data", data, "--only", "text", "--limit", 1)
    options = ("-o", "experts", 2, "-o", "weights", "renormalise", "-o", "runtime", "mlx")
    found = json.loads(works(*ask, *options, "--json").stdout)
    assert found["options"] == {"experts": 2, "weights": "renormalise", "runtime": "mlx"}
    assert (found["experts_per_token"], found["runtime"]) == (2, "mlx")
    assert found["lossy"] == ["2 experts of 4 a token"]
    known = ", ".join(SETTINGS)
    for option, message in (
        (("temperature", 1), f"-o temperature changes nothing here. Choose {known}."),
        (("nope", 1), f"-o nope is no option. Choose {known}."),
        (("experts", 0), "-o experts 0: choose 1 or more"),
        (("experts", "few"), "-o experts few: Input should be a valid integer"),
        (("runtime", "abacus"), "choose auto, metal, cuda, native, mlx"),
    ):
        assert message in fails(*ask, "-o", *option)


def test_fewer_bits_are_named_everywhere(demo_folder: Path, data: Path) -> None:
    packed = works("flash-moe", "pack", demo_folder, "--bits", 2, "--group-size", 128)
    said = "experts requantized from 4-bit to 2-bit (fit)"
    assert f"less exact: {said}" in packed.stdout
    assert re.search(
        r"Quantized [\d.]+ MB of experts \(fit\) at [\d.]+ GB/s a core, [\d.]+ GB/s in all; "
        r"peak memory [\d.]+ [MG]B",
        packed.stdout,
    )
    assert said in works("flash-moe", "info", "demo-2bit").stdout
    assert said in works("flash-moe", "models").stdout
    listed = json.loads(works("flash-moe", "models", "--json").stdout)["demo-2bit"]
    info = json.loads(works("flash-moe", "info", "demo-2bit", "--json").stdout)
    expected = {"bits": 2, "group_size": 128, "method": "fit", "source": "4-bit"}
    assert listed["requantized"] == info["requantized"] == expected
    works("-m", "demo-2bit", "-o", "max_tokens", 3, "-o", "experts", 2, "Hello")
    (turn,) = logged()
    assert turn["response_json"]["lossy"] == [FEWER, said]
    ask = ("--data", data, "--only", "text", "--json")
    assert json.loads(works("flash-moe", "eval", "demo-2bit", *ask).stdout)["lossy"] == [said]


def test_what_pack_refuses(demo_folder: Path) -> None:
    for option in (("--method", "fit"), ("--group-size", 64)):
        refused = llm("flash-moe", "pack", demo_folder, *option)
        assert refused.exit_code == 2
        assert f"{option[0]} goes with --bits" in refused.stderr
    assert "no more than 4 bits already" in fails("flash-moe", "pack", demo_folder, "--bits", 4)


def test_packs_say_nothing_of_bits_that_they_kept(demo_folder: Path, tmp_path: Path) -> None:
    manifest = plan_pack(open_folder(demo_folder), tmp_path / "pack").write()
    assert manifest.requantized is None
    assert make_recast(2).to_json() == {"bits": 2, "group_size": 64, "method": "fit"}
