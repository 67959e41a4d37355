"""Checkpoints to pull, and what their packs must be."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from flash_moe.format.safetensors import make_header, read_headers
from flash_moe.synth.model import Shape, synthesize

SMALL = Shape(layers=4, experts=6, experts_per_token=2, hidden=128, intermediate=128)


def shuffled_checkpoint(
    folder: Path, shape: Shape = SMALL, shards: int = 4, seed: int = 0, **options: Any
) -> Path:
    """Random weights, their tensors dealt to shards in order, as mlx-lm deals them, and within a
    shard in no order, as MLX writes them. A triple may lie across shards."""
    synthesize(folder, shape, **options)
    dice = random.Random(seed)
    tensors = list(read_headers(sorted(folder.glob("model*.safetensors"))).values())
    files = {tensor.file for tensor in tensors}
    total = sum(tensor.nbytes for tensor in tensors)
    groups: list[list[Any]] = [[] for _ in range(shards)]
    done = 0
    for tensor in tensors:
        groups[min(shards - 1, done * shards // total)].append(tensor)
        done += tensor.nbytes
    weight_map = {}
    for number, group in enumerate(groups, 1):
        dice.shuffle(group)
        name = f"model-{number:05}-of-{shards:05}.safetensors"
        with (folder / f"{name}.new").open("wb") as file:
            file.write(make_header([(t.name, t.dtype, t.shape, t.nbytes) for t in group]))
            for tensor in group:
                with tensor.file.open("rb") as old:
                    old.seek(tensor.offset)
                    file.write(old.read(tensor.nbytes))
                weight_map[tensor.name] = name
    for old_file in files:
        old_file.unlink()
    for new in folder.glob("*.new"):
        new.rename(new.with_suffix(""))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# Not needed\n")
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')\n")
    return folder
