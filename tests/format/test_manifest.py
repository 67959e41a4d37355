"""A manifest is proven before it is used, and a pack holds exactly the files that it lists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, FlashMoeError
from flash_moe.format.manifest import MANIFEST, Manifest, read_manifest, verify
from flash_moe.model.load import load
from flash_moe.pack.job import PackJob
from tests.strategies import TINY, edited, tiny_checkpoint


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack that no test changes."""
    folder = tmp_path_factory.mktemp("manifest")
    PackJob.plan(tiny_checkpoint(folder / "source"), folder / "pack").write()
    return folder / "pack"


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pack, tmp_path / "copy"))


@pytest.fixture(scope="module")
def scratch(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pack's files, linked, with a manifest that every example writes anew."""
    folder = tmp_path_factory.mktemp("scratch")
    for file in pack.iterdir():
        if file.name != MANIFEST:
            os.link(file, folder / file.name)
    return folder


def reread(scratch: Path, content: bytes) -> Manifest | None:
    """The manifest of these bytes if it is sound, or None."""
    (scratch / MANIFEST).write_bytes(content)
    try:
        manifest = read_manifest(scratch)
        open_folder(scratch)
    except CheckpointError:
        return None
    assert_consistent(scratch, manifest)
    return manifest


def assert_consistent(folder: Path, manifest: Manifest) -> None:
    """The facts that users of `read_manifest` rely on."""
    for name, entry in manifest.files.items():
        assert (folder / name).resolve().parent == folder.resolve()
        assert (folder / name).stat().st_size == entry.size
    for layer in manifest.layers:
        assert manifest.files[layer.file].size == layer.experts * layer.layout.stride > 0
        assert len(layer.records) == layer.experts
        assert len({part.name for part in layer.layout.parts}) == len(layer.layout.parts)
        assert all(part.offset >= 0 and part.nbytes > 0 for part in layer.layout.parts)
    assert len({layer.path for layer in manifest.layers}) == len(manifest.layers)
    assert len({layer.file for layer in manifest.layers}) == len(manifest.layers)
    assert manifest.experts_per_token is None or manifest.experts_per_token > 0


def test_round_trip(pack: Path) -> None:
    manifest = read_manifest(pack)
    written = json.loads((pack / MANIFEST).read_bytes())
    assert json.loads(json.dumps(manifest.to_json())) == written
    assert_consistent(pack, manifest)
    assert [layer.experts for layer in manifest.layers] == [TINY.experts] * TINY.layers


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_flipped_bits(pack: Path, scratch: Path, data: st.DataObject) -> None:
    content = bytearray((pack / MANIFEST).read_bytes())
    for bit in data.draw(st.sets(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=4)):
        content[bit // 8] ^= 1 << bit % 8
    reread(scratch, bytes(content))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_truncated(pack: Path, scratch: Path, data: st.DataObject) -> None:
    content = (pack / MANIFEST).read_bytes().rstrip()
    cut = data.draw(st.integers(0, len(content) - 1))
    assert reread(scratch, content[:cut]) is None


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_edited(pack: Path, scratch: Path, data: st.DataObject) -> None:
    value = json.loads((pack / MANIFEST).read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        value = data.draw(edited(value))
    reread(scratch, json.dumps(value).encode())


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_random_bytes(scratch: Path, content: bytes) -> None:
    assert reread(scratch, content) is None


def change(pack: Path, edit: Any) -> bytes:
    value = json.loads((pack / MANIFEST).read_bytes())
    edit(value)
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(version=2),
        lambda m: m.update(format="safetensors"),
        lambda m: m.update(layouts=[]),
        lambda m: m.update(experts_per_token=0),
        lambda m: m.update(experts_per_token=True),
        lambda m: m["layers"][0].update(layout=9),
        lambda m: m["layers"][0].update(layout=-1),
        lambda m: m["layers"][0].update(stride=m["layers"][0]["stride"] * 2),
        lambda m: m["layers"][0].update(experts=3),
        lambda m: m["layers"][0].update(records=m["layers"][0]["records"][1:]),
        lambda m: m["layers"][0].update(experts=3, records=m["layers"][0]["records"][1:]),
        lambda m: m["layers"][0].update(file="config.json"),
        lambda m: m["layers"][0].update(path=m["layers"][1]["path"]),
        lambda m: m["layers"][0].update(file=m["layers"][1]["file"]),
        lambda m: m["layers"].append(m["layers"][0]),
        lambda m: m["files"]["config.json"].update(sha256="0" * 63),
        lambda m: m["layouts"][0]["parts"][0].update(offset=64),
        lambda m: m["layouts"][0]["parts"][0].update(shape=[0, 1]),
        lambda m: m["layouts"][0]["parts"][0].update(dtype="int8"),
        lambda m: m["layouts"][0]["quantization"].popitem(),
    ],
    ids=range(20),
)
def test_refused(pack: Path, scratch: Path, edit: Any) -> None:
    assert reread(scratch, change(pack, edit)) is None


def test_refused_under_python_o(pack: Path, scratch: Path) -> None:
    """Checks of files must not be `assert`s, which `python -O` leaves out."""
    content = change(pack, lambda m: m["layouts"][0]["parts"][0].update(offset=64))
    (scratch / MANIFEST).write_bytes(content)
    script = "import sys; from pathlib import Path; from flash_moe.format import manifest\n"
    script += "manifest.read_manifest(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-O", "-c", script, scratch],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert "CheckpointError" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "../pack/config.json",
        "/etc/hostname",
        "sub/config.json",
        ".",
        "..",
        "",
        ".hidden",
        "config.json\n",
        "config.json/",
        "c\0",
        "a" * 300,
    ],
)
def test_names_that_lead_elsewhere(pack: Path, scratch: Path, name: str) -> None:
    def rename(value: Any) -> None:
        value["files"][name] = value["files"].pop("config.json")

    assert reread(scratch, change(pack, rename)) is None


