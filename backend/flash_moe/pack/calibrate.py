"""Reads a text with the model that is to be packed, to measure what its experts multiply with.

A text is read in windows, each from an empty state and in one chunk, so that each reads the experts
once. The sums so far are saved beside the unfinished pack, and an interrupted reading resumes from
them.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from flash_moe.callbacks import Advance, no_advance
from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.errors import CheckpointError, OptionError, Remedy
from flash_moe.format.atomic import replacing
from flash_moe.format.json_files import parse_lines, read_text
from flash_moe.model.load import StreamedModel, load
from flash_moe.pack.activations import Activations, LayerSums
from flash_moe.pack.importance import ColumnImportance

# Fewer tokens reach too few of the experts.
LEAST_TOKENS = 1000
SUMS_FILE = "calibration.npz"


@dataclass(frozen=True, slots=True)
class Steps:
    """How a text is read: tokens a window, tokens a chunk of it, and windows between two savings.
    Of the 397B, 0.25 GB are written and 1.7 TB read from one saving to the next."""

    window: int = 1024
    chunk: int = 1024
    saved_every: int = 8


@dataclass(frozen=True, slots=True)
class Calibration:
    """A text as tokens of the model in `source`; `digest` identifies the text."""

    source: Path
    digest: str
    ids: list[int]
    steps: Steps = Steps()

    def collect(self, state: Path, progress: Advance = no_advance) -> ColumnImportance:
        """Read the text with the model, or the rest of it if the folder `state` holds sums."""
        activations, position = _load_sums(state / SUMS_FILE)
        progress(position)
        if position < len(self.ids):
            self._read(activations, position, state / SUMS_FILE, progress)
        if not all(sums.finite for sums in activations.layers.values()):
            raise CheckpointError(
                "The model computes numbers that are not finite when it reads this text, so they "
                f"cannot weigh errors. Remove {state} and pack without calibration.",
                Remedy.PACK_WITHOUT_CALIBRATION,
            )
        return ColumnImportance(activations.layers)

    def _read(self, activations: Activations, start: int, file: Path, progress: Advance) -> None:
        steps, total = self.steps, len(self.ids)
        model = load(self.source)
        try:
            for at in range(start, total, steps.window):
                end = min(at + steps.window, total)
                with activations.recording(model.streamer):
                    self._read_window(model, at, end)
                mx.clear_cache()
                if end == total or end // steps.window % steps.saved_every == 0:
                    _save_sums(file, activations, end)
                progress(end - at)
        finally:
            model.close()

    def _read_window(self, model: StreamedModel, start: int, end: int) -> None:
        cache = model.make_cache()
        for at in range(start, end, self.steps.chunk):
            tokens = self.ids[at : min(at + self.steps.chunk, end)]
            model.advance(mx.array(tokens)[None], cache)


def read_calibration(source: Path, file: Path) -> Calibration:
    """Read and check a text, or JSON lines with texts and dialogues, before a model is loaded."""
    tokenizer = load_tokenizer(source)
    text = read_text(file, Remedy.OTHER_CALIBRATION)
    ids = [token for document in _documents(file, text, tokenizer) for token in document]
    if len(ids) < LEAST_TOKENS:
        raise OptionError(
            f"{file} has {len(ids):,} tokens, which reach too few of the experts. Give a text of "
            f"at least {LEAST_TOKENS:,} tokens; 100,000 are better.",
            Remedy.OTHER_CALIBRATION,
        )
    return Calibration(source, hashlib.sha256(text.encode()).hexdigest(), ids)


def _documents(file: Path, text: str, tokenizer: ChatTokenizer) -> list[list[int]]:
    """They are joined and cut into windows: reading all the experts for each short dialogue would
    take ten times as long."""
    if file.suffix.lower() != ".jsonl":
        return [tokenizer.encode(text)]
    return parse_lines(file, text, lambda value: _ids(value, tokenizer), Remedy.OTHER_CALIBRATION)


def _ids(value: Any, tokenizer: ChatTokenizer) -> list[int]:
    if not isinstance(value, dict) or not ("text" in value or "messages" in value):
        raise ValueError('it is neither {"text": …} nor {"messages": […]}')
    if isinstance(value.get("text"), str):
        return tokenizer.encode(value["text"])
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError("text is not a text, or messages is not a list of messages")
    tools = value.get("tools") or None
    return tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=False)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _save_sums(file: Path, activations: Activations, position: int) -> None:
    arrays = {
        json.dumps([path, name]): getattr(sums, name)
        for path, sums in activations.layers.items()
        for name in LayerSums.__slots__
    }
    with replacing(file) as temporary, temporary.open("wb") as out:
        np.savez(out, position=position, **arrays)


def _load_sums(file: Path) -> tuple[Activations, int]:
    """The sums that were saved, and after how many tokens; none, where the file is not one."""
    fields: dict[str, dict[str, Any]] = {}
    try:
        with file.open("rb") as opened, np.load(opened) as arrays:
            position = int(arrays["position"])
            for key in set(arrays.files) - {"position"}:
                path, name = json.loads(key)
                fields.setdefault(path, {})[name] = arrays[key]
        layers = {path: LayerSums(**sums) for path, sums in fields.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return Activations(), 0
    return Activations(layers), position
