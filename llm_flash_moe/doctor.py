"""`llm flash-moe doctor`: what computes the experts here, why, and what would be faster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from llm_flash_moe import places
from llm_flash_moe.errors import PluginError, shown

if TYPE_CHECKING:
    from flash_moe.measure.doctor import Diagnosis
    from llm_flash_moe.registry import Entry

RUNTIMES = {
    "metal": "our own kernels on the GPU of this Mac",
    "cuda": "our own kernels on the NVIDIA GPU",
    "native": "our own kernels in C, compiled for this CPU",
    "mlx": "MLX's own operations, on the CPU",
    None: "nothing can: models do not run",
}
NOTHING_FASTER = {
    True: "no, this is the fastest",
    False: "no: only a GPU would be, NVIDIA's or that of a Mac with Apple Silicon",
}
# Not asked for, so it is said.
ROUNDING = "mlx-lm's, but for rounding"
# On a GPU groups of experts may round otherwise: 7e-6 of logits up to 16 on an H200.
EXACT = "; with -o runtime mlx they are equal to the bit, and slower"
WIDE = (
    "weights of 16 bits are computed with in float32: on a CPU, MLX takes 9 times as long for "
    "bfloat16"
)


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON")
def doctor(name: str | None, as_json: bool) -> None:
    """Show what computes the experts here, why, and what would be faster.

    With the NAME of a model, also which of its layers our kernels compute. Fails if something is
    broken; that something could be faster is no failure.
    """
    from flash_moe.measure.doctor import diagnose

    with shown():
        entry = places.registry().get(name) if name else None
        found = diagnose()
        left = _left_to_mlx(name, entry) if name and entry and found.runtime else None
    if as_json:
        model = {} if left is None else {"model": name, "layers": left}
        click.echo(json.dumps({**found.to_json(), **model}, indent=2))
    else:
        _print(_lines(found))
        if left is not None:
            _print({"Layers": _layers(left, found.runtime)})
    if found.broken:
        raise PluginError(" ".join(found.broken))


def _left_to_mlx(name: str, entry: Entry) -> dict[str, str | None]:
    """Why a layer is left to MLX, or None, for each."""
    from flash_moe.checkpoint.folder import open_folder
    from flash_moe.checkpoint.skeleton import open_skeleton
    from flash_moe.measure.coverage import left_to_mlx

    return left_to_mlx(open_skeleton(open_folder(places.folder(name, entry))))


def _lines(found: Diagnosis) -> dict[str, list[str]]:
    """What a row is called, and its lines."""
    machine, native, gpu = found.machine, found.native, found.device == "GPU"
    runtime = f"{found.runtime}: " if found.runtime else ""
    rows = {
        "Experts": [f"{runtime}{RUNTIMES[found.runtime]}"],
        "Why": [found.why if gpu or not found.runtime else f"MLX has no GPU here; {found.why}"],
        "Faster": list(found.faster or found.broken or [NOTHING_FASTER[gpu]]),
        "Results": [ROUNDING if gpu else ROUNDING + EXACT],
        "16 bits": [WIDE] if found.widen else [],
        "MLX": [f"{found.mlx}, on the {found.device}{_wheel(found)}"],
        "CPU": [f"{machine.cpu}, {machine.cores} cores"],
        "Kernels": [f"compiled once, kept in {native.file}"] if native and native.kept else [],
        "Memory": [f"{machine.memory_bytes / 1e9:.1f} GB"],
    }
    if machine.page_cache_bytes is not None:
        rows["Memory"] = [
            f"{rows['Memory'][0]}; {machine.page_cache_bytes / 1e9:.1f} GB of it can keep experts "
            "that were read (page cache)"
        ]
    if not found.runtime:
        del rows["Faster"], rows["Results"], rows["MLX"]
    return rows


def _wheel(found: Diagnosis) -> str:
    return f" ({found.backends.active})" if found.backends.active else ""


def _layers(left: dict[str, str | None], runtime: str | None) -> list[str]:
    """Layers that are left to MLX for one reason are told together."""
    reasons: dict[str, list[str]] = {}
    for path, reason in left.items():
        if reason:
            reasons.setdefault(reason, []).append(path)
    covered = sum(reason is None for reason in left.values())
    would = " would be" if runtime == "mlx" else ""
    lines = [f"{covered} of {len(left)}{would} computed by our kernels"]
    for reason, paths in reasons.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"left to MLX: {paths[0]}{more}: {reason}")
    return lines


def _print(rows: dict[str, Any]) -> None:
    for name, lines in rows.items():
        # Compilers' messages have several lines.
        for number, line in enumerate(part for text in lines for part in text.split("\n")):
            click.echo(f"{'' if number else name:<9}{line}")
