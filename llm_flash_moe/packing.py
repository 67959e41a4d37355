"""`llm flash-moe pack`: a copy of a checkpoint whose experts are quick to read, or smaller."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from llm_flash_moe import places
from llm_flash_moe.describe import describe, describe_calibrating, describe_quantizing, plan_of
from llm_flash_moe.errors import shown
from llm_flash_moe.progress import byte_bar, item_bar
from llm_flash_moe.registry import Entry

if TYPE_CHECKING:
    from flash_moe.pack.calibrate import Calibration, Measured
    from flash_moe.pack.job import PackJob
    from flash_moe.pack.recast import Change

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("source", type=FOLDER)
@click.option("--name", help="Name for llm -m; the folder's name if left out")
@click.option("--experts", type=click.IntRange(1), help="Experts a token uses, if not the model's")
@click.option("--to", type=FOLDER, help="Folder to write the pack into, instead of llm's own")
@click.option(
    "--bits", type=click.Choice(["2", "3", "4"]), help="Fewer bits for experts: less exact"
)
@click.option(
    "--group-size",
    type=click.Choice(["64", "128"]),
    help="With --bits: weights that share a scale (64); more is smaller and less exact",
)
@click.option(
    "--method",
    type=click.Choice(["fit", "minmax"]),
    help="With --bits: least squares (fit), or extremes alone, to compare with",
)
@click.option("--planes", is_flag=True, help="4-bit experts in two halves: one alone is 2-bit")
@click.option(
    "--calibrate",
    type=FOLDER,
    metavar="FILE",
    help="With --bits or --planes: fit what matters when the model reads this text, or JSON lines",
)
def pack(
    source: Path,
    name: str | None,
    experts: int | None,
    to: Path | None,
    bits: str | None,
    group_size: str | None,
    method: str | None,
    planes: bool,
    calibrate: Path | None,
) -> None:
    """Write a copy of a checkpoint whose experts are quick to read.

    Every expert becomes one aligned record. A pack that was interrupted goes on where it was when
    the same command is given again.
    """
    for option, given in (("--group-size", group_size), ("--method", method)):
        if given and not bits:
            raise click.UsageError(f"{option} goes with --bits.")
    if planes and bits:
        raise click.UsageError("--planes keeps all 4 bits: it goes without --bits.")
    if calibrate and not (bits or planes):
        raise click.UsageError("--calibrate goes with --bits or --planes.")
    if calibrate and method == "minmax":
        raise click.UsageError("--calibrate goes with --method fit: minmax weighs nothing.")
    from flash_moe.checkpoint.folder import open_folder
    from flash_moe.pack.job import plan_pack

    with shown():
        suffix = "-planes" if planes else f"-{bits}bit" if bits else ""
        source = source.expanduser().resolve()
        name = name or places.default_name(source) + suffix
        registry = places.registry()
        registry.require_free(name)
        folder = open_folder(source)
        calibration = _calibration(source, calibrate)
        digest = calibration.digest if calibration else None
        change = _planes(digest) if planes else _recast(bits, group_size, method, digest)
        target = places.new_folder(name, to)
        target.parent.mkdir(parents=True, exist_ok=True)
        job = plan_pack(folder, target, experts, change)
        if calibration is not None:
            job = _calibrated(job, calibration)
        with byte_bar(f"Packing {name}", job.nbytes) as progress:
            job.write(progress)
        registry.add(name, Entry(str(target), experts, managed=to is None))
        plan = plan_of(target, None)
    if job.recast is not None and job.recast.spent.nbytes:
        click.echo(describe_quantizing(job.recast))
    click.echo(describe(name, plan))
    click.echo(f'Ready: llm -m {name} "your prompt"')


def _recast(
    bits: str | None, group_size: str | None, method: str | None, digest: str | None
) -> Change | None:
    if bits is None:
        return None
    from flash_moe.pack.requantize import make_recast

    return make_recast(int(bits), int(group_size or 64), method or "fit", digest)


def _planes(digest: str | None) -> Change:
    from flash_moe.pack.split_planes import make_planes

    return make_planes(digest)


def _calibration(source: Path, file: Path | None) -> Calibration | None:
    if file is None:
        return None
    from flash_moe.pack.calibrate import read_calibration

    return read_calibration(source, file.expanduser())


def _calibrated(job: PackJob, calibration: Calibration) -> PackJob:
    """Reads the text with the model that is to be packed."""
    with item_bar("Calibrating (tokens)", len(calibration.ids)) as progress:
        job = job.weighed(partial(calibration.collect, progress=progress))
    assert job.recast is not None
    click.echo(describe_calibrating(calibration, cast("Measured", job.recast.importance)))
    return job
