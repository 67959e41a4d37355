"""From a repository to a pack in one pass, planned before a byte of its weights is fetched.

The work happens in `NAME.partial`, as a pack's does, beside a sparse copy of the repository
(shadow.py). `pull.json` there pins the commit: whatever the repository becomes meanwhile, a pull
goes on with what it began with, and says so.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from flash_moe.callbacks import Advance, Notice, no_advance, no_notice
from flash_moe.checkpoint.folder import routed_experts
from flash_moe.checkpoint.plan import Plan
from flash_moe.errors import (
    CheckpointError,
    FlashMoeError,
    NoSpace,
    OptionError,
    Remedy,
    UnsupportedModel,
)
from flash_moe.format.atomic import locked_folder, replacing, write_json
from flash_moe.format.holes import allocated, holes_are_possible
from flash_moe.format.json_files import read_json
from flash_moe.pack.fewer_bits import fewer_bits
from flash_moe.pack.files import FileWriter, resident_shards
from flash_moe.pack.job import PackJob
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pack.two_planes import TwoPlanes
from flash_moe.pack.workspace import (
    IDENTITY,
    free_space,
    open_workspace,
    require_space,
    workspace_of,
)
from flash_moe.pull.journal import PULL, Journal
from flash_moe.pull.ranges import Patience, Ranges
from flash_moe.pull.receive import Receiver
from flash_moe.pull.repository import Repository, find_repository
from flash_moe.pull.route import Route
from flash_moe.pull.shadow import Contents, Shadow, fetch_plan, make_shadow

SOURCE = "source"
# (bits, planes) of what a repository of 4 bits can be pulled as.
FORMS = ((None, False), (None, True), (2, False))


@dataclass(frozen=True, slots=True)
class Form:
    """One way to pull a repository. `peak_bytes` is the most that it takes on disk meanwhile,
    `pack_bytes` what stays. `refused` says why it cannot be; the rest is empty then."""

    bits: int | None
    planes: bool
    pack_bytes: int = 0
    peak_bytes: int = 0
    model: Plan | None = None
    refused: str | None = None

    @property
    def lossy(self) -> list[str]:
        """What the model loses by it."""
        plan = self.model
        if plan is None:
            return []
        found = []
        if plan.requantized is not None and not plan.requantized.two_planes:
            found.append(str(plan.requantized))
        if plan.experts_per_token < plan.own_experts_per_token:
            own = plan.own_experts_per_token
            found.append(f"{plan.experts_per_token} of {own} experts a token")
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "planes": self.planes,
            "pack_bytes": self.pack_bytes,
            "peak_bytes": self.peak_bytes,
            "lossy": self.lossy,
            "refused": self.refused,
            "model": self.model and self.model.to_json(),
        }


@dataclass(frozen=True, slots=True)
class PullJob:
    """A pull that is planned and checked. `fetch_bytes` are still to come, `here_bytes` are what an
    earlier one left on this disk."""

    repository: Repository
    target: Path
    experts: int | None
    form: Form
    fetch_bytes: int
    here_bytes: int
    ranges: Ranges
    _contents: Contents
    _transform: ExpertTransform | None

    @classmethod
    def plan(
        cls,
        name: str,
        target: Path,
        *,
        revision: str | None = None,
        experts: int | None = None,
        bits: int | None = None,
        planes: bool = False,
        patience: Patience | None = None,
        notice: Notice = no_notice,
    ) -> Self:
        """Ask the repository, and check everything that can be checked. A kilobyte or some."""
        if planes and bits is not None:
            raise OptionError(
                "planes keeps all 4 bits, so it does not go with bits. Choose one of them.",
                Remedy.PACK_WITHOUT_BITS,
            )
        workspace = workspace_of(target)
        begun = _begun(workspace)
        repository = find_repository(name, revision)
        if begun is not None:
            repository = _go_on(begun, repository, workspace, notice)
        ranges = Ranges(repository, patience or Patience(), notice)
        contents = _saved(workspace, repository) if begun else fetch_plan(ranges)
        transform = _transform(bits, planes)
        with tempfile.TemporaryDirectory(prefix="flash-moe-") as folder:
            job = _pack_job(make_shadow(Path(folder) / "plan", repository, contents), target)
            job = _with(job, transform, experts)
            route = Route.of(job.skeleton, transform)
            form = _form(job, route, repository, bits, planes)
            small = [file for file in repository.small if file.name not in contents]
            there = {p.name for p in _shadow(workspace, repository).glob("*")} if begun else set()
            at = Journal.read(workspace) if begun else Journal()
            fetch = route.fetch_bytes(at.shard, at.offset if at.hash else 0, frozenset(at.ahead))
            fetch += sum(file.size for file in small if file.name not in there)
        here = allocated(workspace)
        return cls(repository, target, experts, form, fetch, here, ranges, contents, transform)

    @staticmethod
    def left_by(target: Path) -> int:
        """What an interrupted pull or pack of a target takes on disk; 0 if there is none."""
        return allocated(workspace_of(target))

    @staticmethod
    def discard(target: Path) -> None:
        """Delete what an interrupted pull or pack left; CheckpointError while one is at work."""
        workspace = workspace_of(target)
        if workspace.is_dir():
            with locked_folder(workspace, f"{workspace} is being written."):
                shutil.rmtree(workspace)

    @property
    def moved_bytes(self) -> int:
        """What has come over the network so far, the plan's own bytes among it."""
        return self.ranges.received

    @property
    def free_bytes(self) -> int:
        return free_space(self.target)

    @property
    def missing_bytes(self) -> int:
        """What the disk lacks for it; 0 if there is room."""
        return max(0, self.form.peak_bytes - self.here_bytes - self.free_bytes)

    def forms(self) -> list[Form]:
        """What else the repository can be pulled as, this one among it."""
        with tempfile.TemporaryDirectory(prefix="flash-moe-") as folder:
            shadow = make_shadow(Path(folder) / "plan", self.repository, self._contents)
            plain = _pack_job(shadow, self.target)
            return [self._other(plain, bits, planes) for bits, planes in FORMS]

    def _other(self, plain: PackJob, bits: int | None, planes: bool) -> Form:
        if (bits, planes) == (self.form.bits, self.form.planes):
            return self.form
        try:
            transform = _transform(bits, planes)
            job = _with(plain, transform, self.experts)
            return _form(job, Route.of(job.skeleton, transform), self.repository, bits, planes)
        except FlashMoeError as error:
            return Form(bits, planes, refused=str(error))

    def to_json(self) -> dict[str, Any]:
        return {
            "repository": self.repository.name,
            "commit": self.repository.commit,
            "fetch_bytes": self.fetch_bytes,
            "here_bytes": self.here_bytes,
            "free_bytes": self.free_bytes,
            "missing_bytes": self.missing_bytes,
            **self.form.to_json(),
        }

    def write(self, progress: Advance = no_advance, notice: Notice = no_notice) -> None:
        """Fetch and pack, or the rest of it. `progress` is told the bytes that came."""
        identity = {
            "repository": self.repository.name,
            "commit": self.repository.commit,
            **({"recast": self._transform.to_json()} if self._transform else {}),
        }
        self.ranges.start()
        try:
            with open_workspace(self.target, self.form.peak_bytes, identity) as workspace:
                self._write(workspace, progress, notice)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full() from error
            raise
        finally:
            self.ranges.stop()

    def _write(self, workspace: Path, progress: Advance, notice: Notice) -> None:
        if not holes_are_possible(workspace):
            raise UnsupportedModel(
                f"The file system of {workspace.parent} cannot have files with holes, as exFAT and "
                "FAT cannot, and a pull keeps its parts in one. Choose a target on another disk, "
                "such as one in APFS, ext4, XFS or Btrfs.",
                Remedy.PACK_ELSEWHERE,
            )
        folder = _shadow(workspace, self.repository)
        if not (workspace / PULL).exists():
            _clear(workspace)
            make_shadow(folder, self.repository, self._contents)
            write_json(workspace / PULL, self.repository.to_json())
        self._fetch_small(folder, progress)
        with ExitStack() as stack:
            shadow = stack.enter_context(closing(Shadow(folder)))
            job = _with(_pack_job(folder, self.target), self._transform, self.experts)
            route = Route.of(job.skeleton, self._transform)
            Receiver(workspace, shadow, route, self.ranges, progress, notice).receive()
            notice("Writing the weights that are no expert's")
            # Opened anew: what mlx-lm made of holes may not be what it makes of weights.
            job = _with(_pack_job(folder, self.target), self._transform, self.experts)
            kept = _Release(shadow, route)
            job.finish(FileWriter(workspace, job.skeleton, self._transform, no_advance, kept))

    def _fetch_small(self, folder: Path, progress: Advance) -> None:
        for file in self.repository.small:
            path = folder / file.name
            if not path.exists():
                data = self.ranges.whole(file)
                with replacing(path) as temporary:
                    temporary.write_bytes(data)
                progress(file.size)

    def _full(self) -> NoSpace:
        try:
            require_space(self.target, self.form.peak_bytes)
        except NoSpace as error:
            return error
        return NoSpace(
            f"The disk of {self.target.parent} is full. What has arrived is kept. Free some space.",
            Remedy.PULL_AGAIN,
        )


