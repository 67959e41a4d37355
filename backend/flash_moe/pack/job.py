"""Write a pack: every expert one aligned record, one file a layer, in bounded memory.

The work happens in `NAME.partial`: the pack grows in `pack/`, and each finished file is recorded
beside it, so that a killed pack goes on where it was, and the result is the same to the byte. The
manifest is written last and `pack/` then takes its name: a half-made pack has neither. The record
of the work goes last of all, so that no kill leaves files that nothing vouches for.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from flash_moe.checkpoint.folder import Folder, read_json, with_experts_per_token
from flash_moe.checkpoint.skeleton import Skeleton, open_skeleton
from flash_moe.errors import CheckpointError, NoSpace, NotContiguous
from flash_moe.format.atomic import replacing, sync, write_json
from flash_moe.format.layout import Layout
from flash_moe.format.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    PackedLayer,
    is_file_name,
)
from flash_moe.pack.recast import Change, Importance
from flash_moe.pack.records import compute_records, copy_records, forget, recast_records

Progress = Callable[[int], None]

# Resident tensors are evaluated and written a shard at a time.
SHARD_BYTES = 1 << 30
# What the tokenizer and the template need; weights and their index are written anew.
COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
NOT_COPIED = {"config.json", "model.safetensors.index.json", MANIFEST}


@dataclass(frozen=True, slots=True)
class PackJob:
    """A planned pack; `write` does it or goes on with it."""

    folder: Folder
    skeleton: Skeleton
    target: Path
    experts_per_token: int | None
    recast: Change | None = None

    @property
    def expert_bytes(self) -> int:
        count = self.skeleton.expert_count
        return sum(self._layout(path).stride * count(path) for path in self.skeleton.switches)

    @property
    def nbytes(self) -> int:
        return self.expert_bytes + sum(a.nbytes for a in self.skeleton.resident().values())

    def write(self, progress: Progress = lambda nbytes: None) -> Manifest:
        with self._working() as state:
            work = state / "pack"
            work.mkdir(exist_ok=True)
            manifest = self._write_into(work, state, progress)
            shutil.rmtree(state)
        return manifest

    def weighed(self, collect: Callable[[Path], Importance]) -> PackJob:
        """This job with what `collect` finds, which keeps its work in the folder that it is given
        and goes on with what it finds there, as an interrupted pack does."""
        assert self.recast is not None
        with self._working() as state:
            return replace(self, recast=self.recast.weighed(collect(state)))

    @contextmanager
    def _working(self) -> Iterator[Path]:
        state = self.target.with_name(self.target.name + ".partial")
        _require_space(state / "pack", self.target, self.nbytes)
        with _claimed(state, self._fingerprint()):
            _require_absent(self.target)
            yield state

    def _layout(self, path: str) -> Layout:
        layout = self.skeleton.layout(path)
        return layout if self.recast is None else self.recast.layout(layout, path)

    def _fingerprint(self) -> dict[str, Any]:
        """What may go on with this work: the same source, and the same change of it."""
        change = {} if self.recast is None else {"recast": self.recast.to_json()}
        return {"source": _fingerprint(self.folder), **change}

    def _write_into(self, work: Path, state: Path, progress: Progress) -> Manifest:
        sources = {path: self.skeleton.layout(path) for path in self.skeleton.switches}
        config = _settled(self.skeleton.config)
        if self.recast is not None:
            config = self.recast.config(config, sources)
        layers = [
            self._layer(work, state, number, path, progress)
            for number, path in enumerate(self.skeleton.switches)
        ]
        files = {layer.file: entry for layer, entry in layers}
        files |= self._resident(work, state, progress)
        files |= self._copied(work, config)
        manifest = Manifest(
            source=self.folder.path.resolve().name,
            architecture=self.folder.architecture,
            experts_per_token=self.experts_per_token,
            layers=tuple(layer for layer, _ in layers),
            files=files,
            requantized=self.recast.summary(sources.values()) if self.recast else None,
        )
        write_json(work / MANIFEST, manifest.to_json())
        _remove_strays(work, {*files, MANIFEST})
        work.rename(self.target)
        sync(self.target.parent)
        return manifest

    def _layer(
        self, work: Path, state: Path, number: int, path: str, progress: Progress
    ) -> tuple[PackedLayer, FileEntry]:
        layout, experts = self._layout(path), self.skeleton.expert_count(path)
        file, done = f"layer_{number:03}.experts", state / f"layer_{number:03}.json"
        size = experts * layout.stride
        if done.exists() and (work / file).exists() and (work / file).stat().st_size == size:
            progress(size)
            found = read_json(done)
            records, sha256 = found["records"], found["sha256"]
        else:
            with replacing(work / file) as temporary:
                records, sha256 = self._write_layer(temporary, path, progress)
            write_json(done, {"records": records, "sha256": sha256})
        for name, _ in layout.quantization:
            forget(self.skeleton.switches[path][name])
        return PackedLayer(path, file, experts, layout, tuple(records)), FileEntry(size, sha256)

    def _write_layer(self, file: Path, path: str, progress: Progress) -> tuple[list[int], str]:
        if self.recast is not None:
            return recast_records(file, self.skeleton, path, self.recast, progress)
        try:
            layer = self.skeleton.layer(path)
        except NotContiguous:
            return compute_records(file, self.skeleton, path, progress)
        return copy_records(file, layer, progress)

    def _resident(self, work: Path, state: Path, progress: Progress) -> dict[str, FileEntry]:
        resident = self.skeleton.resident()
        files = {}
        for number, names in enumerate(_shards(resident), 1):
            file, done = f"model-{number:05}.safetensors", state / f"model-{number:05}.json"
            if not (done.exists() and (work / file).exists()):
                with replacing(work / file) as temporary:
                    mx.save_safetensors(str(temporary), {name: resident[name] for name in names})
                write_json(done, {"sha256": _sha256(work / file)})
            progress(sum(resident[name].nbytes for name in names))
            size = (work / file).stat().st_size
            files[file] = FileEntry(size, str(read_json(done)["sha256"]))
        return files

    def _copied(self, work: Path, config: dict[str, Any]) -> dict[str, FileEntry]:
        from mlx_lm.utils import _encode_tagged_floats

        write_json(work / "config.json", _encode_tagged_floats(config))
        files = {"config.json"}
        for pattern in COPIED:
            for source in sorted(self.folder.path.glob(pattern)):
                if _is_copied(source):
                    with replacing(work / source.name) as temporary:
                        shutil.copyfile(source, temporary)
                    files.add(source.name)
        return {
            name: FileEntry((work / name).stat().st_size, _sha256(work / name)) for name in files
        }


def plan_pack(
    folder: Folder, target: Path, experts: int | None = None, recast: Change | None = None
) -> PackJob:
    """Check what can be checked before a byte is written."""
    if folder.manifest is not None:
        raise CheckpointError(f"{folder.path} is a pack already. Add it: llm flash-moe add PATH")
    _require_absent(target)
    with_experts_per_token(folder.config, experts)
    job = PackJob(folder, open_skeleton(folder), target, experts, recast)
    if recast is not None:
        sources = {path: job.skeleton.layout(path) for path in job.skeleton.switches}
        for path, source in sources.items():
            recast.layout(source, path)
        recast.summary(sources.values())
    return job


@contextmanager
def _claimed(state: Path, fingerprint: dict[str, Any]) -> Iterator[None]:
    """The folder to work in, for this process alone, and proven to belong to this work.

    The lock is on the folder itself, so that none is left behind; and whoever waited for it must
    look again, because the winner removes the folder when its pack is done.
    """
    state.mkdir(parents=True, exist_ok=True)
    fd = os.open(state, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            still_there = os.path.samestat(os.fstat(fd), state.stat())
        except (BlockingIOError, FileNotFoundError):
            still_there = False
        if not still_there:
            raise CheckpointError(f"Another pack is being written to {state}.")
        known = state / "source.json"
        if known.exists() and read_json(known) != fingerprint:
            raise CheckpointError(
                f"{state} was begun from another checkpoint, with other bits or another text. "
                "Remove it, or choose another name."
            )
        write_json(known, fingerprint)
        yield
    finally:
        os.close(fd)


def _fingerprint(folder: Folder) -> str:
    """The source as its headers tell it; contents are too large to hash twice."""
    digest = hashlib.sha256((folder.path / "config.json").read_bytes())
    for tensor in sorted(folder.tensors.values(), key=lambda t: t.name):
        digest.update(repr((tensor.name, tensor.dtype, tensor.shape, tensor.offset)).encode())
        digest.update(tensor.file.name.encode())
    return digest.hexdigest()


def _require_absent(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target} exists. Choose another name, or remove it first.")


def _require_space(work: Path, target: Path, needed: int) -> None:
    there = sum(file.stat().st_size for file in work.iterdir()) if work.exists() else 0
    disk = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if needed - there > free:
        raise NoSpace(
            f"The pack needs {(needed - there) / 1e9:.1f} GB more and {disk} has "
            f"{free / 1e9:.1f} GB free. Free some space or give another folder with --to."
        )


def _is_copied(source: Path) -> bool:
    """Not what a manifest refuses to list, such as the `._config.json` that macOS leaves."""
    return source.name not in NOT_COPIED and is_file_name(source.name) and source.is_file()


def _remove_strays(work: Path, files: set[str]) -> None:
    """What a killed run began under a temporary name and this one had no need to begin again."""
    for stray in work.iterdir():
        if stray.name not in files:
            stray.unlink()


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """The config after loading: once mlx-lm has understood a vendor's quantization, it says so
    in its own key, and the vendor's must not be applied again."""
    if "quantization" in config:
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def _shards(resident: dict[str, mx.array]) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in sorted(resident):
        if names and size + resident[name].nbytes > SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += resident[name].nbytes
    if names:
        yield names


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
