"""A job as users plan it: contradictions are refused before a byte is written, and packs that an
older version began are resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flash_moe.checkpoint.folder import open_folder
from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.format.manifest import read_manifest
from flash_moe.pack.fewer_bits import FewerBits
from flash_moe.pack.job import PackJob
from flash_moe.pack.requantize import fit_in_mlx
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.pack.workspace import identity_of
from tests.pack.packs import hashes, interrupt, modified, pack

GOLDEN = Path(__file__).parents[1] / "golden" / "qwen3_5_moe"
# What the code before `flash_moe.pack` wrote to source.json for it.
IDENTITY = "c914d7d03dc5c13d2e10ba7d0bcbc99e865fcfbbcbaaac2e5139ba76341b4bcd"


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"planes": True, "bits": 2}, "planes keeps all 4 bits", Remedy.PACK_WITHOUT_BITS),
        ({"planes": True, "group_size": 64}, "group_size goes with bits", None),
        ({"group_size": 128}, "group_size goes with bits", None),
        (
            {"calibration": Path("text.txt")},
            "calibration goes with bits or planes",
            Remedy.PACK_WITHOUT_CALIBRATION,
        ),
        ({"bits": 5}, "bits=5: choose 2 or 3 or 4", None),
        ({"bits": 2, "group_size": 32}, "group_size=32: choose 64 or 128", None),
        ({"experts": 9}, "experts=9: this model has 8; choose 1 to 8", None),
    ],
    ids=str,
)
def test_contradictions_are_refused(
    options: dict[str, Any],
    message: str,
    remedy: Remedy | None,
    demo_folder: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(OptionError, match=message) as refusal:
        PackJob.plan(demo_folder, tmp_path / "packs" / "pack", **options)
    assert refusal.value.remedy is remedy
    assert not (tmp_path / "packs").exists()


def test_a_target_that_exists_is_left_alone(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        PackJob.plan(demo_folder, tmp_path / "pack")
    job = PackJob.plan(demo_folder, tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        job.write()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "pack"]


def test_a_pack_is_not_packed_again(demo_folder: Path, tmp_path: Path) -> None:
    packed = pack(demo_folder, tmp_path / "pack")
    with pytest.raises(CheckpointError, match="is a pack already") as refusal:
        PackJob.plan(packed, tmp_path / "again")
    assert (refusal.value.remedy, refusal.value.path) == (Remedy.ADD_AGAIN, packed)


@pytest.mark.parametrize("options", [{}, {"bits": 2}, {"planes": True}], ids=str)
def test_the_size_is_known_before_a_byte_is_written(
    options: dict[str, Any], demo_folder: Path, tmp_path: Path
) -> None:
    """Progress counts all of it, except gaps within the records of transformed experts."""
    job = PackJob.plan(demo_folder, tmp_path / "pack", experts=3, **options)
    assert not list(tmp_path.iterdir())
    assert job.calibration_tokens == 0
    assert (job.cost is None) == (not options)
    amounts: list[int] = []
    manifest = job.write(amounts.append)
    folder = open_folder(tmp_path / "pack")
    assert folder.nbytes == job.nbytes
    gaps = sum(
        layer.experts * (layer.layout.stride - sum(part.nbytes for part in layer.layout.parts))
        for layer in manifest.layers
    )
    assert sum(amounts) == job.nbytes - (gaps if options else 0)
    assert manifest == read_manifest(tmp_path / "pack")
    assert manifest.experts_per_token == 3


@pytest.mark.parametrize(
    ("transform", "recast"),
    [
        (None, None),
        (
            FewerBits(3, 128, "fit", fit_in_mlx, "digest"),
            {"bits": 3, "group_size": 128, "method": "fit", "calibration": "digest"},
        ),
        (TwoPlanes("digest"), {"method": "two planes", "calibration": "digest"}),
    ],
    ids=["none", "fewer bits", "two planes"],
)
def test_the_identity_of_a_pack_is_that_of_older_versions(
    transform: ExpertTransform | None, recast: dict[str, Any] | None
) -> None:
    identity = {"source": IDENTITY} | ({} if recast is None else {"recast": recast})
    made = identity_of(open_folder(GOLDEN), transform)
    assert made.pop("samples")
    assert made == identity


def test_a_pack_of_an_older_version_is_resumed(tmp_path: Path) -> None:
    """Its workspace, as older versions left it: these names are on the disks of users."""
    reference = pack(GOLDEN, tmp_path / "reference")
    interrupt(PackJob.plan(GOLDEN, tmp_path / "pack").write, 2)
    workspace = tmp_path / "pack.partial"
    files = {str(file.relative_to(workspace)) for file in workspace.rglob("*") if file.is_file()}
    assert {"source.json", "layer_000.json", "pack/layer_000.experts"} <= files
    begun = json.loads((workspace / "source.json").read_bytes())
    assert begun.keys() == {"source", "samples"}
    (workspace / "source.json").write_text(json.dumps({"source": IDENTITY}))
    finished = json.loads((workspace / "layer_000.json").read_bytes())
    layer = read_manifest(reference).layers[0]
    sha256 = read_manifest(reference).files[layer.file].sha256
    assert finished == {"records": list(layer.records), "sha256": sha256}
    before = modified(workspace / "pack")
    pack(GOLDEN, tmp_path / "pack")
    assert before.items() <= modified(tmp_path / "pack").items()
    assert hashes(tmp_path / "pack") == hashes(reference)
