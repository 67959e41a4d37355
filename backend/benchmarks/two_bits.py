"""What fewer bits and fewer experts cost the built-in model: every way to them, in one table.

    python backend/benchmarks/two_bits.py FOLDER --calibration FILE [--limit 30] [--only NAME …]

Packs of `flash-moe-tiny` are written into FOLDER: those that `llm flash-moe pack` makes, and by
min/max and mx.quantize, to compare with. Then each way to run them is measured: the errors of
weights, of experts and of whole mixtures on the same inputs, and an evaluation against the model
as it comes. Results that are in FOLDER are not measured again. FILE is a text to calibrate with.
two_bits_picture.py draws the record.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from benchmarks.minmax import by_minmax
from benchmarks.two_bits_errors import errors
from flash_moe.built_in import BUILT_IN, NAME
from flash_moe.evaluation.evaluation import Evaluation
from flash_moe.format.layout import AFFINE, Quantization
from flash_moe.options import EVALUATION_SECTIONS, Settings
from flash_moe.pack.fewer_bits import FewerBits
from flash_moe.pack.job import PackJob
from flash_moe.pack.requantize import Matrix
from flash_moe.pack.transform import Arrays, Columns

SOURCE = BUILT_IN[NAME]


@dataclass(frozen=True)
class Way:
    """A pack, or the model as it comes, and the settings that it is run with."""

    title: str
    pack: str | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.pack or "4bit", *(f"{k}{v}" for k, v in self.settings.items())])


WAYS = [
    Way("4 bits", None),
    Way("2 bits, min/max", "minmax"),
    Way("2 bits, mx.quantize", "mxquantize"),
    Way("2 bits, fitted", "fit"),
    Way("2 bits, fitted and calibrated", "calibrated"),
    Way("first planes", "planes", {"full_experts": 0}),
    Way("planes, 2 of 10 in full", "planes", {"full_experts": 2}),
    Way("planes, 4 of 10 in full", "planes", {"full_experts": 4}),
    Way("3 bits, groups of 128", "three"),
    Way("4 bits, K=4", None, {"experts": 4}),
    Way("2 bits, calibrated, K=4", "calibrated", {"experts": 4}),
    Way("planes, K=4, 1 in full", "planes", {"experts": 4, "full_experts": 1}),
    Way("planes, K=4, 2 in full", "planes", {"experts": 4, "full_experts": 2}),
]


# Packs ------------------------------------------------------------------------------------------


def make_pack(name: str, folder: Path, calibration: Path) -> Path:
    target = folder / name
    if not target.exists():
        _plan(name, target, calibration).write()
    return target


def _plan(name: str, target: Path, calibration: Path) -> PackJob:
    if name == "minmax":
        return PackJob.with_transform(SOURCE, target, by_minmax(2))
    if name == "mxquantize":
        return PackJob.with_transform(SOURCE, target, FewerBits(2, 64, "mx.quantize", _by_mlx))
    if name == "three":
        return PackJob.plan(SOURCE, target, bits=3, group_size=128)
    if name == "planes":
        return PackJob.plan(SOURCE, target, planes=True)
    calibrated = calibration if name == "calibrated" else None
    return PackJob.plan(SOURCE, target, bits=2, calibration=calibrated)


def _by_mlx(
    arrays: Arrays,
    source: Quantization | None,
    bits: int,
    group_size: int,
    importance: Columns | None = None,
) -> Matrix:
    assert source is not None
    weight, scales, biases = (arrays[name] for name in AFFINE)
    weights = mx.dequantize(weight, scales, biases, source.group_size, source.bits)
    codes, scales, biases = mx.quantize(weights, group_size, bits)
    return codes, scales, biases


# Evaluation -------------------------------------------------------------------------------------


def evaluate(way: Way, path: Path, folder: Path, limit: int, constrained: bool) -> dict[str, Any]:
    """As `llm flash-moe eval --json` has it: everything, or with grammars JSON and calls."""
    suffix = "-constrained" if constrained else ""
    file, reference = folder / f"{way.name}{suffix}.json", folder / "reference.safetensors"
    own = way.name == "4bit"
    if not file.exists():
        with Evaluation(
            path,
            Settings(**way.settings),
            sections=("json", "tools") if constrained else EVALUATION_SECTIONS,
            limit=limit,
            constrained=constrained,
            save=reference if own and not constrained else None,
            against=None if own or constrained else reference,
            state_folder=folder / "evaluations",
        ) as evaluation:
            file.write_text(json.dumps(evaluation.run().to_json(), indent=2))
    result: dict[str, Any] = json.loads(file.read_bytes())
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--only", nargs="*", help="ways, by the names of their files")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    predicted, replied = [], []
    for way in WAYS:
        if options.only and way.name not in options.only:
            continue
        path = make_pack(way.pack, options.folder, options.calibration) if way.pack else SOURCE
        file = options.folder / f"{way.name}-errors.json"
        if not file.exists():
            file.write_text(json.dumps(errors(SOURCE, path, way.settings)))
        free = evaluate(way, path, options.folder, options.limit, constrained=False)
        held = evaluate(way, path, options.folder, options.limit, constrained=True)
        predicted.append([way.title, *predictions(json.loads(file.read_text()), free)])
        replied.append([way.title, *replies(free, held)])
        print(predicted[-1], replied[-1], file=sys.stderr, flush=True)
    show(PREDICTED, predicted)
    show(REPLIED, replied)


# Tables -----------------------------------------------------------------------------------------

PREDICTED = ["MB a token", "weights", "expert", "mixture", "perplexity of texts", "KL, texts"]
PREDICTED += ["same word", "KL, replies", "KL, JSON", "KL, calls"]
REPLIED = ["questions", "JSON valid", "fits", "equal", "calls parse", "arguments"]
REPLIED += ["held: fits", "equal", "arguments", "mass"]


def predictions(error: dict[str, Any], free: dict[str, Any]) -> list[str]:
    spans = free["against"]["spans"] if "against" in free else None
    names = ("texts", "replies", "json", "calls")
    kl = [f"{_at(spans, name, 'kl', 'value'):.4f}" if spans else "" for name in names]
    return [
        f"{error['bytes'] / 1e6:.2f}",
        *("" if (e := error[n]) is None else f"{e:.3f}" for n in ("weights", "expert", "mixture")),
        f"{free['text']['perplexity']:.1f}",
        kl[0],
        percent(spans, "texts", "agreement") if spans else "",
        *kl[1:],
    ]


def replies(free: dict[str, Any], held: dict[str, Any]) -> list[str]:
    return [
        percent(free, "questions", "right"),
        *(percent(free, "json", name) for name in ("valid", "schema", "equal")),
        *(percent(free, "tools", name) for name in ("parses", "arguments")),
        *(percent(held, "json", name) for name in ("schema", "equal")),
        percent(held, "tools", "arguments"),
        f"{_at(held, 'allowed_mass', 'p1', 'value'):.3f}",
    ]


def show(columns: list[str], rows: list[list[str]]) -> None:
    print(f"| | {' | '.join(columns)} |\n|---{'|--:' * len(columns)}|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows), end="\n\n")


def percent(value: Any, *path: str) -> str:
    return f"{100 * _at(value, *path, 'share'):.1f} %"


def _at(value: Any, *path: str) -> Any:
    for key in path:
        value = value[key]
    return value


if __name__ == "__main__":
    main()
