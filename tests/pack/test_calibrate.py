"""What columns are multiplied with, measured while the model is streamed, against mlx-lm's model
with everything in memory and sums in float64; and packs that are fitted by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from llm.cli import cli
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import load_model

from flash_moe.chat.tokenizer import load_tokenizer
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.model.load import Settings, load
from flash_moe.pack.activations import Activations, LayerSums
from flash_moe.pack.calibrate import KEPT, LEVEL_ROWS, Calibration, Measured, read_calibration
from flash_moe.pack.job import plan_pack
from flash_moe.pack.requantize import make_recast
from flash_moe.pack.split_planes import make_planes
from tests.architectures import vendor_layout, write_checkpoint
from tests.pack.test_requantize import _wide, as_checkpoint
from tests.plugin.terminal import fails, works
from tests.strategies import tiny_checkpoint

IDS = np.random.default_rng(5).integers(0, 90, 700).tolist()
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def in_memory(source: Path, ids: list[int], window: int) -> dict[str, LayerSums]:
    """By mlx-lm's own modules, whose inputs and matrices are then multiplied in float64."""
    model, _ = load_model(source)
    model.set_dtype(mx.float32)
    sums: dict[str, LayerSums] = {}
    for path, switch in model.named_modules():
        if isinstance(switch, (SwitchGLU, SwitchMLP)):
            sums[path] = _watched(switch)
    for at in range(0, len(ids), window):
        mx.eval(model(mx.array(ids[at : at + window])[None]))
    return sums


