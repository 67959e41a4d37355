"""From trained weights to checkpoints: python -m training.export --data DATA --trained OUT --to FOLDER.

Writes FOLDER/bf16, as trained, and FOLDER/4bit, which is what the wheel ships: mlx-lm's own
conversion, groups of 64, routers at 8 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from mlx_lm import convert

from training.shape import CONFIG

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


def export(data: Path, trained: Path, to: Path) -> None:
    plain, small = to / "bf16", to / "4bit"
    for folder in (plain, small):
        shutil.rmtree(folder, ignore_errors=True)
    plain.mkdir(parents=True)
    shutil.copyfile(trained / "model.safetensors", plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", "utf-8")
    _copy(data, plain)
    convert(str(plain), str(small), quantize=True, q_group_size=64, q_bits=4)
    # The converter writes the tokenizer anew, in transformers' words, and a card and an index.
    for file in small.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    _copy(data, small)


def _copy(data: Path, folder: Path) -> None:
    for name in FILES:
        shutil.copyfile(data / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "trained", "to"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    export(given.data, given.trained, given.to)


if __name__ == "__main__":
    main()
