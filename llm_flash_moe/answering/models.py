"""The models that `llm` sees. They hold no state: llm makes new objects for every command."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import llm
from llm.parts import StreamEvent

from llm_flash_moe.answering.engines import areplies, replies, warn
from llm_flash_moe.answering.interrupt import interruptible
from llm_flash_moe.answering.turn import Turn
from llm_flash_moe.errors import PluginError, as_click_errors
from llm_flash_moe.known import FLAGSHIP
from llm_flash_moe.options import ModelOptions
from llm_flash_moe.registry import BUILT_IN_ENTRIES, Entry, Registry

# Disk and memory are what a plan counts for that checkpoint; the rest is division.
FLAGSHIP_HELP = f"""\
{FLAGSHIP} (Qwen3.5-397B-A17B) has no weights on this machine yet. Get them with:

  llm flash-moe pull {FLAGSHIP}

It shows first what that takes, and asks. Of the 223 GB that it fetches (40 minutes at 100 MB/s),
223 GB stay, 247 GB with --planes, or 126 GB with --bits 2: the smallest, the fastest, and the least
exact. Memory: 6 GB for weights and working set; all that is
left serves as page cache. A token uses 4 experts unless --experts 10 asks for all that the model
was trained with: slower, and exact."""


class _Shared:
    can_stream = True
    supports_tools = True
    supports_schema = True

    def __init__(self, name: str, entry: Entry | None) -> None:
        self.model_id = name
        self._entry = entry

    def __str__(self) -> str:
        return f"FlashMoE: {self.model_id}" + ("" if self._entry else " (no weights yet)")

    def _turn(self, prompt: llm.Prompt, response: llm.Response | llm.AsyncResponse) -> Turn:
        if self._entry is None:
            raise PluginError(FLAGSHIP_HELP)
        return Turn(self.model_id, self._entry, prompt, response)


class FlashMoE(_Shared, llm.Model):
    class Options(ModelOptions):
        pass

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None = None,
    ) -> Iterator[str | StreamEvent]:
        with as_click_errors(), interruptible() as interrupted:
            turn = self._turn(prompt, response)
            # A response that nobody reads any more must be free to go, and this frame with it.
            del response
            try:
                for event in replies(turn.key, turn.work(interrupted), turn.keep):
                    yield from turn.to_stream_events(event)
            finally:
                turn.finish()


class AsyncFlashMoE(_Shared, llm.AsyncModel):
    class Options(ModelOptions):
        pass

    async def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.AsyncResponse,
        conversation: llm.AsyncConversation | None = None,
    ) -> AsyncGenerator[str | StreamEvent, None]:
        with as_click_errors():
            turn = self._turn(prompt, response)
            del response
            try:
                async with aclosing(areplies(turn.key, turn.work(), turn.keep)) as events:
                    async for event in events:
                        for stream_event in turn.to_stream_events(event):
                            yield stream_event
            finally:
                turn.finish()


def known_models() -> dict[str, Entry | None]:
    """Every model of the user, and always the built-in one and the flagship."""
    models: dict[str, Entry | None] = {**BUILT_IN_ENTRIES, FLAGSHIP: None}
    try:
        models.update(Registry.of_user().entries())
    except PluginError as error:
        # Raising here would break every `llm -m`, also for other plugins' models.
        warn(error.message)
    return models
