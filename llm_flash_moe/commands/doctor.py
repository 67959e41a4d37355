"""`llm flash-moe doctor`: what computes the experts here, why, and what would be faster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from llm_flash_moe.commands.arguments import AS_JSON
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.registry import Registry, folder_of

if TYPE_CHECKING:
    from flash_moe import Diagnosis

RUNTIMES = {
    "metal": "our own kernels on the GPU of this Mac",
    "cuda": "our own kernels on the NVIDIA GPU",
    "native": "our own kernels in C for this CPU",
    "mlx": "MLX's own operations, on the CPU",
    None: "nothing can: models do not run",
}
READERS = {
    "native": "our own threads in C",
    "Python": "Python's threads: from the page cache, those in C would be 1.4 to 1.9 times as fast",
}
NOTHING_FASTER = {
    True: "no, this is the fastest",
    False: "no: only a GPU would be, NVIDIA's or that of a Mac with Apple Silicon",
}
ROUNDING = "mlx-lm's, up to rounding"
# On a GPU groups of experts may round otherwise: 7e-6 of logits up to 16 on an H200.
EXACT = "; -o runtime mlx gives them bit for bit, and is slower"
WIDE = "16-bit weights are computed in float32: on a CPU, MLX takes 9 times as long for bfloat16"


@click.command()
@click.argument("name", required=False)
@AS_JSON
def doctor(name: str | None, as_json: bool) -> None:
    """Show what computes the experts here, why, and what would be faster.

    With the NAME of a model, also which of its layers our kernels compute, and what its disk gives.
    Fails if something is broken. Slow is not a failure.
    """
    from flash_moe import Diagnosis

    with as_click_errors():
        entry = Registry.of_user().get(name) if name else None
        diagnosis = Diagnosis.of_machine()
        layers = disk = None
        if name and entry and diagnosis.runtime:
            folder = folder_of(name, entry)
            layers, disk = diagnosis.left_to_mlx(folder), diagnosis.disk(folder, entry.experts)
    if as_json:
        model = {"model": name, "layers": layers, "disk": asdict(disk)} if disk else {}
        click.echo(json.dumps({**diagnosis.to_json(), **model}, indent=2))
    else:
        _print(_rows(diagnosis))
        if layers is not None and disk is not None:
            speed = _disk(disk.rate, disk.tokens_per_second)
            _print({"Layers": _layers(layers, diagnosis.runtime), "Disk": [speed]})
    if diagnosis.broken:
        raise PluginError(" ".join(diagnosis.broken))


def _rows(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """A row's title, and its lines."""
    machine, gpu = diagnosis.machine, diagnosis.device == "GPU"
    runtime, backend = diagnosis.runtime, diagnosis.backends.active
    why = diagnosis.why if gpu or not runtime else f"MLX has no GPU here; {diagnosis.why}"
    mlx = f"{diagnosis.mlx}, on the {diagnosis.device}" + (f" ({backend})" if backend else "")
    memory = f"{machine.memory_bytes / 1e9:.1f} GB"
    if machine.page_cache_bytes is not None:
        memory += (
            f"; {machine.page_cache_bytes / 1e9:.1f} GB of it can hold experts that were read "
            "(page cache)"
        )
    rows = {
        "Experts": [(f"{runtime}: " if runtime else "") + RUNTIMES[runtime]],
        "Why": [why],
        "Faster": list(diagnosis.faster or diagnosis.broken or [NOTHING_FASTER[gpu]]),
        "Results": [ROUNDING if gpu else ROUNDING + EXACT],
        "16 bits": [WIDE] if diagnosis.widen else [],
        "MLX": [mlx],
        "Reading": [READERS.get(diagnosis.reader, "")],
        "CPU": [f"{machine.cpu}, {machine.cores} cores"],
        "Kernels": _kernels(diagnosis),
        "Memory": [memory],
    }
    if not runtime:
        for title in ("Faster", "Results", "MLX", "Reading"):
            del rows[title]
    return rows


def _kernels(diagnosis: Diagnosis) -> list[str]:
    native = diagnosis.native
    if native is None or not native.kept:
        return []
    origin = "compiled once, cached in" if native.compiler else "they came with the package:"
    return [f"{origin} {native.file}"]


def _layers(layers: Mapping[str, str | None], runtime: str | None) -> list[str]:
    """Layers that are left to MLX for the same reason share a line."""
    reasons: dict[str, list[str]] = {}
    for path, reason in layers.items():
        if reason:
            reasons.setdefault(reason, []).append(path)
    covered = sum(reason is None for reason in layers.values())
    would = " would be" if runtime == "mlx" else ""
    lines = [f"{covered} of {len(layers)}{would} computed by our kernels"]
    for reason, paths in reasons.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        lines.append(f"left to MLX: {paths[0]}{more}: {reason}")
    return lines


def _disk(rate: float | None, tokens_per_second: float | None) -> str:
    if rate is None or tokens_per_second is None:
        return "not measured: this file system has no reads past the page cache"
    return (
        f"{rate / 1e9:.2f} GB/s for experts of this model: {tokens_per_second:.1f} tokens/s at "
        "most, with nothing cached"
    )


def _print(rows: Mapping[str, Sequence[str]]) -> None:
    for title, texts in rows.items():
        # Compilers' messages have several lines.
        for number, line in enumerate(part for text in texts for part in text.split("\n")):
            click.echo(f"{'' if number else title:<9}{line}")
