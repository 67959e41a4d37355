"""What fewer bits and fewer experts cost the built-in model: every way to make them, in one table.

    python backend/benchmarks/two_bits.py FOLDER --calibration FILE [--limit 30] [--only NAME …]

Packs of `flash-moe-tiny` are written into FOLDER by the ways that `llm flash-moe pack` has, and by
mx.quantize, to compare with. Then, for each way to run them: the error of weights, of experts and
of whole mixtures on the same inputs, and `llm flash-moe eval` against the model as it comes. What
is found in FOLDER is not measured again. FILE is a text to calibrate with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.chart import COLOURS, Chart, round_numbers
from flash_moe.built_in import HELD_OUT, MODELS, NAME
from flash_moe.checkpoint.folder import open_folder
from flash_moe.engine import Engine
from flash_moe.evaluation.held_out import read_held_out
from flash_moe.format.layout import RESTS, Quantization
from flash_moe.model.load import Settings
from flash_moe.model.mixture import StreamedMixture
from flash_moe.pack.calibrate import read_calibration
from flash_moe.pack.job import plan_pack
from flash_moe.pack.recast import Arrays, Recast
from flash_moe.pack.requantize import make_recast
from flash_moe.pack.split_planes import make_planes

SOURCE = MODELS[NAME]
TOKENS = 2048


@dataclass(frozen=True)
class Way:
    """A pack, and how it is run."""

    title: str
    pack: str | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "-".join([self.pack or "4bit", *(f"{k}{v}" for k, v in self.options.items())])


WAYS = [
    Way("4 bits", None),
    Way("2 bits, min/max", "minmax"),
    Way("2 bits, mx.quantize", "mxquantize"),
    Way("2 bits, fitted", "fit"),
    Way("2 bits, fitted and calibrated", "calibrated"),
    Way("first planes", "planes", {"whole": 0}),
    Way("planes, 2 of 10 whole", "planes", {"whole": 2}),
    Way("planes, 4 of 10 whole", "planes", {"whole": 4}),
    Way("3 bits, groups of 128", "three"),
    Way("4 bits, K=4", None, {"experts": 4}),
    Way("2 bits, min/max, K=4 renorm.", "minmax", {"experts": 4, "weights": "renormalise"}),
    Way("2 bits, calibrated, K=4", "calibrated", {"experts": 4}),
    Way("planes, K=4, 1 whole", "planes", {"experts": 4, "whole": 1}),
    Way("planes, K=4, 2 whole", "planes", {"experts": 4, "whole": 2}),
]


# Packs ------------------------------------------------------------------------------------------


def make_pack(name: str, folder: Path, calibration: Path) -> Path:
    target = folder / name
    if target.exists():
        return target
    text = read_calibration(SOURCE, calibration) if name == "calibrated" else None
    change: Any = {
        "minmax": lambda: make_recast(2, method="minmax"),
        "mxquantize": lambda: Recast(2, 64, "mx.quantize", _by_mlx),
        "fit": lambda: make_recast(2),
        "calibrated": lambda: make_recast(2, calibration=text.digest if text else None),
        "planes": make_planes,
        "three": lambda: make_recast(3, 128),
    }[name]()
    job = plan_pack(open_folder(SOURCE), target, recast=change)
    if text is not None:
        job = job.weighed(text.collect)
    job.write()
    return target


def _by_mlx(
    arrays: Arrays, source: Quantization | None, bits: int, group_size: int, *, importance: object
) -> tuple[mx.array, mx.array, mx.array]:
    assert source is not None
    weights = mx.dequantize(*arrays.values(), group_size=source.group_size, bits=source.bits)
    codes, scales, biases = mx.quantize(weights, group_size, bits)
    return codes, scales, biases


# Errors -----------------------------------------------------------------------------------------


def errors(path: Path, options: dict[str, Any]) -> dict[str, float | None]:
    """Root mean squares, relative to the model as it comes, on what that computes."""
    # One plane or both changes from expert to expert, so weights have no error of their own then.
    plain = not options.get("whole")
    engine = Engine.load(path, Settings(**options), prefix=None)
    found = np.zeros((3, 2))
    for (x, ids, outputs, mixed), mixture in zip(inputs(), mixtures(engine), strict=True):
        rank = np.arange(ids.shape[1])
        whole = np.broadcast_to(rank < options["whole"], ids.shape) if "whole" in options else None
        made = np.array(mixture.switch_mlp(x, mx.array(ids), whole).astype(mx.float32))
        found[0] += _squares(made, outputs)
        found[1] += _squares(_routed(mixture, x), mixed)
    if plain:
        for ours, theirs in zip(weights(engine), weights(None), strict=True):
            found[2] += _squares(ours, theirs)
    bytes_read = _bytes_read(engine, options)
    engine.close()
    expert, mixture, matrices = np.sqrt(found[:, 0] / np.maximum(found[:, 1], 1e-300))
    return {
        "bytes": bytes_read,
        "weights": matrices if plain else None,
        "expert": expert,
        "mixture": mixture,
    }


def _bytes_read(engine: Engine, options: dict[str, Any]) -> int:
    """A token, without the ends of pages, which the records of this small model fill half."""
    k, total = engine.model.plan.experts_per_token, 0
    whole = min(options.get("whole", k), k)
    for layer in engine.model.streamer.store.layers:
        parts = layer.layout.parts
        first = sum(p.nbytes for p in parts if not (layer.layout.planes and p.param in RESTS))
        total += k * first + whole * (sum(p.nbytes for p in parts) - first)
    return total


@cache
def inputs() -> list[tuple[mx.array, Any, Any, Any]]:
    """Of each layer of the model as it comes, reading held-out text: what goes in, which experts
    are chosen, what each of them makes of it, and their sum."""
    engine = Engine.load(SOURCE, Settings(), prefix=None)
    ids: list[int] = []
    for text in read_held_out(HELD_OUT, ("text",), None).texts:
        ids += engine.tokenizer.encode(text.text)[:128]
    seen: list[mx.array] = []
    own = StreamedMixture.__call__

    def watched(self: StreamedMixture, x: mx.array) -> mx.array:
        seen.append(x.reshape(-1, x.shape[-1]))
        return own(self, x)

    StreamedMixture.__call__ = watched  # type: ignore[method-assign]
    mx.eval(engine.model(mx.array(ids[:TOKENS])[None], cache=engine.model.make_cache()))
    StreamedMixture.__call__ = own  # type: ignore[method-assign]
    found = []
    for x, mixture in zip(seen, mixtures(engine), strict=True):
        odds = np.array(mixture.gate(x).astype(mx.float32))
        chosen = np.argsort(-odds, axis=1)[:, : engine.model.plan.experts_per_token]
        made = np.array(mixture.switch_mlp(x, mx.array(chosen)).astype(mx.float32))
        found.append((x, chosen, made, _routed(mixture, x)))
    engine.close()
    return found


def mixtures(engine: Engine) -> list[Any]:
    return [m for _, m in engine.model.model.named_modules() if isinstance(m, StreamedMixture)]


def _routed(mixture: Any, x: mx.array) -> Any:
    """Of a mixture, what its routed experts make together."""
    shared = mx.sigmoid(mixture.shared_expert_gate(x)) * mixture.shared_expert(x)
    return np.array((mixture(x) - shared).astype(mx.float32))


def weights(engine: Engine | None) -> Iterator[Any]:
    """All expert matrices, one after the other; of the model as it comes for None."""
    own = engine or Engine.load(SOURCE, Settings(), prefix=None)
    streamer = own.model.streamer
    for number, layer in enumerate(streamer.store.layers):
        for expert in range(layer.experts):
            arrays = streamer.load(number, [expert]).arrays(layer.layout)
            for name, packing in layer.layout.quantization:
                codes, scales, biases = (
                    arrays[f"{name}.{part}"][0] for part in ("weight", "scales", "biases")
                )
                assert packing is not None
                bits = 2 if layer.layout.planes else packing.bits
                wide = (part.astype(mx.float32) for part in (scales, biases))
                yield np.array(mx.dequantize(codes, *wide, packing.group_size, bits))
    if engine is None:
        own.close()


def _squares(got: Any, right: Any) -> Any:
    wide = right.astype(np.float64)
    return np.array([((got - wide) ** 2).sum(), (wide**2).sum()])


# Evaluation -------------------------------------------------------------------------------------


def evaluate(way: Way, path: Path, folder: Path, limit: int, constrained: bool) -> dict[str, Any]:
    suffix = "-constrained" if constrained else ""
    file, reference = folder / f"{way.name}{suffix}.json", folder / "reference.safetensors"
    if not file.exists():
        command = ["llm", "flash-moe", "eval", str(path), "--limit", str(limit), "--json"]
        for key, value in way.options.items():
            command += ["-o", key, str(value)]
        if constrained:
            command += ["--constrained", "--only", "json", "--only", "tools"]
        elif way.name == "4bit":
            command += ["--save", str(reference)]
        else:
            command += ["--against", str(reference)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        file.write_bytes(done.stdout)
    found: dict[str, Any] = json.loads(file.read_bytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=30)
    parser.add_argument("--only", nargs="*", help="ways, by the names of their files")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    foreseen, replied = [], []
    for way in WAYS:
        if options.only and way.name not in options.only:
            continue
        path = make_pack(way.pack, options.folder, options.calibration) if way.pack else SOURCE
        kept = options.folder / f"{way.name}-errors.json"
        if not kept.exists():
            kept.write_text(json.dumps(errors(path, way.options)))
        free = evaluate(way, path, options.folder, options.limit, constrained=False)
        held = evaluate(way, path, options.folder, options.limit, constrained=True)
        foreseen.append([way.title, *foresight(json.loads(kept.read_text()), free)])
        replied.append([way.title, *replies(free, held)])
        print(foreseen[-1], replied[-1], file=sys.stderr, flush=True)
    show(FORESEEN, foreseen)
    show(REPLIED, replied)
    if not options.only:
        draw(options.folder)


FORESEEN = ["MB a token", "weights", "expert", "mixture", "perplexity of texts", "KL, texts"]
FORESEEN += ["same word", "KL, replies", "KL, JSON", "KL, calls"]
REPLIED = ["questions", "JSON valid", "fits", "equal", "calls parse", "arguments"]
REPLIED += ["held: fits", "equal", "arguments", "mass"]


def foresight(error: dict[str, Any], free: dict[str, Any]) -> list[str]:
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


def draw(folder: Path) -> None:
    """Without the ends of pages, which `llm flash-moe plot` would count."""
    dots = []
    for way in WAYS:
        nbytes = json.loads((folder / f"{way.name}-errors.json").read_text())["bytes"]
        right = json.loads((folder / f"{way.name}.json").read_text())["questions"]["right"]
        dots.append((nbytes / 1e6, 100 * right["share"], 100 * right["standard_error"], way.title))
    chart = Chart(
        "questions answered right, %, over MB of experts read a token", (0, 4.5), (0, 100)
    )
    chart.ticks(round_numbers(0, 4.5), round_numbers(0, 100))
    for number, (x, y, error, title) in enumerate(sorted(dots)):
        if title in CROWDED:
            continue
        chart.dot(x, y, error, title, COLOURS[number % len(COLOURS)])
    chart.write(folder / "two-bits.svg")


# Next to others in the picture.
CROWDED = ("2 bits, mx.quantize", "2 bits, fitted and calibrated")


def percent(found: Any, *path: str) -> str:
    return f"{100 * _at(found, *path, 'share'):.1f} %"


def _at(found: Any, *path: str) -> Any:
    for key in path:
        found = found[key]
    return found


if __name__ == "__main__":
    main()
