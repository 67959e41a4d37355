"""Other experts than a model would choose, fewer of them, in full or not, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import qwen3_moe, qwen3_next
from mlx_lm.utils import load_model

from flash_moe.checkpoint.folder import open_folder, with_experts_per_token
from flash_moe.errors import OptionError, Remedy
from flash_moe.model.load import StreamedModel, load
from flash_moe.model.mixture import Mixture
from flash_moe.options import Phase, Settings
from flash_moe.pack.job import PackJob
from flash_moe.prefix.fingerprint import fingerprint
from flash_moe.stream.choice import ExpertChoice
from tests.architectures import random_model, write_checkpoint
from tests.devices import GPU, RUNTIMES
from tests.model.conftest import FAMILIES

PROMPT = mx.array([[5, 9, 2, 77, 30, 8]])
# Of logits of about ten: float32 rounding comes to 1e-5 to 1e-4, another expert or weight to 0.1
# to 2.
ROUNDING = 1e-3 if GPU else 1e-4

Logits = np.ndarray


@contextmanager
def loaded(folder: Path, **settings: Any) -> Iterator[StreamedModel]:
    model = load(folder, Settings(**settings))
    try:
        yield model
    finally:
        model.close()


def as_numpy(logits: mx.array) -> Logits:
    return np.array(logits.astype(mx.float32))


def logits(folder: Path, *, phase: Phase = "prompt", **settings: Any) -> Logits:
    with loaded(folder, **settings) as model:
        model.streamer.phase = phase
        return as_numpy(model(PROMPT, cache=model.make_cache()))


def assert_near(got: Logits, expected: Logits, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def assert_repeated(got: Logits, expected: Logits) -> None:
    """Of the same computation twice: the same bits on a CPU."""
    assert_near(got, expected, ROUNDING if GPU else 0)


# -- fewer experts --------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_models_own_number_of_experts_changes_nothing(family: Path, runtime: str) -> None:
    own = logits(family, runtime=runtime)
    assert_repeated(logits(family, runtime=runtime, experts=4), own)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("experts", [1, 2, 3])
def test_fewer_experts_keep_the_weights_that_they_have_among_all(
    family: Path, runtime: str, experts: int
) -> None:
    """The same as all experts, with the weights of those beyond the cut set to nothing."""
    expected = cut_by_hand(family, experts)
    assert_near(logits(family, runtime=runtime, experts=experts), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_mlx_lms_own_cut_renormalises(families: dict[str, Path], name: str) -> None:
    """The reason for the reference above: the experts that mlx-lm leaves share all of the weight,
    if the architecture renormalises at all."""
    config = with_experts_per_token(open_folder(families[name]).config, 2)
    model, _ = load_model(families[name], model_config=config)
    difference = abs(as_numpy(model(PROMPT)) - cut_by_hand(families[name], 2)).max()
    assert (difference > 0.01) == (name != "qwen3_moe raw")


def cut_by_hand(folder: Path, experts: int) -> Logits:
    """mlx-lm's model, everything resident, whose blocks leave out all but the weightiest."""
    model, _ = load_model(folder)

    def block(self: Any, x: mx.array) -> mx.array:
        odds = mx.softmax(self.gate(x), axis=-1, precise=True)
        ids = mx.argsort(-odds, axis=-1)[..., : self.top_k]
        weights = mx.take_along_axis(odds, ids, axis=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        weights = mx.where(mx.arange(weights.shape[-1]) < experts, weights, 0)
        y: mx.array = (self.switch_mlp(x, ids) * weights[..., None]).sum(axis=-2)
        if "shared_expert" in self:
            y = y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_next.Qwen3NextSparseMoeBlock, "__call__", block)
        patch.setattr(qwen3_moe.Qwen3MoeSparseMoeBlock, "__call__", block)
        return as_numpy(model(PROMPT))


def test_the_choice_is_described(family: Path) -> None:
    with loaded(family, experts=2) as model:
        assert model.lossy == ["2 experts of 4 a token, with the weights they have among all"]
    with loaded(family) as model:
        assert model.lossy == []


def test_a_saved_prompt_belongs_to_one_choice(planes: Path) -> None:
    choices: list[dict[str, Any]] = [
        {},
        {"experts": 2},
        {"full_experts": 1},
        {"full_experts": 2},
        {"full_experts": 1, "full_experts_in": ("prompt",)},
        {"cache_tolerance": 0.5},
    ]
    identities = []
    for settings in choices:
        with loaded(planes, **settings) as model:
            identities.append(fingerprint(model))
    assert len(set(identities)) == len(choices)


# -- two planes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plane_packs(
    families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    packs = {name: tmp_path_factory.mktemp("planes") / "pack" for name in FAMILIES}
    for name, target in packs.items():
        PackJob.plan(families[name], target, planes=True).write()
    return packs


@pytest.fixture(params=FAMILIES)
def planes(request: pytest.FixtureRequest, plane_packs: dict[str, Path]) -> Path:
    return plane_packs[request.param]


