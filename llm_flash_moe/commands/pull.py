"""`llm flash-moe pull`: from a repository to a model that runs, in one pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flash_moe import options
from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import AS_JSON, EXPERTS, NAME, TO, command
from llm_flash_moe.commands.describe import describe, size
from llm_flash_moe.commands.planned import disk_rate, plan_to_json, print_pull
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.known import KNOWN, Known
from llm_flash_moe.progress import lines_or_bar
from llm_flash_moe.registry import Entry, Registry

if TYPE_CHECKING:
    from flash_moe import PullJob


@click.command()
@click.argument("model", metavar="NAME|ORG/REPO")
@NAME
@EXPERTS
@TO
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in options.PACK_BITS]),
    help="Fewer bits for experts: less exact",
)
@click.option("--planes", is_flag=True, help="4-bit experts in two halves: one alone is 2-bit")
@click.option("--revision", help="A branch, a tag or a commit, instead of main")
@click.option("--plan", "plan_only", is_flag=True, help="Show what it takes, and stop")
@AS_JSON
@click.option("--yes", is_flag=True, help="Do not ask before fetching")
def pull(
    model: str,
    name: str | None,
    experts: int | None,
    to: Path | None,
    bits: str | None,
    planes: bool,
    revision: str | None,
    plan_only: bool,
    as_json: bool,
    yes: bool,
) -> None:
    """Fetch a model and pack it on the way: no full copy is on the disk meanwhile.

    It first shows what it takes, and asks. An interrupted pull goes on where it was when the same
    command is given again. Every byte is checked against the repository's hashes. With --json the
    plan is printed as JSON, and nothing is fetched without --yes.
    """
    if planes and bits:
        raise click.UsageError("--planes keeps all 4 bits: it goes without --bits.")
    from flash_moe import Checkpoint, PullJob

    known = KNOWN.get(model, Known(model))
    with as_click_errors():
        name = name or (model if model in KNOWN else _default_name(model, bits, planes))
        registry = Registry.of_user()
        registry.require_free(name)
        target = paths.new_folder(name, to)
        job = PullJob.plan(
            known.repository,
            target,
            revision=revision,
            experts=experts or known.experts,
            bits=int(bits) if bits else None,
            planes=planes,
            notice=_say,
        )
        rate = disk_rate(job)
        if as_json:
            click.echo(json.dumps(plan_to_json(job, rate), indent=2))
        else:
            print_pull(name, job, rate)
        if plan_only or (as_json and not yes):
            return
        if job.missing_bytes:
            raise PluginError(
                f"There is no room: {size(job.missing_bytes)} more are needed on the disk of "
                f"{target.parent}. Free some space, choose another --to, or fewer --bits."
            )
        if not yes:
            click.confirm("Pull it?", abort=True)
        given = {"name": name, "experts": experts, "to": to and to.expanduser().resolve()}
        given |= {"bits": bits, "planes": planes, "revision": revision}
        again = command("pull", model, given)
        registry.begin(name, target, again)
        _write(name, job, again)
        registry.add(name, Entry(str(target), experts or known.experts, managed=to is None))
        description = describe(name, Checkpoint(target))
    click.echo(description, err=as_json)
    click.echo(f'Ready: llm -m {name} "your prompt"', err=as_json)


def _write(name: str, job: PullJob, again: str) -> None:
    try:
        with lines_or_bar(f"Pulling {name}", job.fetch_bytes) as progress:
            job.write(progress, _say)
    except KeyboardInterrupt:
        here = size(job.left_by(job.target))
        click.echo(f"\nStopped. {here} are here already. Go on with: {again}", err=True)
        raise SystemExit(130) from None


def _say(text: str) -> None:
    click.echo(f"{text}.", err=True)


def _default_name(model: str, bits: str | None, planes: bool) -> str:
    suffix = "-planes" if planes else f"-{bits}bit" if bits else ""
    return model.rpartition("/")[2].lower() + suffix
