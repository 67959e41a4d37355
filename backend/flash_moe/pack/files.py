"""Write the files of a pack, each under a temporary name first, and record beside the pack which
are done: `layer_000.json` for `pack/layer_000.experts`, `model-00001.json` for its shard."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe.callbacks import Advance
from flash_moe.checkpoint.skeleton import Skeleton
from flash_moe.format.atomic import replacing, write_json
from flash_moe.format.json_files import read_json, read_json_if_present
from flash_moe.format.layout import Layout
from flash_moe.format.manifest import MANIFEST, FileEntry, PackedLayer, is_file_name
from flash_moe.pack.records import release_arrays, write_records
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pack.workspace import PACK
from flash_moe.upstream import encoded_config

# Resident tensors are evaluated and written a shard at a time. A pull has them twice meanwhile.
SHARD_BYTES = 1 << 28
# What the tokenizer and the template need; weights and their index are written anew.
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
NOT_COPIED = {"config.json", "model.safetensors.index.json", MANIFEST}

Entries = dict[str, FileEntry]


@dataclass(frozen=True, slots=True)
class LayerPlace:
    """Where the records of a layer are made, and what says that they are all there."""

    workspace: Path
    number: int

    @property
    def file(self) -> Path:
        return self.workspace / PACK / f"layer_{self.number:03}.experts"

    @property
    def done(self) -> Path:
        return self.workspace / f"layer_{self.number:03}.json"

    def is_done(self, size: int) -> bool:
        return self.done.exists() and self.file.exists() and self.file.stat().st_size == size


@dataclass(frozen=True, slots=True)
class FileWriter:
    """Writes into `workspace / PACK` what is not there yet."""

    workspace: Path
    skeleton: Skeleton
    transform: ExpertTransform | None
    progress: Advance
    # Told the names of resident weights when they are in the pack for good.
    kept: Callable[[list[str]], None] = lambda names: None

    @property
    def pack(self) -> Path:
        return self.workspace / PACK

    def layer(self, number: int, path: str) -> tuple[PackedLayer, Entries]:
        """The experts of one switch layer."""
        layout = packed_layout(self.skeleton, path, self.transform)
        experts = self.skeleton.expert_count(path)
        place, size = LayerPlace(self.workspace, number), experts * layout.stride
        file, done = place.file.name, place.done
        if place.is_done(size):
            self.progress(size)
        else:
            with replacing(place.file) as temporary:
                checksums = write_records(
                    temporary, self.skeleton, path, self.transform, self.progress
                )
            write_json(done, checksums._asdict())
        for name, _ in layout.quantization:
            release_arrays(self.skeleton.switches[path][name])
        record = read_json(done)
        layer = PackedLayer(path, file, experts, layout, tuple(record["records"]))
        return layer, {file: FileEntry(size, record["sha256"])}

    def resident(self) -> Entries:
        """All weights that are no expert's."""
        arrays = self.skeleton.resident()
        entries = {}
        for number, names in enumerate(resident_shards(arrays), 1):
            stem = f"model-{number:05}"
            path, done = self.pack / f"{stem}.safetensors", self.workspace / f"{stem}.json"
            # Shards of packs that an older version began have no names, and were larger.
            if not (path.exists() and read_json_if_present(done).get("tensors") == names):
                with replacing(path) as temporary:
                    mx.save_safetensors(str(temporary), {name: arrays[name] for name in names})
                write_json(done, {"sha256": _sha256(path), "tensors": names})
            self.kept(names)
            self.progress(sum(arrays[name].nbytes for name in names))
            entries[path.name] = FileEntry(path.stat().st_size, read_json(done)["sha256"])
        return entries

    def small_files(self, config: dict[str, Any]) -> Entries:
        """The config, and what the tokenizer needs."""
        write_json(self.pack / "config.json", encoded_config(config))
        paths = {self.pack / "config.json"}
        for pattern in COPIED:
            for source in sorted(self.skeleton.folder.path.glob(pattern)):
                if _is_copied(source):
                    with replacing(self.pack / source.name) as temporary:
                        shutil.copyfile(source, temporary)
                    paths.add(self.pack / source.name)
        return {path.name: FileEntry(path.stat().st_size, _sha256(path)) for path in paths}

    def remove_strays(self, names: set[str]) -> None:
        """Files that a killed run began under a temporary name and this one did not begin again."""
        for stray in self.pack.iterdir():
            if stray.name not in names:
                stray.unlink()


def packed_layout(skeleton: Skeleton, path: str, transform: ExpertTransform | None) -> Layout:
    layout = skeleton.layout(path)
    return layout if transform is None else transform.layout(layout, path)


def _is_copied(source: Path) -> bool:
    """Except what a manifest refuses to list, such as the `._config.json` that macOS leaves."""
    return source.name not in NOT_COPIED and is_file_name(source.name) and source.is_file()


def resident_shards(arrays: dict[str, mx.array]) -> Iterator[list[str]]:
    """Their names, file by file."""
    names: list[str] = []
    size = 0
    for name in sorted(arrays):
        if names and size + arrays[name].nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += arrays[name].nbytes
    if names:
        yield names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