class _Release:
    """Gives the copy's blocks back when the pack has all weights that are made of them."""

    def __init__(self, shadow: Shadow, route: Route) -> None:
        self._shadow, self._route = shadow, route
        self._waiting = dict(route.resident)

    def __call__(self, names: list[str]) -> None:
        done = frozenset().union(*(self._waiting.pop(name) for name in names))
        for name in done.difference(*self._waiting.values()) if self._waiting else done:
            tensor = self._route.tensors[name]
            end = tensor.offset + tensor.nbytes
            self._shadow.punch(tensor.file.name, tensor.offset, end)


def _clear(workspace: Path) -> None:
    for path in workspace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != IDENTITY:
            path.unlink()


def _begun(workspace: Path) -> Repository | None:
    """What an interrupted pull began with."""
    path = workspace / PULL
    if not path.exists():
        return None
    try:
        return Repository.from_json(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Remove {workspace}, and pull again."
        ) from error


def _go_on(begun: Repository, now: Repository, workspace: Path, notice: Notice) -> Repository:
    """The commit that a pull began with, and never another."""
    if begun.name != now.name:
        raise CheckpointError(
            f"{workspace} was begun from {begun.name}. Remove it, or choose another target."
        )
    if begun.commit == now.commit:
        return begun
    if now.revision is not None and now.revision != begun.revision:
        raise CheckpointError(
            f"{workspace} was begun from commit {begun.commit}, and {now.revision} is "
            f"{now.commit}: they are not mixed. Go on with revision {begun.commit}, or remove what "
            "is there.",
            Remedy.REMOVE_UNFINISHED,
        )
    notice(
        f"{now.name} has moved from {begun.commit[:10]} to {now.commit[:10]} since this pull "
        f"began. It goes on with {begun.commit[:10]}"
    )
    return begun


