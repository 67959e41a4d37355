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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flash_moe.callbacks import Advance, Notice, no_advance, no_notice
from flash_moe.errors import FlashMoeError, NoSpace, OptionError, Remedy, UnsupportedModel
from flash_moe.format.atomic import locked_folder, replacing, write_json
from flash_moe.format.holes import allocated, holes_are_possible
from flash_moe.pack.files import FileWriter
from flash_moe.pack.job import PackJob
from flash_moe.pack.transform import ExpertTransform
from flash_moe.pack.workspace import (
    free_space,
    open_workspace,
    require_same,
    require_space,
    workspace_of,
)
from flash_moe.pull.begun import begun_in, clear, go_on, saved_contents, shadow_in
from flash_moe.pull.form import FORMS, Form, form_of, pack_with, transform_of
from flash_moe.pull.journal import PULL, Journal
from flash_moe.pull.ranges import Patience, Ranges
from flash_moe.pull.receive import Receiver
from flash_moe.pull.repository import Repository, find_repository
from flash_moe.pull.route import Route
from flash_moe.pull.shadow import Contents, Release, Shadow, fetch_plan, make_shadow


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
        begun = begun_in(workspace)
        repository = find_repository(name, revision)
        if begun is not None:
            repository = go_on(begun, repository, workspace, notice)
        ranges = Ranges(repository, patience or Patience(), notice)
        contents = saved_contents(workspace, repository) if begun else fetch_plan(ranges)
        transform = transform_of(bits, planes)
        require_same(workspace, _identity(repository, transform))
        with tempfile.TemporaryDirectory(prefix="flash-moe-") as folder:
            job = PackJob.plan(_make_plan(folder, repository, contents), target)
            job = pack_with(job, transform, experts)
            route = Route.of(job.skeleton, transform)
            form = form_of(job, route, repository, bits, planes)
            small = [file for file in repository.small if file.name not in contents]
            there = {p.name for p in shadow_in(workspace, repository).glob("*")} if begun else set()
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
            shadow = _make_plan(folder, self.repository, self._contents)
            plain = PackJob.plan(shadow, self.target)
            own = (self.form.bits, self.form.planes)
            forms = FORMS if own in FORMS else (*FORMS, own)
            return [self._other(plain, bits, planes) for bits, planes in forms]

    def _other(self, plain: PackJob, bits: int | None, planes: bool) -> Form:
        if (bits, planes) == (self.form.bits, self.form.planes):
            return self.form
        try:
            transform = transform_of(bits, planes)
            job = pack_with(plain, transform, self.experts)
            return form_of(job, Route.of(job.skeleton, transform), self.repository, bits, planes)
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
        identity = _identity(self.repository, self._transform)
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
        folder = shadow_in(workspace, self.repository)
        if not (workspace / PULL).exists():
            clear(workspace)
            make_shadow(folder, self.repository, self._contents)
            write_json(workspace / PULL, self.repository.to_json())
        self._fetch_small(folder, progress)
        with ExitStack() as stack:
            shadow = stack.enter_context(closing(Shadow(folder)))
            job = pack_with(PackJob.plan(folder, self.target), self._transform, self.experts)
            route = Route.of(job.skeleton, self._transform)
            Receiver(workspace, shadow, route, self.ranges, progress, notice).receive()
            notice("Writing the weights that are no expert's")
            # Opened anew: what mlx-lm made of holes may not be what it makes of weights.
            job = pack_with(PackJob.plan(folder, self.target), self._transform, self.experts)
            kept = Release(shadow, route)
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


def _identity(repository: Repository, transform: ExpertTransform | None) -> dict[str, Any]:
    recast = {} if transform is None else {"recast": transform.to_json()}
    return {"repository": repository.name, "commit": repository.commit, **recast}


def _make_plan(folder: str, repository: Repository, contents: Contents) -> Path:
    """A copy of nothing but headers and configs, under the name that messages should say."""
    return make_shadow(Path(folder) / repository.name.partition("/")[2], repository, contents)
