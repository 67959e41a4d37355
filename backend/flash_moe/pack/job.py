"""Pack a checkpoint: every expert one aligned record, one file a layer, in bounded memory.

The work happens in `NAME.partial`: the pack grows in its folder `pack/`, and each finished file is
recorded beside it, so that a killed pack is resumed and the result is the same to the byte. The
manifest is written last and `pack/` then takes its name: a half-made pack has neither. The records
of the work are removed last of all, so that no kill leaves files that nothing vouches for.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from flash_moe.callbacks import Advance, no_advance
from flash_moe.checkpoint.folder import open_folder, with_experts_per_token
from flash_moe.checkpoint.plan import Plan, make_plan
from flash_moe.checkpoint.skeleton import Skeleton, open_skeleton
from flash_moe.errors import CheckpointError, NotContiguous, OptionError, Remedy
from flash_moe.format.atomic import sync, write_json
from flash_moe.format.manifest import MANIFEST, Manifest
from flash_moe.pack.calibrate import Calibration, read_calibration
from flash_moe.pack.fewer_bits import FewerBits, fewer_bits
from flash_moe.pack.files import FileWriter, packed_layout
from flash_moe.pack.importance import ColumnImportance
from flash_moe.pack.transform import ExpertTransform, TransformCost
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.pack.workspace import identity_of, open_workspace, require_absent


@dataclass(frozen=True, slots=True)
class PackJob:
    """A pack that is planned and checked. `importance` is there once it is calibrated."""

    skeleton: Skeleton
    target: Path
    experts_per_token: int | None = None
    transform: ExpertTransform | None = None
    calibration: Calibration | None = None
    importance: ColumnImportance | None = None

    @classmethod
    def plan(
        cls,
        source: Path,
        target: Path,
        *,
        experts: int | None = None,
        bits: int | None = None,
        group_size: int | None = None,
        planes: bool = False,
        calibration: Path | None = None,
    ) -> Self:
        """Check everything that can be checked before a byte is written.

        `bits` and `group_size` requantize the experts; `planes` stores 4-bit experts in two halves,
        of which one alone is 2-bit. `calibration` is a text, or JSON lines, that the model reads:
        errors then count by what weights are multiplied with. `experts` is the K of the pack.
        """
        _require_consistent(bits, group_size, planes, calibration)
        skeleton = _open(source, target, experts)
        text = None if calibration is None else read_calibration(source, calibration)
        digest = None if text is None else text.digest
        transform: ExpertTransform | None = None
        if planes:
            transform = TwoPlanes(digest)
        elif bits is not None:
            transform = fewer_bits(bits, group_size, digest)
        return cls(skeleton, target, experts, transform, text).checked()

    @classmethod
    def with_transform(
        cls,
        source: Path,
        target: Path,
        transform: ExpertTransform | None,
        calibration: Calibration | None = None,
    ) -> Self:
        """The same for any transform: to measure others than those that `plan` offers."""
        skeleton = _open(source, target, None)
        return cls(skeleton, target, None, transform, calibration).checked()

    @property
    def nbytes(self) -> int:
        """What the experts and the other weights take in the pack."""
        skeleton = self.skeleton
        experts = sum(
            packed_layout(skeleton, path, self.transform).stride * skeleton.expert_count(path)
            for path in skeleton.switches
        )
        return experts + sum(array.nbytes for array in skeleton.resident().values())

    def as_planned(self) -> Plan:
        """What the pack will need, with the K that was chosen for it."""
        skeleton, transform = self.skeleton, self.transform
        sources = [skeleton.layout(path) for path in skeleton.switches]
        layouts = {path: packed_layout(skeleton, path, transform) for path in skeleton.switches}
        return make_plan(
            skeleton,
            layouts=layouts,
            requantized=transform.summary(sources) if transform else None,
            experts=self.experts_per_token,
        )

    @property
    def calibration_tokens(self) -> int:
        return 0 if self.calibration is None else len(self.calibration.ids)

    @property
    def how(self) -> str | None:
        """What is done to the experts, as the manifest says it; None if nothing is."""
        return None if self.transform is None else self.transform.how

    @property
    def cost(self) -> TransformCost | None:
        """What transforming the experts took, after `write`; None where they are left as they
        are."""
        return None if self.transform is None else self.transform.cost

    def slow_seconds(self) -> float | None:
        """How long it takes to give the experts fewer bits, where that is slow: without a compiler
        and without the library that comes with the package. Tried for a moment."""
        if not isinstance(self.transform, FewerBits):
            return None
        skeleton = self.skeleton
        return self.transform.slow_seconds(
            {
                path: (skeleton.layout(path), skeleton.expert_count(path))
                for path in skeleton.switches
            }
        )

    def calibrate(self, progress: Advance = no_advance) -> Self:
        """This job, with errors weighed by what the model computes when it reads the text."""
        if self.calibration is None or self.transform is None or self.importance is not None:
            return self
        identity = identity_of(self.skeleton.folder, self.transform)
        with open_workspace(self.target, self.nbytes, identity) as workspace:
            importance = self.calibration.collect(workspace, progress)
        return replace(self, transform=self.transform.weighed_by(importance), importance=importance)

    def write(self, progress: Advance = no_advance) -> Manifest:
        """Write the pack, or the rest of it. What is to be calibrated and is not yet is first."""
        calibrated = self.calibrate()
        if calibrated is not self:
            return calibrated.write(progress)
        identity = identity_of(self.skeleton.folder, self.transform)
        with open_workspace(self.target, self.nbytes, identity) as workspace:
            writer = FileWriter(workspace, self.skeleton, self.transform, progress)
            return self.finish(writer)

    def finish(self, writer: FileWriter) -> Manifest:
        """Write what is not in an open workspace yet, and make the pack of it."""
        writer.pack.mkdir(exist_ok=True)
        manifest = self._write_files(writer)
        write_json(writer.pack / MANIFEST, manifest.to_json())
        writer.remove_strays({*manifest.files, MANIFEST})
        writer.pack.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(writer.workspace)
        return manifest

    def _write_files(self, writer: FileWriter) -> Manifest:
        skeleton, transform = self.skeleton, self.transform
        layouts = {path: skeleton.layout(path) for path in skeleton.switches}
        config = _without_vendor_key(skeleton.config)
        layers = [writer.layer(number, path) for number, path in enumerate(skeleton.switches)]
        files = {name: entry for _, entries in layers for name, entry in entries.items()}
        files |= writer.resident()
        files |= writer.small_files(transform.config(config, layouts) if transform else config)
        return Manifest(
            source=skeleton.folder.path.resolve().name,
            architecture=skeleton.folder.architecture,
            experts_per_token=self.experts_per_token,
            layers=tuple(layer for layer, _ in layers),
            files=files,
            requantized=transform.summary(layouts.values()) if transform else None,
        )

    def checked(self) -> Self:
        """OptionError, if its transform does not go with its experts."""
        if self.transform is not None:
            layouts = {path: self.skeleton.layout(path) for path in self.skeleton.switches}
            for path, layout in layouts.items():
                self.transform.layout(layout, path)
            self.transform.summary(layouts.values())
        if self.calibration is not None:
            self._require_runnable()
        return self

    def _require_runnable(self) -> None:
        try:
            self.skeleton.layers()
        except NotContiguous as error:
            raise OptionError(
                f"The experts of {self.skeleton.folder.path} are not stored one by one, so the "
                "model cannot run before it is packed, as calibration needs it to. Pack it without "
                "calibration.",
                Remedy.PACK_WITHOUT_CALIBRATION,
            ) from error


def _open(source: Path, target: Path, experts: int | None) -> Skeleton:
    folder = open_folder(source)
    if folder.manifest is not None:
        raise CheckpointError(
            f"{source} is a pack already. Run it as it is.", Remedy.ADD_AGAIN, source
        )
    require_absent(target)
    with_experts_per_token(folder.config, experts)
    return open_skeleton(folder)


def _require_consistent(
    bits: int | None, group_size: int | None, planes: bool, calibration: Path | None
) -> None:
    if planes and bits is not None:
        raise OptionError(
            "planes keeps all 4 bits, so it does not go with bits. Choose one of them.",
            Remedy.PACK_WITHOUT_BITS,
        )
    if group_size is not None and bits is None:
        raise OptionError("group_size goes with bits. Choose bits too, or leave out group_size.")
    if calibration is not None and bits is None and not planes:
        raise OptionError(
            "calibration goes with bits or planes: without them no weight changes. Choose one of "
            "them, or leave out calibration.",
            Remedy.PACK_WITHOUT_CALIBRATION,
        )


def _without_vendor_key(config: dict[str, Any]) -> dict[str, Any]:
    """The config after loading: once mlx-lm has understood a vendor's quantization it writes its
    own key, and the vendor's must not be applied again."""
    if "quantization" in config:
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config
