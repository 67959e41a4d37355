"""Saves the states of prompts, in memory and optionally on disk, so that a conversation's next
turn does not compute them again.

Decides when a state is saved, and finds the longest one that a prompt can continue from. Belongs to
the model's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.decode.prefill import Prefill
from flash_moe.model.load import StreamedModel
from flash_moe.prefix.boundaries import ChunkEnds, TurnMarks, chunk_ends, find_turn_marks
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.fingerprint import describe, fingerprint
from flash_moe.prefix.lookup import state_keys
from flash_moe.prefix.memory import MemorySnapshots
from flash_moe.prefix.state import NotSaved, Snapshot, put, take


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """Where states of prompts are saved. Without a folder they end with the process.

    A state of the 397B takes 189 MB for its recurrent layers, always in float32, and 31 kB a token
    in bfloat16 or twice that in float32. 1 GiB holds a few, and one chat needs no more. Reading a
    state back is faster than computing it at any length (benchmarks/prefix.md); `disk_tokens`, the
    shortest prompt that is written, only spares the disk.
    """

    memory_bytes: int = 1 << 30
    folder: Path | None = None
    disk_bytes: int = 8 << 30
    disk_tokens: int = 64


class PrefixStore:
    """`memory` and `disk` hold the snapshots; `disk` is None without a folder."""

    def __init__(
        self, model: StreamedModel, marks: TurnMarks, settings: PrefixSettings = PrefixSettings()
    ) -> None:
        self.memory = MemorySnapshots(settings.memory_bytes)
        self.disk: DiskSnapshots | None = None
        self._model = model
        self._marks = marks
        self._disk_tokens = settings.disk_tokens
        self._scope = ""
        self._warning = ""
        if settings.folder is not None:
            try:
                self._scope = fingerprint(model)
            except OSError as error:
                self._warning = f"Prompts are not saved: the model cannot be read ({error})."
            else:
                self.disk = DiskSnapshots(
                    settings.folder, settings.disk_bytes, self._scope, describe(model)
                )
        self._writes = self.disk is not None

    @classmethod
    def open(
        cls,
        model: StreamedModel,
        tokenizer: ChatTokenizer,
        settings: PrefixSettings = PrefixSettings(),
    ) -> PrefixStore:
        return cls(model, find_turn_marks(tokenizer), settings)

    def begin(self, prompt: Sequence[int], chunk: int, write: bool = True) -> Prefill:
        """Restore the longest saved state of this prompt's start, and say how to read the rest.
        Chunks end at the same places with and without a saved state, so the reply is the same to
        the bit. Unless `write`, nothing of this prompt gets onto the disk."""
        cuts = chunk_ends(prompt, self._marks, chunk)
        keys = state_keys(prompt, cuts.ends, self._scope)
        cached, cache = self._longest(prompt, cuts, keys)
        to_save = [end for end in cuts.saved if end > cached]
        new: dict[str, Snapshot] = {}

        def reached(position: int, state: list[Any]) -> None:
            if position in to_save:
                ends = tuple(end for end in cuts.ends if end <= position)
                self._save(keys[position], prompt[:position], ends, state, new if write else {})

        def finish() -> str:
            return self._write(new.items())

        return Prefill(cuts.after(cached), cache, cached, reached, finish)

    def clear(self) -> None:
        """Forget the snapshots in memory."""
        self.memory.clear()

    def _longest(
        self, prompt: Sequence[int], cuts: ChunkEnds, keys: dict[int, str]
    ) -> tuple[int, list[Any]]:
        for end in reversed(cuts.ends):
            snapshot = self._find(keys[end], prompt, cuts.ends)
            if snapshot is None:
                continue
            cache = self._model.make_cache()
            try:
                put(snapshot, cache)
            except NotSaved:
                self._remove(keys[end])
            else:
                return end, cache
        return 0, self._model.make_cache()

    def _find(self, key: str, prompt: Sequence[int], ends: Sequence[int]) -> Snapshot | None:
        snapshot = self.memory.get(key)
        if snapshot is not None:
            return snapshot if snapshot.holds(prompt, ends) else None
        if self.disk is not None and (snapshot := self.disk.get(key, prompt, ends)):
            self.memory.put(key, snapshot)
        return snapshot

    def _remove(self, key: str) -> None:
        self.memory.remove(key)
        if self.disk is not None:
            self.disk.remove(key)

    def _save(
        self,
        key: str,
        tokens: Sequence[int],
        ends: Sequence[int],
        state: list[Any],
        new: dict[str, Snapshot],
    ) -> None:
        try:
            snapshot = take(state, tokens, ends)
        except NotSaved:  # happens with no architecture in mlx-lm today
            return
        self.memory.put(key, snapshot)
        if self._writes and len(tokens) >= self._disk_tokens:
            new[key] = snapshot

    def _write(self, snapshots: Iterable[tuple[str, Snapshot]]) -> str:
        """Runs after the reply, because disks are slow. If it fails it returns a warning; from then
        on, states are still read from the disk but no longer written."""
        warning, self._warning = self._warning, ""
        try:
            for key, snapshot in snapshots:
                if self.disk is not None:
                    self.disk.put(key, snapshot)
        except NotSaved as error:
            self._writes = False
            return str(error)
        return warning
