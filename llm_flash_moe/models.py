"""The models that `llm` sees. They hold no state: llm makes new objects for every command."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing

import llm
from llm.parts import StreamEvent

from flash_moe.built_in import MODELS
from flash_moe.errors import FlashMoeError
from llm_flash_moe.engines import areplies, replies, warn
from llm_flash_moe.errors import PluginError, shown
from llm_flash_moe.interrupt import interruptible
from llm_flash_moe.options import ModelOptions
from llm_flash_moe.places import registry
from llm_flash_moe.registry import Entry
from llm_flash_moe.turn import Turn

FLAGSHIP = "flash-moe-397b"
# Disk and memory are what `llm flash-moe info` counts for that checkpoint; the rest is division.
FLAGSHIP_HELP = f"""\
{FLAGSHIP} (Qwen3.5-397B-A17B) has no weights on this machine yet. Get them with:

  hf download mlx-community/Qwen3.5-397B-A17B-4bit --local-dir Qwen3.5-397B-A17B-4bit
  llm flash-moe add Qwen3.5-397B-A17B-4bit --name {FLAGSHIP} --experts 4

Disk: 223 GB, used where it is downloaded, no second copy. Memory: 6 GB for weights and working
set, and as much more as there is for the page cache. Time: the download (40 minutes at 100 MB/s);
then each token reads up to 1.7 GB of experts (4.2 GB with the model's own 10 experts). With 247 GB
more, `llm flash-moe pack Qwen3.5-397B-A17B-4bit --planes --experts 4` makes a copy of which a token
reads 1.2 GB with -o whole 1: the weightiest expert with 4 bits and the others with 2."""


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
        with shown(), interruptible() as interrupted:
            turn = self._turn(prompt, response)
            try:
                for event in replies(turn.key, turn.work(interrupted)):
                    yield from turn.told(event)
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
        with shown():
            turn = self._turn(prompt, response)
            try:
                async with aclosing(areplies(turn.key, turn.work())) as events:
                    async for event in events:
                        for told in turn.told(event):
                            yield told
            finally:
                turn.finish()


def known_models() -> dict[str, Entry | None]:
    """Every model of the user, and the built-in one and the flagship whatever else there is."""
    models: dict[str, Entry | None] = {
        **{name: Entry(str(path)) for name, path in MODELS.items()},
        FLAGSHIP: None,
    }
    try:
        models.update(registry().entries())
    except FlashMoeError as error:
        # Raising here would break every `llm -m`, also for other plugins' models.
        warn(str(error))
    return models
