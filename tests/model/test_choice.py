"""Other experts than a model would choose, fewer of them, and the weights that they have."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import OptionError
from flash_moe.model.load import Settings, StreamedModel, Weights, load
from flash_moe.model.mixture import StreamedMixture
from flash_moe.pack.job import plan_pack
from flash_moe.pack.split_planes import make_planes
from flash_moe.prefix.fingerprint import fingerprint
from flash_moe.stream.choice import Choice
from tests.architectures import random_model, write_checkpoint

PROMPT = mx.array([[5, 9, 2, 77, 30, 8]])


def logits(folder: Path, **settings: object) -> np.ndarray:
    model = load(folder, Settings(**settings))  # type: ignore[arg-type]
    try:
        return np.array(model(PROMPT, cache=model.make_cache()).astype(mx.float32))
    finally:
        model.close()


def near(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


class FirstTwo:
    def cached(self, layer: int, expert: int, whole: bool) -> bool:
        return expert < 2


def test_without_a_cut_there_is_nothing_to_keep(demo_folder: Path) -> None:
    for runtime in ("native", "mlx"):
        own = logits(demo_folder, runtime=runtime)
        assert (logits(demo_folder, runtime=runtime, weights="keep") == own).all()
        assert (logits(demo_folder, runtime=runtime, weights="keep", experts=4) == own).all()


def test_kept_weights_are_those_among_all(demo_folder: Path) -> None:
    """The experts beyond the cut are taken out of the full mixture by setting their weights to
    nothing; all others stay as they are."""
    model = load(demo_folder, Settings(runtime="mlx"))
    wanted = np.array(_cut_by_hand(model, keep=2).astype(mx.float32))
    model.close()
    for runtime in ("mlx", "native"):
        kept = logits(demo_folder, runtime=runtime, experts=2)
        near(kept, wanted, 1e-3)
        assert (kept == logits(demo_folder, runtime=runtime, experts=2, weights="keep")).all()
        other = logits(demo_folder, runtime=runtime, experts=2, weights="renormalise")
        assert abs(other - wanted).max() > 1e-2


def _cut_by_hand(model: StreamedModel, keep: int = 9, least: float = 0.0) -> mx.array:
    from mlx_lm.models import qwen3_next

    block = qwen3_next.Qwen3NextSparseMoeBlock

    def cut(self: object, x: mx.array) -> mx.array:
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)  # type: ignore[attr-defined]
        ids = mx.argsort(-odds, axis=-1)[..., : self.top_k]  # type: ignore[attr-defined]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        rank = mx.arange(weights.shape[-1])
        weights = mx.where(rank < keep, weights, 0)
        weights = mx.where((weights >= least) | (rank == 0), weights, 0)
        y = (self.switch_mlp(x, ids) * weights[..., None]).sum(axis=-2)  # type: ignore[attr-defined]
        gate, shared = self.shared_expert_gate, self.shared_expert  # type: ignore[attr-defined]
        return y + mx.sigmoid(gate(x)) * shared(x)

    own, block.__call__ = block.__call__, cut
    try:
        found = model(PROMPT, cache=model.make_cache())
        mx.eval(found)
        return found
    finally:
        block.__call__ = own


@pytest.fixture(scope="module")
def planes(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("planes") / "pack"
    plan_pack(open_folder(demo_folder), target, recast=make_planes()).write()
    return target


@pytest.mark.parametrize("runtime", ["mlx", "native"])
def test_with_all_bits_planes_are_the_model(demo_folder: Path, planes: Path, runtime: str) -> None:
    own = logits(demo_folder, runtime=runtime)
    assert (logits(planes, runtime=runtime) == own).all()
    # By rank, experts are added up in another order than mlx-lm's.
    near(logits(planes, runtime=runtime, whole=4), own, 0 if runtime == "native" else 1e-4)
    near(logits(planes, runtime=runtime, whole=0, whole_in=("prompt",)), own, 1e-4)
    errors = [abs(logits(planes, runtime=runtime, whole=n) - own).mean() for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-3


def test_bytes_are_those_of_the_planes_that_are_wanted(planes: Path) -> None:
    model = load(planes)
    layout = model.streamer.store.layers[0].layout
    model.close()
    assert layout.first_bytes < layout.stride
    for whole, occasion in ((None, "reply"), (0, "reply"), (1, "reply"), (0, "grammar")):
        model = load(planes, Settings(whole=whole, whole_in=("grammar",) if whole == 0 else ()))
        model.streamer.occasion = occasion
        mx.eval(model(PROMPT[:, :1], cache=model.make_cache()))
        both = 4 if whole is None or occasion == "grammar" else whole
        found = model.streamer.reader.counters.nbytes
        assert found == 4 * (both * layout.stride + (4 - both) * layout.first_bytes)
        model.close()


def test_planes_of_a_router_that_is_not_known(tmp_path: Path) -> None:
    """All experts are alike then: whole, or none but where all are."""
    write_checkpoint(*random_model("qwen3_moe", bits=4), tmp_path / "m")
    plan_pack(open_folder(tmp_path / "m"), tmp_path / "p", recast=make_planes()).write()
    own, first = logits(tmp_path / "m"), logits(tmp_path / "p", whole=0)
    assert (logits(tmp_path / "p") == own).all()
    assert (logits(tmp_path / "p", whole=0, whole_in=("prompt",)) == own).all()
    assert abs(first - own).max() > 1e-3
    with pytest.raises(OptionError, match="whole=1: not known how"):
        load(tmp_path / "p", Settings(whole=1))


def test_planes_are_asked_for_where_there_are_some(demo_folder: Path) -> None:
    with pytest.raises(OptionError, match=r"not in two planes.*pack SOURCE --planes"):
        load(demo_folder, Settings(whole=2))
    with pytest.raises(OptionError, match="whole_in goes with whole"):
        load(demo_folder, Settings(whole_in=("prompt",)))


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("auto", "2 experts of 4 a token, with the weights they have among all"),
        ("keep", "2 experts of 4 a token, with the weights they have among all"),
        ("renormalise", "2 experts of 4 a token"),
    ],
)
def test_the_choice_is_named(demo_folder: Path, weights: Weights, words: str) -> None:
    model = load(demo_folder, Settings(experts=2, weights=weights))
    assert model.plan.lossy == [words]
    model.close()


def test_a_kept_state_is_of_one_choice_alone(demo_folder: Path) -> None:
    def identity(weights: Weights) -> str:
        model = load(demo_folder, Settings(experts=2, weights=weights))
        model.close()
        return fingerprint(model)

    assert identity("auto") == identity("keep") != identity("renormalise")


def test_light_experts_are_neither_computed_nor_read(demo_folder: Path) -> None:
    model = load(demo_folder, Settings(runtime="mlx"))
    wanted = np.array(_cut_by_hand(model, least=0.2).astype(mx.float32))
    model.close()
    for runtime in ("mlx", "native"):
        own, some = (Settings(runtime=runtime, skip_below=least) for least in (1e-9, 0.2))
        plain = logits(demo_folder, runtime=runtime)
        near(logits(demo_folder, **asdict(own)), plain, 0 if runtime == "native" else 1e-4)
        near(logits(demo_folder, **asdict(some)), wanted, 1e-3)
        read = []
        for settings in (own, some):
            model = load(demo_folder, settings)
            mx.eval(model(PROMPT[:, :1], cache=model.make_cache()))
            read.append(model.streamer.reader.counters.experts)
            model.close()
        assert read[1] < read[0] == 4 * 4
        assert model.plan.lossy == ["experts of a weight below 0.2 skipped"]


@pytest.mark.parametrize("runtime", ["mlx", "native"])
def test_with_everything_cached_nothing_is_exchanged(demo_folder: Path, runtime: str) -> None:
    """What was just written or read is in the page cache; and prompts are never touched."""
    own = logits(demo_folder, runtime=runtime, experts=2)
    for occasion in ("reply", "prompt"):
        model = load(demo_folder, Settings(runtime=runtime, experts=2, prefer_cached=0.9))
        model.streamer.occasion = occasion
        found = np.array(model(PROMPT, cache=model.make_cache()).astype(mx.float32))
        model.close()
        near(found, own, 1e-4)


def test_what_is_not_cached_gives_way(demo_folder: Path) -> None:
    """As if half of the experts were on the disk alone: which is what the layers are told."""
    model = load(demo_folder, Settings(experts=2, prefer_cached=0.99))
    model.streamer.occasion = "reply"
    for _, module in model.model.named_modules():
        if isinstance(module, StreamedMixture):
            object.__setattr__(module, "_residency", FirstTwo())
    seen: list[np.ndarray] = []
    model.streamer.watch = lambda layer, chosen: seen.append(chosen)
    mx.eval(model(PROMPT, cache=model.make_cache()))
    model.close()
    assert len(seen) == 4
    assert all(np.sort(chosen, axis=1).tolist() == [[0, 1]] * 6 for chosen in seen)


def test_where_the_formula_is_not_known(tmp_path: Path) -> None:
    write_checkpoint(*random_model("qwen3_moe"), tmp_path / "m")
    with pytest.raises(OptionError, match="weights=keep: not known how for qwen3_moe"):
        load(tmp_path / "m", Settings(experts=1, weights="keep"))
    for unknown in ({"skip_below": 0.1}, {"prefer_cached": 0.1}):
        with pytest.raises(OptionError, match=f"{next(iter(unknown))}: not known how"):
            load(tmp_path / "m", Settings(**unknown))
    model = load(tmp_path / "m", Settings(experts=1))
    assert model.plan.choice == Choice(k=1, routed=1, renormalise=False)
    model.close()