def _saved(workspace: Path, repository: Repository) -> Contents:
    """The plan's files, from the copy."""
    folder = _shadow(workspace, repository)
    contents: Contents = {}
    for file in repository.small:
        if (folder / file.name).exists():
            contents[file.name] = (folder / file.name).read_bytes()
    for file in repository.weights:
        with (folder / file.name).open("rb") as shard:
            start = shard.read(8)
            contents[file.name] = start + shard.read(int.from_bytes(start, "little"))
    return contents


def _shadow(workspace: Path, repository: Repository) -> Path:
    """Called as a download would be, because a manifest names its source."""
    return workspace / SOURCE / repository.name.partition("/")[2]


def _transform(bits: int | None, planes: bool) -> ExpertTransform | None:
    if planes:
        return TwoPlanes()
    return None if bits is None else fewer_bits(bits)


def _pack_job(folder: Path, target: Path) -> PackJob:
    return PackJob.plan(folder, target)


def _with(job: PackJob, transform: ExpertTransform | None, experts: int | None) -> PackJob:
    if experts is not None and not 1 <= experts <= routed_experts(job.skeleton.config):
        total = routed_experts(job.skeleton.config)
        raise OptionError(f"experts={experts}: this model has {total}; choose 1 to {total}.")
    return replace(job, transform=transform, experts_per_token=experts).checked()


def _form(
    job: PackJob, route: Route, repository: Repository, bits: int | None, planes: bool
) -> Form:
    arrays = job.skeleton.resident()
    largest = max(
        (sum(arrays[name].nbytes for name in names) for names in resident_shards(arrays)),
        default=0,
    )
    small = sum(file.size for file in repository.small)
    resident = sum(array.nbytes for array in arrays.values())
    experts = job.nbytes - resident
    # The copy has what is no expert's as the repository has it, and the pack gets it a file at a
    # time, while the copy gives it back.
    peak = experts + max(resident, route.kept_bytes) + 2 * small
    peak += max(largest, route.side_peak())
    return Form(bits, planes, job.nbytes + small, peak, job.as_planned())
