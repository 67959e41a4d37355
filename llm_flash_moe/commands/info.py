"""`llm flash-moe info`: what a model is and needs, here or still in a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from flash_moe import options
from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import AS_JSON, EXPERTS
from llm_flash_moe.commands.describe import describe, describe_plan
from llm_flash_moe.commands.planned import plan_to_json, print_pull
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.known import KNOWN, Known
from llm_flash_moe.progress import byte_bar
from llm_flash_moe.registry import Registry


@click.command()
@click.argument("name", metavar="NAME|FOLDER|ORG/REPO")
@click.option("--verify", is_flag=True, help="Read a pack against its checksums")
@EXPERTS
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in options.PACK_BITS]),
    help="As pack or pull with --bits would make it",
)
@click.option("--planes", is_flag=True, help="As pack or pull with --planes would make it")
@click.option("--revision", help="Of a repository: a branch, a tag or a commit")
@AS_JSON
def info(
    name: str,
    verify: bool,
    experts: int | None,
    bits: str | None,
    planes: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    """Show what a model is and what it needs, without loading it.

    Of a repository, only its config and the headers of its weights are fetched.
    """
    if verify and (bits or planes):
        raise click.UsageError(
            "--verify checks what is there: it goes without --bits and --planes."
        )
    with as_click_errors():
        registry = Registry.of_user()
        here = name in registry.entries() or Path(name).expanduser().is_dir()
        if here and revision:
            raise click.UsageError("--revision is of a repository, and this is on your disk.")
        if verify and not here:
            raise click.UsageError("--verify is for what is on your disk.")
        if here:
            folder, own = registry.find(name)
            if bits or planes:
                _planned(name, folder, experts or own, bits, planes, as_json)
            else:
                _show(name, folder, experts or own, verify, as_json)
        elif "/" in name or name in KNOWN:
            _remote(name, experts, bits, planes, revision, as_json)
        else:
            registry.get(name)  # says which names there are


def _show(name: str, folder: Path, experts: int | None, verify: bool, as_json: bool) -> None:
    from flash_moe import Checkpoint

    checkpoint = Checkpoint(folder)
    description = describe(name, checkpoint, experts)
    faults: list[str] | None = None
    if verify:
        with byte_bar("Verifying", checkpoint.nbytes) as progress:
            faults = checkpoint.verify(progress)
    if as_json:
        plan = checkpoint.plan(experts).to_json()
        checked = {} if faults is None else {"faults": faults}
        _print_json({"name": name, "path": str(folder), **plan, **checked})
    else:
        click.echo(description)
        click.echo(f"Folder: {folder}")
        for fault in faults or ():
            click.echo(fault, err=True)
        if faults == []:
            click.echo("Every file and record is as it was written.")
    if faults:
        raise PluginError("The pack is damaged. Remove it and pack the model again.")


def _planned(
    name: str, folder: Path, experts: int | None, bits: str | None, planes: bool, as_json: bool
) -> None:
    """Of what is here, as it would be packed."""
    from flash_moe import PackJob

    job = PackJob.plan(
        folder,
        paths.models() / f"{folder.name}.planned",
        experts=experts,
        bits=int(bits) if bits else None,
        planes=planes,
    )
    plan = job.as_planned()
    if as_json:
        _print_json({"name": name, "path": str(folder), **plan.to_json()})
    else:
        click.echo(describe_plan(name, plan))
        click.echo(f"Folder: {folder}, not packed so yet")


def _remote(
    name: str,
    experts: int | None,
    bits: str | None,
    planes: bool,
    revision: str | None,
    as_json: bool,
) -> None:
    from flash_moe import PullJob

    known = KNOWN.get(name, Known(name))
    job = PullJob.plan(
        known.repository,
        paths.models() / f"{name.replace('/', '--')}.planned",
        revision=revision,
        experts=experts or known.experts,
        bits=int(bits) if bits else None,
        planes=planes,
    )
    if as_json:
        _print_json(plan_to_json(job, None))
    else:
        print_pull(name, job, None)
        click.echo(f"Get it with: llm flash-moe pull {name}")


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2))
