"""What a conversation's next turn need not compute again: kept in memory, and on disk if asked.

Owns when a state is kept, and finds the longest one that a prompt can continue from. Used by the
model's thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.chat.tokenizer import ChatTokenizer
from flash_moe.decode.prefill import Prefill
from flash_moe.model.load import StreamedModel
from flash_moe.prefix.boundaries import Cuts, Marks, cut, find_marks
from flash_moe.prefix.disk import DiskSnapshots
from flash_moe.prefix.fingerprint import described, fingerprint
from flash_moe.prefix.lookup import keys
from flash_moe.prefix.memory import MemorySnapshots
from flash_moe.prefix.state import NotKept, Snapshot, put, take


@dataclass(frozen=True, slots=True)
class PrefixSettings:
    """No folder: nothing is written, and what is kept ends with the process.

    A state of the 397B takes 189 MB for its recurrent layers, always in float32, and 31 kB a token
    in bfloat16 or twice that in float32. 1 GiB holds a few; more of one chat make little sense.
    Reading one back pays from the shortest on (backend/benchmarks/prefix.md), so the least number
    of tokens that is written, `disk_tokens`, is there for the disk's sake.
    """

    memory_bytes: int = 1 << 30
    folder: Path | None = None
    disk_bytes: int = 8 << 30
    disk_tokens: int = 64


class PrefixStore:
    def __init__(
        self, model: StreamedModel, marks: Marks, settings: PrefixSettings = PrefixSettings()
    ) -> None:
        self._model = model
        self._marks = marks
        self._memory = MemorySnapshots(settings.memory_bytes)
        self._disk_tokens = settings.disk_tokens
        self._disk: DiskSnapshots | None = None
        self._scope = ""
        self._warning = ""
        if settings.folder is not None:
            try:
                self._scope = fingerprint(model)
            except OSError as error:
                self._warning = f"Prompts are not kept on disk: the model cannot be read ({error})."
            else:
                self._disk = DiskSnapshots(
                    settings.folder, settings.disk_bytes, self._scope, described(model)
                )
        self._writes = self._disk is not None

    @classmethod
    def open(
        cls,
        model: StreamedModel,
        tokenizer: ChatTokenizer,
        settings: PrefixSettings = PrefixSettings(),
    ) -> PrefixStore:
        return cls(model, find_marks(tokenizer), settings)

    def begin(self, prompt: Sequence[int], chunk: int) -> Prefill:
        """Restore the longest state that is kept of this prompt's start; the rest is to be read.
        Ends of chunks are the same whatever was found, so the reply is, too, to the bit."""
        cuts = cut(prompt, self._marks, chunk)
        names = keys(prompt, cuts.ends, self._scope)
        cached, cache = self._longest(prompt, cuts, names)
        wanted = [end for end in cuts.kept if end > cached]
        new: dict[str, Snapshot] = {}

        def reached(position: int, state: list[Any]) -> None:
            if position in wanted:
                ends = tuple(end for end in cuts.ends if end <= position)
                self._keep(names[position], prompt[:position], ends, state, new)

        def finish() -> str:
            return self._write(new.items())

        return Prefill(cuts.after(cached), cache, cached, reached, finish)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._memory.clear()

    def _longest(
        self, prompt: Sequence[int], cuts: Cuts, names: dict[int, str]
    ) -> tuple[int, list[Any]]:
        for end in reversed(cuts.ends):
            snapshot = self._find(names[end], prompt, cuts.ends)
            if snapshot is None:
                continue
            cache = self._model.make_cache()
            try:
                put(snapshot, cache)
            except NotKept:
                self._forget(names[end])
            else:
                return end, cache
        return 0, self._model.make_cache()

    def _find(self, key: str, prompt: Sequence[int], ends: Sequence[int]) -> Snapshot | None:
        snapshot = self._memory.get(key)
        if snapshot is not None:
            return snapshot if snapshot.holds(prompt, ends) else None
        if self._disk is not None and (snapshot := self._disk.get(key, prompt, ends)):
            self._memory.put(key, snapshot)
        return snapshot

    def _forget(self, key: str) -> None:
        self._memory.remove(key)
        if self._disk is not None:
            self._disk.remove(key)

    def _keep(
        self,
        key: str,
        tokens: Sequence[int],
        ends: Sequence[int],
        state: list[Any],
        new: dict[str, Snapshot],
    ) -> None:
        try:
            snapshot = take(state, tokens, ends)
        except NotKept:  # no architecture of mlx-lm today
            return
        self._memory.put(key, snapshot)
        if self._writes and len(tokens) >= self._disk_tokens:
            new[key] = snapshot

    def _write(self, snapshots: Iterable[tuple[str, Snapshot]]) -> str:
        """After the reply, because a disk takes its time. A warning if it did not work; after
        that, what is there is still read."""
        warning, self._warning = self._warning, ""
        try:
            for key, snapshot in snapshots:
                if self._disk is not None:
                    self._disk.put(key, snapshot)
        except NotKept as error:
            self._writes = False
            return str(error)
        return warning
