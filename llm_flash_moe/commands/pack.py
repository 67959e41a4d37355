"""`llm flash-moe pack`: a copy of a checkpoint whose experts are quick to read, or smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from flash_moe import options
from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import EXPERTS, NAME, PATH, TO, command
from llm_flash_moe.commands.describe import describe, size
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.progress import byte_bar, item_bar
from llm_flash_moe.registry import Entry, Registry

if TYPE_CHECKING:
    from flash_moe import PackJob


@click.command()
@click.argument("source", type=PATH)
@NAME
@EXPERTS
@TO
@click.option(
    "--bits",
    type=click.Choice([str(bits) for bits in options.PACK_BITS]),
    help="Fewer bits for experts: less exact",
)
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in options.PACK_GROUP_SIZES]),
    help="With --bits: weights that share a scale (64); more is smaller and less exact",
)
@click.option("--planes", is_flag=True, help="4-bit experts in two halves: one alone is 2-bit")
@click.option(
    "--calibrate",
    type=PATH,
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
    planes: bool,
    calibrate: Path | None,
) -> None:
    """Write a copy of a checkpoint whose experts are quick to read.

    Every expert becomes one aligned record. A pack that was interrupted goes on where it was when
    the same command is given again.
    """
    if group_size and not bits:
        raise click.UsageError("--group-size goes with --bits.")
    if planes and bits:
        raise click.UsageError("--planes keeps all 4 bits: it goes without --bits.")
    if calibrate and not (bits or planes):
        raise click.UsageError("--calibrate goes with --bits or --planes.")
    from flash_moe import Checkpoint, PackJob

    with as_click_errors():
        suffix = "-planes" if planes else f"-{bits}bit" if bits else ""
        source = source.expanduser().resolve()
        name = name or paths.default_name(source) + suffix
        registry = Registry.of_user()
        registry.require_free(name)
        target = paths.new_folder(name, to)
        job = PackJob.plan(
            source,
            target,
            experts=experts,
            bits=int(bits) if bits else None,
            group_size=int(group_size) if group_size else None,
            planes=planes,
            calibration=calibrate.expanduser() if calibrate else None,
        )
        if seconds := job.slow_seconds():
            click.echo(
                f"Warning: There is no C compiler, so MLX fits the experts: about "
                f"{_duration(seconds)}. With one, it is much faster. On Debian: apt install gcc; "
                "on macOS: xcode-select --install",
                err=True,
            )
        if job.calibration_tokens:
            with item_bar("Calibrating (tokens)", job.calibration_tokens) as progress:
                job = job.calibrate(progress)
            click.echo(_calibrated(job))
        given = {"name": name, "experts": experts, "to": to and to.expanduser().resolve()}
        given |= {"bits": bits, "group-size": group_size, "planes": planes}
        given |= {"calibrate": calibrate and calibrate.expanduser().resolve()}
        registry.begin(name, target, command("pack", source, given))
        with byte_bar(f"Packing {name}", job.nbytes) as progress:
            job.write(progress)
        registry.add(name, Entry(str(target), experts, managed=to is None))
        description = describe(name, Checkpoint(target))
    if job.cost and job.cost.nbytes:
        click.echo(_quantized(job))
    click.echo(description)
    click.echo(f'Ready: llm -m {name} "your prompt"')


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 1):.0f} min"


def _calibrated(job: PackJob) -> str:
    text = f"Calibrated with {job.calibration_tokens:,} tokens"
    if job.importance and job.importance.missed:
        missed, experts = job.importance.missed, job.importance.experts
        text += f", which missed {missed:,} of {experts:,} experts"
    return f"{text}."


def _quantized(job: PackJob) -> str:
    cost = job.cost
    assert cost is not None
    return (
        f"Quantized {size(cost.nbytes)} of experts ({job.how}) at "
        f"{cost.nbytes / cost.cpu_seconds / 1e9:.2g} GB/s a core, "
        f"{cost.nbytes / cost.seconds / 1e9:.2g} GB/s in all"
    )
