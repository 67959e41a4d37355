"""`llm flash-moe synth`: a model of random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from flash_moe.checkpoint.registry import Entry
from llm_flash_moe import places
from llm_flash_moe.errors import shown
from llm_flash_moe.progress import byte_bar


@click.command()
@click.option("--name", default="flash-moe-demo", show_default=True, help="Name for llm -m")
@click.option(
    "--shape",
    type=click.Choice(["small", "397b"]),
    default="small",
    show_default=True,
    help="Widths: of a demo, or of Qwen3.5-397B-A17B",
)
@click.option("--layers", type=click.IntRange(4), help="Layers, instead of the shape's")
@click.option("--experts", type=click.IntRange(1), help="Experts a layer, instead of the shape's")
@click.option(
    "--bits",
    type=click.Choice(["2", "3", "4", "6", "8"]),
    default="4",
    show_default=True,
    help="Bits of a weight",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Another seed, other weights")
@click.option(
    "--to",
    type=click.Path(path_type=Path),
    help="Folder to write the model into, instead of llm's own",
)
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
    from flash_moe.checkpoint.synth import SHAPES, nbytes, synthesize

    with shown():
        registry = places.registry()
        registry.require_free(name)
        chosen = {"layers": layers, "experts": experts}
        made = replace(SHAPES[shape], **{key: n for key, n in chosen.items() if n is not None})
        kind: dict[str, Any] = {
            "bits": int(bits),
            "dtype": "float32" if shape == "small" else "bfloat16",
        }
        # A token cannot use more experts than there are.
        made = replace(made, experts_per_token=min(made.experts_per_token, made.experts))
        target = places.new_folder(name, to)
        with byte_bar(f"Writing {name}", nbytes(made, **kind)) as progress:
            synthesize(target, made, seed=seed, progress=progress, **kind)
        registry.add(name, Entry(str(target), managed=to is None))
    click.echo(f"Made {name}, a model of random weights: its replies are noise.")