def _watched(switch: Any) -> LayerSums:
    first, last = ("fc1", "fc2") if isinstance(switch, SwitchMLP) else ("up_proj", "down_proj")
    w = {name: _float64(switch[name]) for name in PROJECTIONS if name in switch} | {
        name: _float64(switch[name]) for name in (first, last)
    }
    found = LayerSums(
        np.zeros(w[first].shape[2]), np.zeros(w[last].shape[::2]), np.zeros(len(w[first]), np.int64)
    )
    kind = type(switch)

    def product(name: str, expert: int, rows: Any) -> mx.array:
        out = rows @ w[name][expert].T
        return mx.array(out + np.array(switch[name].get("bias", mx.zeros((64, 1)))[expert]))

    class Watched(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
            rows, chosen = np.array(x, np.float64).reshape(-1, x.shape[-1]), np.array(indices)
            for row, experts in zip(rows, chosen.reshape(len(rows), -1), strict=True):
                for expert in experts:
                    given = [product(first, expert, row)]
                    if kind is SwitchGLU:
                        given.append(product("gate_proj", expert, row))
                    inner = np.array(self.activation(*given), np.float64)
                    found.inputs += row**2
                    found.inner[expert] += inner**2
                    found.routed[expert] += 1
            output: mx.array = super().__call__(x, indices)
            return output

    switch.__class__ = Watched
    return found


def _float64(matrix: Any) -> Any:
    if "scales" not in matrix:
        return np.array(matrix.weight, np.float64)
    parts = (matrix[name] for name in ("weight", "scales", "biases"))
    wide = mx.dequantize(*parts, group_size=matrix.group_size, bits=matrix.bits)
    return np.array(wide, np.float64)


def same(got: dict[str, LayerSums], want: dict[str, LayerSums], rtol: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for path, sums in want.items():
        assert np.array_equal(got[path].routed, sums.routed), path
        for name in ("inputs", "inner"):
            a, b = getattr(got[path], name), getattr(sums, name)
            assert np.allclose(a, b, rtol=rtol, atol=rtol * b.mean()), (path, name)


@pytest.fixture(scope="module")
def wanted(demo_folder: Path) -> Callable[[int], dict[str, LayerSums]]:
    known: dict[int, dict[str, LayerSums]] = {}

    def of(window: int) -> dict[str, LayerSums]:
        if window not in known:
            known[window] = in_memory(demo_folder, IDS[:80], window)
        return known[window]

    return of


@given(st.sampled_from([33, 80]), st.integers(1, 80))
@settings(max_examples=5)
def test_sums_are_those_of_the_model_in_memory(
    wanted: Any, demo_folder: Path, tmp_path_factory: Any, window: int, chunk: int
) -> None:
    """However the text is cut into chunks."""
    state = tmp_path_factory.mktemp("state")
    calibration = Calibration(demo_folder, "", IDS[:80])
    measured = calibration.collect(state, window=window, chunk=chunk)
    same(measured.layers, wanted(window))


@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen3_moe", "bfloat16"), ("gpt_oss", "float32"), ("phimoe", "float32")]
)
def test_unquantized_experts_and_biases(name: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(*_wide(name, dtype), tmp_path / "source")
    measured = Calibration(tmp_path / "source", "", IDS[:40]).collect(tmp_path)
    same(measured.layers, in_memory(tmp_path / "source", IDS[:40], 40))


def test_without_kernels_and_of_what_is_computed(demo_folder: Path, wanted: Any) -> None:
    """The replies stay the same while somebody looks on, and are nobody's business after."""
    found = []
    for runtime in ("auto", "mlx"):
        model, activations = load(demo_folder, Settings(runtime=runtime)), Activations()
        prompt = mx.array(IDS[:80])[None]
        with activations.watching(model.streamer):
            seen = np.array(model(prompt))
        same(activations.layers, wanted(80))
        before = [sums.routed.copy() for sums in activations.layers.values()]
        assert np.allclose(np.array(model(prompt)), seen, atol=1e-3 * np.abs(seen).max())
        after = [sums.routed for sums in activations.layers.values()]
        assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
        found.append(seen)
        model.close()
    assert np.allclose(*found, atol=1e-3 * np.abs(found[0]).max())


def test_in_sixteen_bits_as_on_a_gpu(tmp_path: Path) -> None:
    """Nothing is widened then: every layer is off by its own roundings, and mlx-lm's by more."""
    source = tiny_checkpoint(tmp_path / "source", dtype="bfloat16")
    model, activations = load(source, Settings(runtime="mlx")), Activations()
    seen: dict[int, Any] = {}
    with activations.watching(model.streamer):
        record = model.streamer.record
        assert record is not None

        def beside(
            layer: int, experts: list[int], inner: Any, x: mx.array, local: mx.array
        ) -> mx.array:
            wide = np.array(inner(x.astype(mx.float32), local))
            found = record(layer, experts, inner, x, local)
            assert found.dtype == mx.bfloat16
            assert np.abs(np.array(found.astype(mx.float32)) - wide).max() < 0.02 * wide.max()
            rows = np.array(x.astype(mx.float32), np.float64).reshape(-1, x.shape[-1])
            seen[layer] = local.shape[-1] * (rows**2).sum(axis=0)
            return found

        model.streamer.record = beside
        model.advance(mx.array(IDS[:64])[None], model.make_cache())
    assert len(seen) == 4
    for layer, want in seen.items():
        path = model.streamer.store.layers[layer].path
        assert np.allclose(activations.layers[path].inputs, want, rtol=1e-5)
    model.close()


@given(st.integers(0, 10**6), st.integers(1, 10**6))
def test_few_rows_weigh_little(rows: int, many: int) -> None:
    """An expert's own columns count by its rows, beside LEVEL_ROWS that are all alike."""
    squares = np.array([0.0, 1.0, 5.0])
    layer = LayerSums(
        np.array([2.0, 4.0]) * many,
        np.array([rows * squares, many * squares]),
        np.array([rows, many]),
    )
    measured = Measured({"a": layer})
    for projection in ("gate_proj", "up_proj", "fc1"):
        columns = measured.of("a", projection, 0)
        assert columns is not None
        assert np.allclose(columns, np.array([2, 4]) * many / (rows + many))
    columns = measured.of("a", "down_proj", 0)
    if not rows:
        assert columns is None
    else:
        assert columns is not None
        assert columns.dtype == np.float32
        own = rows / (rows + LEVEL_ROWS)
        assert np.allclose(columns, own * squares + (1 - own) * 2, rtol=1e-5)
    assert measured.of("b", "down_proj", 1) is None
    assert (measured.unreached, measured.experts) == (int(not rows), 2)


@pytest.mark.parametrize("read", [1, 4, 5])
def test_an_interrupted_reading_goes_on(read: int, demo_folder: Path, tmp_path: Path) -> None:
    cut = {"window": 16, "saved_every": 2}
    calibration = Calibration(demo_folder, "", IDS[:100])
    (tmp_path / "whole").mkdir()
    whole = calibration.collect(tmp_path / "whole", **cut)
    calls: list[int] = []

    def interrupted(tokens: int) -> None:
        calls.append(tokens)
        if len(calls) == read + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibration.collect(tmp_path, interrupted, **cut)
    told: list[int] = []
    rest = calibration.collect(tmp_path, told.append, **cut)
    assert told[0] == read // 2 * 2 * 16
    assert sum(told) == 100
    for path, sums in whole.layers.items():
        for name in LayerSums.__slots__:
            assert np.array_equal(getattr(sums, name), getattr(rest.layers[path], name))
    told.clear()
    same(calibration.collect(tmp_path, told.append, **cut).layers, whole.layers, 1e-9)
    assert told == [100]


def test_what_was_kept_and_cannot_be_read_is_collected_anew(
    demo_folder: Path, tmp_path: Path
) -> None:
    calibration = Calibration(demo_folder, "", IDS[:20])
    whole = calibration.collect(tmp_path)
    for data in (b"", b"PK no zip", (tmp_path / KEPT).read_bytes()[:300]):
        (tmp_path / KEPT).write_bytes(data)
        same(calibration.collect(tmp_path).layers, whole.layers, 1e-9)


def test_numbers_that_are_not_finite_are_refused(demo_folder: Path, tmp_path: Path) -> None:
    calibration = Calibration(demo_folder, "", IDS[:20])
    calibration.collect(tmp_path)
    with np.load(tmp_path / KEPT) as arrays:
        kept = {key: arrays[key] for key in arrays.files}
    key = next(key for key in kept if "inner" in key)
    kept[key][0, 0] = np.inf
    np.savez(tmp_path / KEPT, **kept)
    with pytest.raises(CheckpointError, match="not finite"):
        calibration.collect(tmp_path)


def test_no_group_fits_worse_what_it_is_multiplied_with(demo_folder: Path, tmp_path: Path) -> None:
    """From codes of 4 bits the fit is the optimum, but for the rounding of scale and bias."""
    calibration = Calibration(demo_folder, "text", IDS)
    recast = make_recast(2, calibration=calibration.digest)
    job = plan_pack(open_folder(demo_folder), tmp_path / "with", recast=recast)
    job = job.weighed(calibration.collect)
    job.write()
    plan_pack(open_folder(demo_folder), tmp_path / "plain", recast=make_recast(2)).write()
    assert job.recast is not None
    assert job.recast.importance is not None
    folders = [as_checkpoint(tmp_path / n, tmp_path / f"{n}-whole") for n in ("with", "plain")]
    source, weighed, plain = (
        open_skeleton(open_folder(folder)).switches for folder in (demo_folder, *folders)
    )
    better = 0
    for path, switch in source.items():
        for name in PROJECTIONS:
            exact, ours, theirs = (_float64(s[path][name]) for s in (source, weighed, plain))
            for expert in range(len(exact)):
                columns = job.recast.importance.of(path, name, expert)
                if columns is None:
                    assert np.array_equal(ours[expert], theirs[expert])
                    continue
                got, base = (
                    (columns * (found[expert] - exact[expert]) ** 2).reshape(-1, 64).sum(axis=1)
                    for found in (ours, theirs)
                )
                assert np.all(got <= base * (1 + 1e-4) + 1e-9 * base.mean())
                better += int((got < 0.999 * base).sum())
        assert name in switch
    assert better > 1000


def test_a_first_plane_is_weighed_and_all_bits_stay(demo_folder: Path, tmp_path: Path) -> None:
    """The halves of codes are what they were; scale and bias of the first are fitted otherwise."""
    calibration = Calibration(demo_folder, "text", IDS)
    for name, change in (("with", make_planes(calibration.digest)), ("plain", make_planes())):
        job = plan_pack(open_folder(demo_folder), tmp_path / name, recast=change)
        if name == "with":
            job = job.weighed(calibration.collect)
        made = job.write().requantized
        said = "two planes, calibrated" if name == "with" else "two planes"
        assert made is not None
        assert made.planes
        assert str(made) == f"experts in {said}: 2-bit, or 4-bit as they were"
    layout = open_skeleton(open_folder(tmp_path / "with")).layers()[0].layout
    weighed, plain = (
        np.fromfile(tmp_path / name / "layer_000.experts", np.uint8).reshape(-1, layout.stride)
        for name in ("with", "plain")
    )
    for part in layout.parts:
        here = slice(part.offset, part.offset + part.nbytes)
        same = np.array_equal(weighed[:, here], plain[:, here])
        assert same == (part.param not in ("scales", "biases")), part.name


def test_lines_of_text_and_of_messages(demo_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(demo_folder)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi. " * 600},
    ]
    lines = [json.dumps({"text": "One. "}), "", json.dumps({"messages": messages, "reply": 1})]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    (tmp_path / "some.txt").write_text("\n".join(lines))
    read, plain = (read_calibration(demo_folder, tmp_path / f"some.{s}") for s in ("jsonl", "txt"))
    chat = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert read.ids == [*tokenizer.encode("One. "), *chat]
    assert plain.ids == tokenizer.encode("\n".join(lines))
    assert read.digest == plain.digest
    (tmp_path / "some.txt").write_text("\n".join(lines) + " ")
    assert read_calibration(demo_folder, tmp_path / "some.txt").digest != read.digest


def refused(demo_folder: Path, file: Path, data: bytes | None) -> str:
    if data is not None:
        file.write_bytes(data)
    target = ("--to", file.parent / "made")
    said = fails("flash-moe", "pack", demo_folder, "--bits", 2, "--calibrate", file, *target)
    assert str(file) in said
    assert not list(file.parent.glob("made/*"))
    return said


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("none.txt", None, "Cannot read"),
        ("empty.txt", b"", "has 0 tokens"),
        ("short.txt", b"Hello there. " * 9, "give a text of 1,000 tokens at least"),
        ("latin.txt", "Größe ".encode("latin-1") * 999, "is not UTF-8"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": ', "line 2: "),
        ("list.jsonl", b"[]", "line 1: it is no"),
        ("other.jsonl", b'{"prompt": "a"}', "line 1: it is no"),
        ("number.jsonl", b'{"text": 1}', "line 1: text is no text"),
        ("roles.jsonl", b'{"messages": [{"content": "a"}]}', "line 1: text is no text"),
    ],
)
def test_files_that_say_nothing(
    name: str, data: bytes | None, message: str, demo_folder: Path, tmp_path: Path
) -> None:
    assert message in refused(demo_folder, tmp_path / name, data)


def test_experts_that_cannot_be_streamed_are_refused(demo_folder: Path, tmp_path: Path) -> None:
    model, config = _wide("llama4")
    write_checkpoint(model, config, tmp_path / "vendor")
    vendor = vendor_layout("llama4", dict(tree_flatten(model.parameters())))
    mx.save_safetensors(str(tmp_path / "vendor" / "model.safetensors"), vendor)
    for file in demo_folder.glob("token*"):
        (tmp_path / "vendor" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("Hello there. " * 300)
    with pytest.raises(OptionError, match="Leave out --calibrate"):
        read_calibration(tmp_path / "vendor", tmp_path / "text.txt")


def test_pack_says_that_it_was_calibrated(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Hello there, how are you? " * 90)
    (tmp_path / "other.txt").write_text("Hello there, how is it? " * 90)
    command = ("flash-moe", "pack", demo_folder, "--bits", 2, "--name", "small")
    result = works(*command, "--calibrate", tmp_path / "text.txt")
    assert "Calibrated with " in result.stdout
    said = "experts requantized from 4-bit to 2-bit (fit, calibrated)"
    assert f"less exact: {said}" in result.stdout
    assert said in works("flash-moe", "info", "small").stdout
    assert said in works("flash-moe", "models").stdout
    assert works("-m", "small", "-o", "max_tokens", 3, "Hello").stdout.strip()


def test_another_text_does_not_go_on_with_it(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlucky(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"Hello {name} there, how are you? " * 90)
    command = ("flash-moe", "pack", demo_folder, "--bits", 2, "--name", "small", "--calibrate")
    with monkeypatch.context() as patch:
        patch.setattr("flash_moe.pack.job.recast_records", unlucky)
        assert CliRunner().invoke(cli, [*map(str, command), str(tmp_path / "one.txt")]).exit_code
    assert "or another text. Remove it" in fails(*command, tmp_path / "two.txt")
    assert "or another text" in fails(*command[:-1])
    works(*command, tmp_path / "one.txt")


@pytest.mark.parametrize("options", [(), ("--bits", "2", "--method", "minmax")])
def test_calibrating_goes_with_the_fit(options: tuple[str, ...], demo_folder: Path) -> None:
    arguments = ["flash-moe", "pack", str(demo_folder), *options, "--calibrate", "text.txt"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert "--calibrate goes with --" in result.stderr
