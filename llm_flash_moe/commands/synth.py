"""`llm flash-moe synth`: a model of random weights. Hidden: it is for measurements."""

from __future__ import annotations

from pathlib import Path

import click

from llm_flash_moe import paths
from llm_flash_moe.commands.arguments import TO
from llm_flash_moe.errors import as_click_errors
from llm_flash_moe.progress import byte_bar
from llm_flash_moe.registry import Entry, Registry


@click.command(hidden=True)
@click.option("--name", default="flash-moe-demo", show_default=True, help="Name for llm -m")
@click.option(
    "--shape",
    type=click.Choice(["small", "397b"]),
    default="small",
    show_default=True,
    help="Widths: of a demo, or of Qwen3.5-397B-A17B",
)
@click.option("--layers", type=click.IntRange(4), help="Layers, instead of the shape's")
@click.option(
    "--experts", type=click.IntRange(1), help="Experts in each layer, instead of the shape's"
)
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "6", "8"]),
    default="4",
    show_default=True,
    help="Bits of a weight",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed, other weights")
@TO
def synth(
    name: str,
    shape: str,
    layers: int | None,
    experts: int | None,
    bits: str,
    seed: int,
    to: Path | None,
) -> None:
    """Make a model of random weights, to try things out and to measure.

    It has the architecture of Qwen3.5-MoE and answers with noise. The shape 397b has the true
    widths; with 15 layers at 2 bits it takes 32 GB.
    """
    from flash_moe import SynthJob

    with as_click_errors():
        registry = Registry.of_user()
        registry.require_free(name)
        target = paths.new_folder(name, to)
        job = SynthJob.plan(shape, layers=layers, experts=experts, bits=int(bits), seed=seed)
        with byte_bar(f"Writing {name}", job.nbytes) as progress:
            job.write(target, progress)
        registry.add(name, Entry(str(target), managed=to is None))
    click.echo(f"Made {name}, a model of random weights: its replies are noise.")