@pytest.fixture(params=FAMILIES)
def source_and_planes(
    request: pytest.FixtureRequest, families: dict[str, Path], plane_packs: dict[str, Path]
) -> tuple[Path, Path]:
    return families[request.param], plane_packs[request.param]


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_planes_in_full_are_the_model(source_and_planes: tuple[Path, Path], runtime: str) -> None:
    source, planes = source_and_planes
    own = logits(source, runtime=runtime)
    assert_repeated(logits(planes, runtime=runtime), own)
    # By rank, plain MLX adds the experts up in another order than mlx-lm's block.
    by_rank = logits(planes, runtime=runtime, full_experts=4)
    assert_near(by_rank, own, 0 if runtime == "native" else ROUNDING)
    in_prompt: dict[str, Any] = {"full_experts": 0, "full_experts_in": ("prompt",)}
    assert_near(logits(planes, runtime=runtime, **in_prompt), own)
    errors = [abs(logits(planes, runtime=runtime, full_experts=n) - own).mean() for n in range(4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 1e-3


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    ("full_experts", "phase", "both"),
    [(None, "reply", 4), (0, "reply", 0), (1, "reply", 1), (3, "reply", 3), (0, "grammar", 4)],
)
def test_only_the_planes_that_are_needed_are_read(
    planes: Path, runtime: str, full_experts: int | None, phase: Phase, both: int
) -> None:
    where = ("grammar",) if full_experts == 0 else None
    settings = {"full_experts": full_experts, "full_experts_in": where, "runtime": runtime}
    with loaded(planes, **settings) as model:
        layout = model.streamer.store.layers[0].layout
        assert layout.first_plane_bytes < layout.stride
        model.streamer.phase = phase
        mx.eval(model(PROMPT[:, :1], cache=model.make_cache()))
        a_layer = both * layout.stride + (4 - both) * layout.first_plane_bytes
        assert model.streamer.reader.counters.nbytes == model.plan.layers * a_layer


def test_planes_of_a_router_whose_formula_is_not_known(tmp_path: Path, on_cpu: None) -> None:
    """There, experts have no rank: all are computed in full, or none."""
    write_checkpoint(*random_model("qwen2_moe", bits=4), tmp_path / "m")
    PackJob.plan(tmp_path / "m", tmp_path / "p", planes=True).write()
    own, first = logits(tmp_path / "m"), logits(tmp_path / "p", full_experts=0)
    assert (logits(tmp_path / "p") == own).all()
    in_prompt = logits(tmp_path / "p", full_experts=0, full_experts_in=("prompt",))
    assert (in_prompt == own).all()
    assert abs(first - own).max() > 1e-3
    with pytest.raises(OptionError, match="full_experts is not supported for qwen2_moe"):
        load(tmp_path / "p", Settings(full_experts=1))


def test_full_experts_need_two_planes(demo_folder: Path) -> None:
    with pytest.raises(OptionError, match="not packed in two planes") as failure:
        load(demo_folder, Settings(full_experts=2))
    assert failure.value.remedy is Remedy.PACK_IN_PLANES
    with pytest.raises(OptionError, match="full_experts_in needs full_experts"):
        load(demo_folder, Settings(full_experts_in=("prompt",)))


# -- cached experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("phase", ["reply", "prompt"])
def test_with_everything_cached_nothing_is_exchanged(
    family: Path, runtime: str, phase: Phase
) -> None:
    """A file that was just read is in the page cache; and prompts never exchange experts."""
    own = logits(family, runtime=runtime, experts=2)
    tolerant: dict[str, Any] = {"runtime": runtime, "experts": 2, "cache_tolerance": 0.9}
    assert_near(logits(family, phase=phase, **tolerant), own)


class FirstTwo:
    """As if all other experts were on the disk alone."""

    def cached(self, layer: int, expert: int, full: bool) -> bool:
        return expert < 2


def mixtures(model: StreamedModel) -> list[Mixture]:
    modules: list[tuple[str, nn.Module]] = model.model.named_modules()
    return [module for _, module in modules if isinstance(module, Mixture)]


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("phase", ["reply", "prompt"])
def test_experts_that_are_not_cached_give_way_in_replies(
    family: Path, runtime: str, phase: Phase
) -> None:
    observed: list[np.ndarray] = []
    with loaded(family, runtime=runtime, experts=2, cache_tolerance=0.99) as model:
        model.streamer.phase = phase
        blocks = mixtures(model)
        assert len(blocks) == model.plan.layers
        for block in blocks:
            block.residency = FirstTwo()  # type: ignore[assignment]
        model.streamer.observer = lambda layer, ids: observed.append(ids)
        mx.eval(model(PROMPT, cache=model.make_cache()))
    assert len(observed) == len(blocks)
    exchanged = [np.sort(ids, axis=1).tolist() == [[0, 1]] * 6 for ids in observed]
    assert all(exchanged) == (phase == "reply")


# -- where the formula is not known ---------------------------------------------------------------


def test_choices_are_refused_where_the_formula_is_not_known(tmp_path: Path) -> None:
    write_checkpoint(*random_model("qwen2_moe"), tmp_path / "m")
    with pytest.raises(OptionError, match="cache_tolerance is not supported for qwen2_moe"):
        load(tmp_path / "m", Settings(cache_tolerance=0.1))
    with loaded(tmp_path / "m", experts=1) as model:
        assert model.choice == ExpertChoice(k=1, routed=1, renormalise=False)
        assert model.lossy == ["1 experts of 2 a token"]
