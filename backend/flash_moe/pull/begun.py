"""What an interrupted pull left: the commit it began with, and the plan that was made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from flash_moe.callbacks import Notice
from flash_moe.errors import CheckpointError, Remedy
from flash_moe.format.json_files import read_json
from flash_moe.pack.workspace import IDENTITY
from flash_moe.pull.journal import PULL
from flash_moe.pull.repository import Repository
from flash_moe.pull.shadow import Contents

SOURCE = "source"


def clear(workspace: Path) -> None:
    for path in workspace.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != IDENTITY:
            path.unlink()


def begun_in(workspace: Path) -> Repository | None:
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


def go_on(begun: Repository, now: Repository, workspace: Path, notice: Notice) -> Repository:
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


def saved_contents(workspace: Path, repository: Repository) -> Contents:
    """The plan's files, from the copy."""
    folder = shadow_in(workspace, repository)
    contents: Contents = {}
    for file in repository.small:
        if (folder / file.name).exists():
            contents[file.name] = (folder / file.name).read_bytes()
    for file in repository.weights:
        with (folder / file.name).open("rb") as shard:
            start = shard.read(8)
            contents[file.name] = start + shard.read(int.from_bytes(start, "little"))
    return contents


def shadow_in(workspace: Path, repository: Repository) -> Path:
    """Called as a download would be, because a manifest names its source."""
    return workspace / SOURCE / repository.name.partition("/")[2]
