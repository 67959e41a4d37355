"""`llm flash-moe …`: bring models in, look at them, remove them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from flash_moe.built_in import MODELS
from llm_flash_moe import places
from llm_flash_moe.cache import cache
from llm_flash_moe.describe import describe, plan_of
from llm_flash_moe.doctor import doctor
from llm_flash_moe.errors import PluginError, shown
from llm_flash_moe.evaluate import evaluate
from llm_flash_moe.packing import pack
from llm_flash_moe.plot import plot
from llm_flash_moe.progress import byte_bar
from llm_flash_moe.registry import Entry

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON")
FOLDER = click.Path(path_type=Path)


@click.group(name="flash-moe")
def flash_moe() -> None:
    """Run Mixture-of-Experts models that are bigger than memory."""


flash_moe.add_command(cache)
flash_moe.add_command(doctor)
flash_moe.add_command(evaluate)
flash_moe.add_command(pack)
flash_moe.add_command(plot)


@flash_moe.command()
@click.argument("path", type=FOLDER)
@click.option("--name", help="Name for llm -m; the folder's name if left out")
@click.option("--experts", type=click.IntRange(1), help="Experts a token uses, if not the model's")
def add(path: Path, name: str | None, experts: int | None) -> None:
    """Use a checkpoint folder or a pack where it is, without a copy.

    PATH is a folder with config.json and model*.safetensors, as downloaded, or one that
    `llm flash-moe pack` wrote.
    """
    from flash_moe.chat.tokenizer import load_tokenizer

    with shown():
        path, name = path.expanduser().resolve(), name or places.default_name(path)
        places.registry().require_free(name)
        plan = plan_of(path, experts)
        load_tokenizer(path)
        places.registry().add(name, Entry(str(path), experts))
    click.echo(describe(name, plan))
    click.echo(f'Ready: llm -m {name} "your prompt"')


@flash_moe.command()
@AS_JSON
def models(as_json: bool) -> None:
    """List the models: built in, added, packed or made here."""
    from flash_moe.format.manifest import requantized

    with shown():
        entries = places.registry().entries()
    if as_json:
        click.echo(json.dumps({name: _listed(e) for name, e in entries.items()}, indent=2))
        return
    for name, entry in entries.items():
        lossy = f"  ({entry.experts} experts a token)" if entry.experts else ""
        lossy += "  (built in)" if name in MODELS else ""
        if made := requantized(Path(entry.path)):
            lossy += f"  ({made})"
        missing = "" if Path(entry.path).is_dir() else "  (the folder is gone)"
        click.echo(f"{name}  {entry.path}{lossy}{missing}")
    if not entries.keys() - MODELS.keys():
        click.echo("Use a checkpoint of your own with: llm flash-moe add PATH")


def _listed(entry: Entry) -> dict[str, Any]:
    from flash_moe.format.manifest import requantized

    made = requantized(Path(entry.path))
    changed = {"requantized": asdict(made)} if made else {}
    return {"path": entry.path, "experts": entry.experts, **changed}


@flash_moe.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Read a pack against its checksums")
@AS_JSON
def info(name: str, verify: bool, as_json: bool) -> None:
    """Show what a model is and what it needs, without loading it."""
    with shown():
        entry = places.registry().get(name)
        folder = places.folder(name, entry)
        plan = plan_of(folder, entry.experts)
        faults = _faults(folder) if verify else None
    if as_json:
        checked = {} if faults is None else {"faults": faults}
        found = {"name": name, "path": entry.path, **plan.to_json(), **checked}
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(describe(name, plan))
        click.echo(f"Folder: {entry.path}")
        for fault in faults or ():
            click.echo(fault, err=True)
        if faults == []:
            click.echo("Every file and record is as it was written.")
    if faults:
        raise PluginError("The pack is damaged. Remove it and pack the model again.")


@flash_moe.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask before deleting files")
def remove(name: str, yes: bool) -> None:
    """Forget a model. Files are deleted only if they were made here."""
    with shown():
        registry = places.registry()
        entry = registry.get(name)
        ours = entry.managed and Path(entry.path).is_dir()
        if ours and not yes:
            click.confirm(f"Delete {entry.path} as well?", abort=True)
        if ours:
            # Before it is forgotten: what is left of it after a failure can be removed again.
            shutil.rmtree(entry.path)
        registry.remove(name)
    kept = f"; its files stay in {entry.path}" if Path(entry.path).is_dir() else ""
    click.echo(f"Removed {name}{kept}.")


@flash_moe.command()
@click.argument("name", required=False)
def path(name: str | None) -> None:
    """Print the folder of a model, or the folder where everything is kept."""
    with shown():
        click.echo(places.registry().get(name).path if name else places.home())


@flash_moe.command()
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
@click.option("--to", type=FOLDER, help="Folder to write the model into, instead of llm's own")
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
    from flash_moe.synth.model import SHAPES, nbytes, synthesize

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


def _faults(path: Path) -> list[str]:
    from flash_moe.checkpoint.folder import open_folder
    from flash_moe.format.manifest import verify

    folder = open_folder(path)
    if folder.manifest is None:
        raise PluginError("Only packs carry checksums; this model is used as downloaded.")
    with byte_bar("Verifying", folder.nbytes) as progress:
        return verify(path, folder.manifest, progress)
