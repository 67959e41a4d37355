"""A checkpoint folder before any weight is read: its files, its config, its form.

Everything that other modules rely on is checked here: shards are all present, headers are sound,
the config names an architecture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.errors import CheckpointError, OptionError
from flash_moe.format.json_files import read_json
from flash_moe.format.manifest import MANIFEST, Manifest, read_manifest
from flash_moe.format.safetensors import Tensor, read_headers

# How mlx-lm's architectures call the number of experts that a token uses.
EXPERTS_PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "moe_top_k",
    "top_k_experts",
)
# And the number of routed experts; more than one means a Mixture-of-Experts.
ROUTED_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)


@dataclass(frozen=True, slots=True)
class Folder:
    """A checkpoint as downloaded (`manifest` is None) or a pack."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    manifest: Manifest | None

    @property
    def form(self) -> str:
        return "in place" if self.manifest is None else "pack"

    @property
    def architecture(self) -> str:
        return str(self.config["model_type"])

    @property
    def nbytes(self) -> int:
        """What the weights take on disk."""
        resident = sum(tensor.nbytes for tensor in self.tensors.values())
        return resident + (self.manifest.expert_bytes if self.manifest else 0)


def open_folder(path: Path) -> Folder:
    """Read headers, config and manifest of a folder, or say what is wrong with it."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder. Give the folder that holds config.json.")
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{path / 'config.json'} names no model_type: it is not the config of a model."
        )
    manifest = read_manifest(path) if (path / MANIFEST).exists() else None
    files = sorted(path.glob("model*.safetensors"))
    _require_all_shards(path, files)
    return Folder(path, config, read_headers(files), manifest)


def routed_experts(config: dict[str, Any]) -> int:
    """How many routed experts a layer has, as far as the config says; 0 for a dense model."""
    counts = [n for *_, value in _entries(config, ROUTED_EXPERTS) for n in _counts(value)]
    return max(counts, default=0)


def experts_per_token(config: dict[str, Any]) -> int | None:
    """K: how many experts a token uses in a layer, the most where layers differ. CheckpointError
    for what is no number of experts: mlx-lm would compute with one, or fail at the first token."""
    total, refused, dense = routed_experts(config), None, None
    for _, key, value in _entries(config, EXPERTS_PER_TOKEN):
        counts, each = _counts(value), value if isinstance(value, list) else [value]
        most = max(counts, default=0)
        if total < 2:
            dense = most if dense is None and counts else dense
        # A dense layer of several may well say 0.
        elif len(counts) == len(each) and 1 <= most <= total and min(counts) >= 0:
            return most
        else:
            refused = refused or f"{key}: {value!r}"
    if refused is not None:
        raise CheckpointError(
            f"config.json says {refused}. That is not a number of experts that a token can use: "
            f"there are {total}. Download it again."
        )
    return dense


def with_experts_per_token(config: dict[str, Any], experts: int | None) -> dict[str, Any]:
    """The config with another K, so that mlx-lm builds its own router for it."""
    if experts is None:
        return config
    own = experts_per_token(config)
    total = routed_experts(config)
    if own is None:
        raise OptionError(f"{config['model_type']} does not say how many experts a token uses.")
    if not 1 <= experts <= max(total, own):
        raise OptionError(f"experts={experts}: this model has {total}; choose 1 to {total}.")
    changed = copy.deepcopy(config)
    for place, key, value in _entries(changed, EXPERTS_PER_TOKEN):
        place[key] = [experts] * len(value) if isinstance(value, list) else experts
    return changed


def _entries(
    config: dict[str, Any], keys: tuple[str, ...]
) -> list[tuple[dict[str, Any], str, Any]]:
    """(place, key, value) of each: at the top, or in a nested config such as a language model's."""
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    return [
        (place, key, place[key]) for place in places for key in keys if place.get(key) is not None
    ]


def _counts(value: Any) -> list[int]:
    """One for all layers, or one a layer; anything but a count is left out."""
    return [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]


def _require_all_shards(path: Path, files: list[Path]) -> None:
    if not files:
        raise CheckpointError(
            f"{path} holds no model*.safetensors files. Give the folder of a downloaded checkpoint."
        )
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return
    named = read_json(index).get("weight_map", {})
    wanted = {str(name) for name in named.values()} if isinstance(named, dict) else set()
    missing = sorted(wanted - {file.name for file in files})
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of {len(wanted)} weight files, {missing[0]} first. "
            "Resume the download, then try again."
        )
