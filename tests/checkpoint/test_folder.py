"""A folder is opened only if it is a complete checkpoint, and K is changed only within limits."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.folder import (
    EXPERTS_PER_TOKEN,
    experts_per_token,
    open_folder,
    routed_experts,
    with_experts_per_token,
)
from flash_moe.errors import CheckpointError, OptionError
from flash_moe.format.json_files import MAX_JSON_BYTES
from tests.strategies import json_values, tiny_checkpoint

WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("folder") / "source")


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may break; the weights are linked."""
    return Path(shutil.copytree(original, tmp_path / "source", copy_function=os.link))


def replace(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_a_sound_folder(source: Path) -> None:
    folder = open_folder(source)
    assert folder.form == "in place"
    assert folder.architecture == "qwen3_5_moe"
    header = 8 + int.from_bytes((source / WEIGHTS).read_bytes()[:8], "little")
    assert folder.nbytes == (source / WEIGHTS).stat().st_size - header


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            open_folder(path)


def test_no_safetensors(source: Path) -> None:
    (source / WEIGHTS).rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no model\*\.safetensors"):
        open_folder(source)


def test_a_broken_shard(source: Path) -> None:
    content = (source / WEIGHTS).read_bytes()
    replace(source / WEIGHTS, content[:-1])
    with pytest.raises(CheckpointError, match="not a sound safetensors file"):
        open_folder(source)


def test_two_shards_with_the_same_tensors(source: Path) -> None:
    os.link(source / WEIGHTS, source / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is also in"):
        open_folder(source)


def test_a_shard_that_the_index_names_is_missing(source: Path) -> None:
    shards = {"a": WEIGHTS, "b": "model-00002.safetensors", "c": "model-00003.safetensors"}
    replace(source / "model.safetensors.index.json", json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"lacks 2 of 3 weight files, model-00002\.safe"):
        open_folder(source)
    replace(source / "model.safetensors.index.json", json.dumps({"weight_map": {"a": WEIGHTS}}))
    open_folder(source)


@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values}))
@settings(max_examples=150, deadline=None)
def test_any_index(original: Path, tmp_path_factory: pytest.TempPathFactory, index: Any) -> None:
    source = tmp_path_factory.getbasetemp() / "any-index"
    if not source.exists():
        shutil.copytree(original, source, copy_function=os.link)
    replace(source / "model.safetensors.index.json", json.dumps(index))
    try:
        open_folder(source)
    except CheckpointError:
        return
    weight_map = index.get("weight_map", {})
    assert not isinstance(weight_map, dict) or set(weight_map.values()) <= {WEIGHTS}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"model_type": 1}',
        b'{"model_type": null}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"9" * 10_000,
    ],
    ids=range(10),
)
def test_a_broken_config(source: Path, content: bytes) -> None:
    replace(source / "config.json", content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_folder(source)


def test_a_config_that_is_missing_or_a_folder_or_huge(source: Path) -> None:
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_folder(source)
    (source / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="Cannot read"):
        open_folder(source)
    (source / "config.json").rmdir()
    with (source / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="too large"):
        open_folder(source)


# K


def config(k: Any, nested: bool = True, key: str = "num_experts_per_tok") -> dict[str, Any]:
    text = {"num_experts": 16, key: k}
    return {"model_type": "m", "text_config": text} if nested else {"model_type": "m", **text}


@given(st.integers(1, 16), st.integers(1, 16), st.booleans(), st.sampled_from(EXPERTS_PER_TOKEN))
def test_another_k(own: int, k: int, nested: bool, key: str) -> None:
    before = config(own, nested, key)
    saved = copy.deepcopy(before)
    changed = with_experts_per_token(before, k)
    assert changed == config(k, nested, key)
    assert experts_per_token(changed) == k
    assert routed_experts(changed) == 16
    assert before == saved, "the folder's own config must not change"


def test_no_k_changes_nothing() -> None:
    own = config(4)
    assert with_experts_per_token(own, None) is own


def test_a_list_of_k_a_layer() -> None:
    assert experts_per_token(config([2, 8, 4])) == 8
    assert with_experts_per_token(config([2, 8, 4]), 3) == config([3, 3, 3])


def test_dense_layers_use_none() -> None:
    assert experts_per_token(config([0, 8, 4])) == 8
    assert experts_per_token({"model_type": "m", "num_experts": 0, "num_experts_per_tok": 0}) == 0


@pytest.mark.parametrize(
    "k", ["4", 1.5, True, {}, [], 0, -1, 17, [4, "4"], [4, 17], [4, -1], [0, 0], 10**400]
)
@pytest.mark.parametrize("nested", [True, False])
def test_what_is_no_number_of_experts_is_refused(k: Any, nested: bool) -> None:
    """mlx-lm would compute with one expert, or fail at the first token."""
    with pytest.raises(CheckpointError, match=r"config.json says num_experts_per_tok: .*are 16"):
        experts_per_token(config(k, nested))


def test_one_sound_number_is_enough() -> None:
    """Some configs carry leftovers beside the number that counts."""
    for extra in (0, 8.0, 99, "4"):
        assert experts_per_token({**config(4), "num_experts_per_tok": extra}) == 4


def test_every_place_is_changed() -> None:
    """Some configs state K twice, at the top and nested."""
    both = {**config(4), "num_experts_per_tok": 4}
    changed = with_experts_per_token(both, 2)
    assert changed["num_experts_per_tok"] == changed["text_config"]["num_experts_per_tok"] == 2


@pytest.mark.parametrize("k", [0, -1, 17, 2**70])
@pytest.mark.parametrize("own", [4, [4, 2]])
def test_k_out_of_range(own: Any, k: int) -> None:
    with pytest.raises(OptionError, match="choose 1 to 16"):
        with_experts_per_token(config(own), k)


def test_a_config_without_k() -> None:
    with pytest.raises(OptionError, match="does not say"):
        with_experts_per_token({"model_type": "llama"}, 2)


@given(json_values, json_values, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_any_k_in_a_config(own: Any, total: Any, k: int) -> None:
    odd = {"model_type": "m", "num_experts": total, "text_config": {"num_experts_per_tok": own}}
    assert type(routed_experts(odd)) is int
    try:
        count = experts_per_token(odd)
    except CheckpointError:
        return
    assert count is None or type(count) is int
    try:
        changed = with_experts_per_token(odd, k)
    except OptionError:
        return
    assert experts_per_token(changed) == k
