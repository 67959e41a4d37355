"""The engine as the front end sees it: load a model, give it messages, iterate over its words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flash_moe.chat.stops import StopScanner
from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.errors import OptionError
from flash_moe.measure.stats import Stats
from flash_moe.model.decode import Generation
from flash_moe.model.load import Progress, Settings, StreamedModel, load
from flash_moe.model.sampling import Sampling

# A thinking model may need thousands of tokens; a random one never stops by itself.
DEFAULT_MAX_TOKENS = 8192


class Engine:
    """A loaded model and its tokenizer. Owns both; use it from the thread that loaded it."""

    def __init__(self, model: StreamedModel, tokenizer: ChatTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def load(
        cls,
        path: Path,
        settings: Settings = Settings(),
        progress: Progress = lambda done, total: None,
    ) -> Engine:
        # The tokenizer first: what is missing there is found before gigabytes are read.
        tokenizer = load_tokenizer(path)
        return cls(load(path, settings, progress), tokenizer)

    def reply(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        max_tokens: int | None = None,
        sampling: Sampling = Sampling(),
        stop: Sequence[str] = (),
        cancelled: Callable[[], bool] = lambda: False,
        progress: Progress = lambda done, total: None,
    ) -> Reply:
        """The assistant's next turn. Iterate over it for text; `stats` is complete at its end."""
        if not messages:
            raise OptionError("The prompt is empty: there is nothing to answer.")
        generation = Generation(
            self.model,
            self.tokenizer.encode_chat(messages),
            max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            sampling=sampling,
            stop_tokens=self.tokenizer.stop_tokens,
            cancelled=cancelled,
            progress=progress,
        )
        return Reply(generation, self.tokenizer, stop)

    def close(self) -> None:
        self.model.close()


class Reply:
    def __init__(
        self, generation: Generation, tokenizer: ChatTokenizer, stop: Sequence[str]
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._stop = stop

    @property
    def stats(self) -> Stats:
        return self._generation.stats

    def __iter__(self) -> Iterator[str]:
        stream, stops = self._tokenizer.stream(), StopScanner(self._stop)
        for token in self._generation:
            if text := stops.feed(stream.add(token)):
                yield text
            if stops.stopped:
                self.stats.finish_reason = "stop"
                return
        if text := stops.feed(stream.finish()) + stops.finish():
            yield text
        if stops.stopped:
            self.stats.finish_reason = "stop"