@pytest.mark.parametrize("by", [-1, 1])
def test_a_file_of_another_size(copy: Path, by: int) -> None:
    for name in read_manifest(copy).files:
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" " if by > 0 else content[:by])
        with pytest.raises(CheckpointError):
            open_folder(copy)
        complaint = f"{name} has {len(content) + by} bytes, not {len(content)}"
        with pytest.raises(CheckpointError, match=complaint):
            read_manifest(copy)
        (copy / name).write_bytes(content)
    read_manifest(copy)


def test_any_file_missing(copy: Path) -> None:
    names = sorted(file.name for file in copy.iterdir())
    assert set(names) == {MANIFEST, *read_manifest(copy).files}
    for name in names:
        (copy / name).rename(copy / "aside")
        with pytest.raises(FlashMoeError):
            load(copy)
        (copy / "aside").rename(copy / name)
    load(copy).close()


def test_verify_has_no_complaint_about_a_sound_pack(pack: Path) -> None:
    steps: list[int] = []
    manifest = read_manifest(pack)
    assert verify(pack, manifest, steps.append) == []
    assert sum(steps) == sum(entry.size for entry in manifest.files.values())


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_verify_names_the_damaged_expert(pack: Path, data: st.DataObject) -> None:
    manifest = read_manifest(pack)
    layer = data.draw(st.sampled_from(manifest.layers))
    at = data.draw(st.integers(0, layer.experts * layer.layout.stride - 1))
    with _flipped(pack / layer.file, at):
        faults = verify(pack, manifest)
    expert = at // layer.layout.stride
    assert faults == [
        f"{layer.file}: expert {expert} of {layer.path} is damaged",
        f"{layer.file}: the file is damaged",
    ]


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_verify_finds_a_flipped_byte_of_any_other_file(pack: Path, data: st.DataObject) -> None:
    manifest = read_manifest(pack)
    name = data.draw(st.sampled_from(sorted(manifest.files)))
    assume(all(layer.file != name for layer in manifest.layers))
    at = data.draw(st.integers(0, manifest.files[name].size - 1))
    with _flipped(pack / name, at):
        assert verify(pack, manifest) == [f"{name}: the file is damaged"]


class _flipped:
    """A file with one byte inverted, for the length of a `with`."""

    def __init__(self, file: Path, at: int) -> None:
        self.file, self.at = file, at

    def __enter__(self) -> None:
        with self.file.open("r+b") as file:
            file.seek(self.at)
            byte = file.read(1)[0]
            file.seek(self.at)
            file.write(bytes([byte ^ 0xFF]))

    def __exit__(self, *_: object) -> None:
        self.__enter__()
