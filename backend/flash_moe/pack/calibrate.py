"""How much errors in the columns of expert matrices weigh: what a model multiplies them with when
it reads a text.

A text is read in windows, each from nothing and in one chunk, so that each reads the experts once.
What was found so far is kept beside the half-made pack, and an interrupted reading goes on with it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.checkpoint.folder import open_folder
from flash_moe.checkpoint.skeleton import open_skeleton
from flash_moe.errors import CheckpointError, NotContiguous, OptionError
from flash_moe.evaluation.held_out import is_message, parse_lines, read_text
from flash_moe.evaluation.likelihood import WINDOW
from flash_moe.format.atomic import replacing
from flash_moe.model.load import load
from flash_moe.pack.activations import LAST, Activations, LayerSums
from flash_moe.pack.recast import Columns

# Less says nothing of most experts.
LEAST_TOKENS = 1000
# Rows that count beside an expert's own, all columns alike in them: what few rows say is noise in
# part. Two bits put flash-moe-tiny's last matrices off by 0.313 unweighed, by 0.291 weighed by 80
# rows an expert, and by 0.288 with these beside them. The mean over a layer says little of one of
# its experts: 0.310 (backend/benchmarks/calibration.md).
LEVEL_ROWS = 50
# Windows between two savings. Of the 397B, 0.25 GB are written and 1.7 TB read meanwhile.
SAVED_EVERY = 8
KEPT = "calibration.npz"
INSTEAD = "Correct the line, or leave it out."


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text as tokens of a model; `digest` tells it from any other."""

    source: Path
    digest: str
    ids: list[int]

    def collect(
        self, state: Path, progress: Callable[[int], None] = lambda tokens: None, **how: Any
    ) -> Measured:
        """Read the text with the model, or what of it was not read yet."""
        activations, start = _kept(state / KEPT)
        progress(start)
        if start < len(self.ids):
            self._read(activations, start, state / KEPT, progress, **how)
        sums = activations.layers.values()
        if not all(np.isfinite(s.inputs).all() and np.isfinite(s.inner).all() for s in sums):
            raise CheckpointError(
                "The model computes numbers that are not finite when it reads this text, which "
                f"weigh nothing. Remove {state} and leave out --calibrate."
            )
        return Measured(activations.layers)

    def _read(
        self,
        activations: Activations,
        start: int,
        kept: Path,
        progress: Callable[[int], None],
        window: int = WINDOW,
        chunk: int = WINDOW,
        saved_every: int = SAVED_EVERY,
    ) -> None:
        model = load(self.source)
        try:
            for at in range(start, len(self.ids), window):
                end, cache = min(at + window, len(self.ids)), model.make_cache()
                with activations.watching(model.streamer):
                    for first in range(at, end, chunk):
                        tokens = self.ids[first : min(first + chunk, end)]
                        model.advance(mx.array(tokens)[None], cache)
                mx.clear_cache()
                if end == len(self.ids) or end // window % saved_every == 0:
                    _keep(kept, activations, end)
                progress(end - at)
        finally:
            model.close()


@dataclass(frozen=True, slots=True)
class Measured:
    """The mean square of what each column is multiplied with, as importance."""

    layers: dict[str, LayerSums]

    def of(self, path: str, projection: str, expert: int) -> Columns | None:
        sums = self.layers.get(path)
        if sums is None:
            return None
        if projection not in LAST:
            return (sums.inputs / sums.rows).astype(np.float32)
        rows, inner = int(sums.routed[expert]), sums.inner[expert]
        if not rows:
            return None
        level = LEVEL_ROWS / rows * inner.mean()
        columns: Columns = ((inner + level) / (rows + LEVEL_ROWS)).astype(np.float32)
        return columns

    @property
    def unreached(self) -> int:
        """Experts that were given nothing."""
        return sum(int((sums.routed == 0).sum()) for sums in self.layers.values())

    @property
    def experts(self) -> int:
        return sum(len(sums.routed) for sums in self.layers.values())


def read_calibration(source: Path, file: Path) -> Calibration:
    """Everything that can be checked before the model is loaded."""
    tokenizer = load_tokenizer(source)
    text = read_text(file, "Give another file with --calibrate.")
    ids = [token for document in _documents(file, text, tokenizer) for token in document]
    if len(ids) < LEAST_TOKENS:
        raise OptionError(
            f"{file} has {len(ids):,} tokens, which reach too few of the experts: give a text of "
            f"{LEAST_TOKENS:,} tokens at least, better of 100,000, with --calibrate."
        )
    _require_streamable(source)
    return Calibration(source, hashlib.sha256(text.encode()).hexdigest(), ids)


def _documents(file: Path, text: str, tokenizer: ChatTokenizer) -> list[list[int]]:
    """One after the other they are cut into windows: a reading of all the experts for each short
    dialogue would take ten times as long."""
    if file.suffix.lower() != ".jsonl":
        return [tokenizer.encode(text)]
    return parse_lines(file, text, lambda value: _ids(value, tokenizer), INSTEAD)


def _ids(value: Any, tokenizer: ChatTokenizer) -> list[int]:
    if not isinstance(value, dict) or not ("text" in value or "messages" in value):
        raise ValueError('it is no {"text": …} and no {"messages": […]}')
    if isinstance(value.get("text"), str):
        return tokenizer.encode(value["text"])
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise ValueError("text is no text, or messages are no list of messages")
    tools = value.get("tools") or None
    return tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=False)


def _require_streamable(source: Path) -> None:
    try:
        open_skeleton(open_folder(source)).layers()
    except NotContiguous as error:
        raise OptionError(
            f"The experts of {source} are not stored one by one, so that the model cannot run "
            "before it is packed, as --calibrate wants it to. Leave out --calibrate."
        ) from error


def _keep(file: Path, activations: Activations, position: int) -> None:
    arrays = {
        json.dumps([path, name]): getattr(sums, name)
        for path, sums in activations.layers.items()
        for name in LayerSums.__slots__
    }
    with replacing(file) as temporary, temporary.open("wb") as out:
        np.savez(out, position=position, **arrays)


def _kept(file: Path) -> tuple[Activations, int]:
    """What was found, and in how many tokens; nothing, where nobody can tell."""
    activations = Activations()
    found: dict[str, dict[str, Any]] = {}
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            position = int(arrays["position"])
            for key in set(arrays.files) - {"position"}:
                path, name = json.loads(key)
                found.setdefault(path, {})[name] = arrays[key]
        activations.layers = {path: LayerSums(**sums) for path, sums in found.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return Activations(), 0
    return activations, position
