"""The manifest of a pack: written last, checked first, never trusted.

`read_manifest` proves that the folder holds what the manifest lists, by name and size, so that a
half-made or half-copied pack never loads. `verify` reads everything against the checksums.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_moe.callbacks import Advance, no_advance
from flash_moe.errors import CheckpointError
from flash_moe.format.json_files import read_json
from flash_moe.format.layout import Layout, layout_from_json

MANIFEST = "flash-moe.json"
FORMAT = "flash-moe-pack"
VERSION = 1
# The method of a pack that changes no weight where both planes are read.
TWO_PLANES = "two planes"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")


@dataclass(frozen=True, slots=True)
class FileEntry:
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One switch layer: a file of `experts` records, and a CRC-32 for each."""

    path: str
    file: str
    experts: int
    layout: Layout
    records: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Requantized:
    """The routed experts have fewer bits than those of their `source`; `method` says how they got
    them. In two planes they have the source's bits too."""

    bits: int
    group_size: int
    method: str
    source: str

    @property
    def two_planes(self) -> bool:
        return self.method.partition(",")[0] == TWO_PLANES

    def __str__(self) -> str:
        if self.two_planes:
            return f"experts in {self.method}: {self.bits}-bit, or {self.source} as they were"
        return f"experts requantized from {self.source} to {self.bits}-bit ({self.method})"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`experts_per_token` is the K chosen at packing, None for the model's own."""

    source: str
    architecture: str
    experts_per_token: int | None
    layers: tuple[PackedLayer, ...]
    files: dict[str, FileEntry]
    requantized: Requantized | None = None

    @property
    def expert_bytes(self) -> int:
        return sum(layer.experts * layer.layout.stride for layer in self.layers)

    def layer(self, path: str) -> PackedLayer:
        return next(layer for layer in self.layers if layer.path == path)

    def to_json(self) -> dict[str, Any]:
        layouts = list(dict.fromkeys(layer.layout for layer in self.layers))
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "architecture": self.architecture,
            "experts_per_token": self.experts_per_token,
            "requantized": self.requantized and asdict(self.requantized),
            "layouts": [layout.to_json() for layout in layouts],
            "layers": [
                {
                    "path": layer.path,
                    "file": layer.file,
                    "experts": layer.experts,
                    "layout": layouts.index(layer.layout),
                    "stride": layer.layout.stride,
                    "records": list(layer.records),
                }
                for layer in self.layers
            ],
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in sorted(self.files.items())
            },
        }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a pack whose files are all there, or CheckpointError."""
    path = folder / MANIFEST
    value = read_json(path)
    try:
        manifest = _parse(value)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a manifest that this version can read ({error}). Pack the model again."
        ) from error
    _check_files(folder, manifest)
    return manifest


def requantized(folder: Path) -> Requantized | None:
    """What a pack says of its bits, for lists; a broken manifest is reported when it is used."""
    try:
        return _requantized(read_json(folder / MANIFEST).get("requantized"))
    except (CheckpointError, ValueError, LookupError, TypeError, AttributeError):
        return None


def verify(folder: Path, manifest: Manifest, progress: Advance = no_advance) -> list[str]:
    """Compare everything with its checksums: one sentence for each fault, none if it is sound."""
    faults = []
    for name, entry in manifest.files.items():
        digest = hashlib.sha256()
        layer = next((layer for layer in manifest.layers if layer.file == name), None)
        with (folder / name).open("rb") as file:
            block = layer.layout.stride if layer else 1 << 22
            number = 0
            while data := file.read(block):
                digest.update(data)
                if layer and zlib.crc32(data) != layer.records[number]:
                    faults.append(f"{name}: expert {number} of {layer.path} is damaged")
                number += 1
                progress(len(data))
        if digest.hexdigest() != entry.sha256:
            faults.append(f"{name}: the file is damaged")
    return faults


def is_file_name(name: str) -> bool:
    """Whether a manifest may list it: a plain, visible name that leads nowhere else."""
    return bool(_NAME.fullmatch(name))


def _parse(value: Any) -> Manifest:
    if value["format"] != FORMAT or value["version"] != VERSION:
        raise ValueError(f"format {value['format']!r}, version {value['version']!r}")
    layouts = [layout_from_json(layout) for layout in value["layouts"]]
    files = {
        _matching(_NAME, name): FileEntry(_count(entry["size"]), _sha256(entry["sha256"]))
        for name, entry in value["files"].items()
    }
    chosen = value["experts_per_token"]
    layers = tuple(_layer(layer, layouts, files) for layer in value["layers"])
    # Two layers of one path or file would load, and compute with the wrong experts.
    for names in ([layer.path for layer in layers], [layer.file for layer in layers]):
        if len(set(names)) != len(names):
            raise ValueError("a layer occurs twice")
    return Manifest(
        source=_string(value["source"]),
        architecture=_string(value["architecture"]),
        experts_per_token=None if chosen is None else _positive(chosen),
        layers=layers,
        files=files,
        requantized=_requantized(value.get("requantized")),
    )


def _requantized(value: Any) -> Requantized | None:
    if value is None:
        return None
    return Requantized(
        _positive(value["bits"]),
        _positive(value["group_size"]),
        _string(value["method"]),
        _string(value["source"]),
    )


def _layer(value: Any, layouts: list[Layout], files: dict[str, FileEntry]) -> PackedLayer:
    layout = layouts[_count(value["layout"])] if layouts else None
    if layout is None or value["stride"] != layout.stride:
        raise ValueError("a layer's records do not fit its layout")
    experts = _count(value["experts"])
    file = _string(value["file"])
    if file not in files or files[file].size != experts * layout.stride or not experts:
        raise ValueError(f"{file!r} is not the size of its {experts} records")
    records = tuple(_count(crc) for crc in value["records"])
    if len(records) != experts:
        raise ValueError(f"{len(records)} checksums for {experts} records")
    return PackedLayer(_string(value["path"]), file, experts, layout, records)


def _check_files(folder: Path, manifest: Manifest) -> None:
    for name, entry in manifest.files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            state = "is missing" if size is None else f"has {size} bytes, not {entry.size}"
            raise CheckpointError(f"{path} {state}. Copy or pack the model again.")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def _positive(value: object) -> int:
    if not _count(value):
        raise ValueError("0 is too few")
    return _count(value)


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} is not a name")
    return value


def _matching(pattern: re.Pattern[str], value: object) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError(f"{value!r:.40} is not allowed here")
    return value


def _sha256(value: object) -> str:
    return _matching(re.compile("[0-9a-f]{64}"), value)
