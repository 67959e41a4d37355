"""The models that `llm` sees. They hold no state: llm makes new objects for every command, and
the loaded engine lives in this module, one at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
import llm
from pydantic import Field, field_validator

from flash_moe.checkpoint.registry import Entry
from flash_moe.errors import FlashMoeError
from flash_moe.model.sampling import Sampling
from llm_flash_moe.errors import PluginError, shown
from llm_flash_moe.messages import to_chat
from llm_flash_moe.places import folder, registry
from llm_flash_moe.progress import StatusLine

if TYPE_CHECKING:
    from flash_moe.engine import Engine

FLAGSHIP = "flash-moe-397b"
# Disk and memory are what `llm flash-moe info` counts for that checkpoint; the rest is division.
FLAGSHIP_HELP = f"""\
{FLAGSHIP} (Qwen3.5-397B-A17B) has no weights on this machine yet. Get them with:

  hf download mlx-community/Qwen3.5-397B-A17B-4bit --local-dir Qwen3.5-397B-A17B-4bit
  llm flash-moe add Qwen3.5-397B-A17B-4bit --name {FLAGSHIP} --experts 4

Disk: 223 GB, used where it is downloaded, no second copy. Memory: 6 GB for weights and working
set, and as much more as there is for the page cache. Time: the download (40 minutes at 100 MB/s);
then each token reads up to 1.7 GB of experts (4.2 GB with the model's own 10 experts)."""

# As flash_moe.kernels.runtime has them, which imports MLX.
RUNTIMES = ("auto", "metal", "cuda", "native", "mlx")

OPTION_NAMES = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)


class ModelOptions(llm.Options):
    max_tokens: int | None = Field(None, description="Most tokens to generate (8192)")
    temperature: float | None = Field(None, description="0 to 10; 0 always takes the likeliest (0)")
    top_p: float | None = Field(None, description="Sample from this much probability, 0 to 1")
    top_k: int | None = Field(None, description="Sample from the k likeliest tokens")
    min_p: float | None = Field(
        None, description="Leave out tokens less likely than this share of the likeliest, 0 to 1"
    )
    repetition_penalty: float | None = Field(None, description="Divides repeated tokens' logits")
    presence_penalty: float | None = Field(None, description="Subtracted once per used token")
    frequency_penalty: float | None = Field(None, description="Subtracted per use of a token")
    seed: int | None = Field(None, description="Makes sampling repeatable")
    stop: str | list[str] | None = Field(None, description="Text at which the reply ends")
    experts: int | None = Field(
        None, description="Experts a token uses in each layer: fewer is faster and less exact"
    )
    runtime: str | None = Field(
        None,
        description=f"Code that computes the experts: {', '.join(RUNTIMES)}. auto takes the "
        "fastest here; mlx is mlx-lm's arithmetic, on a CPU to the bit",
    )
    stats: bool | None = Field(None, description="Print statistics to stderr after the reply")

    @field_validator("max_tokens", "experts")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value < 1:
            raise ValueError("choose 1 or more")
        return value

    @field_validator("runtime")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value not in (None, *RUNTIMES):
            raise ValueError(f"choose {', '.join(RUNTIMES)}")
        return value

    @field_validator(*OPTION_NAMES)
    @classmethod
    def _in_range(cls, value: float | None, info: Any) -> float | None:
        try:
            Sampling(**{info.field_name: value})  # type: ignore[arg-type]
        except FlashMoeError as error:
            raise ValueError(str(error)) from error
        return value

    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in OPTION_NAMES})

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class FlashMoE(llm.Model):
    can_stream = True

    class Options(ModelOptions):
        pass

    def __init__(self, name: str, entry: Entry | None) -> None:
        self.model_id = name
        self._entry = entry

    def __str__(self) -> str:
        return f"FlashMoE: {self.model_id}" + ("" if self._entry else " (no weights yet)")

    def execute(
        self,
        prompt: llm.Prompt,
        stream: bool,
        response: llm.Response,
        conversation: llm.Conversation | None = None,
    ) -> Iterator[str]:
        if self._entry is None:
            raise PluginError(FLAGSHIP_HELP)
        options = cast(ModelOptions, prompt.options)
        settings = (options.experts or self._entry.experts, options.runtime or "auto")
        prefill = StatusLine("reading the prompt", " tokens")
        with shown(), _lock:
            engine = _engine(folder(self.model_id, self._entry), *settings)
            reply = engine.reply(
                to_chat(prompt),
                max_tokens=options.max_tokens,
                sampling=options.sampling(),
                stop=options.stops(),
                progress=prefill.update,
            )
            try:
                yield from reply
            finally:
                prefill.clear()
            _report(engine, reply.stats, response)
            if options.stats:
                print(f"\n{reply.stats.summary()}", file=sys.stderr)


def known_models() -> dict[str, Entry | None]:
    """Every model of the user, and the flagship whether or not it is there."""
    models: dict[str, Entry | None] = {FLAGSHIP: None}
    try:
        models.update(registry().entries())
    except FlashMoeError as error:
        # Raising here would break every `llm -m`, also for other plugins' models.
        _warn(str(error))
    return models


@cache
def _warn(text: str) -> None:
    """Once: llm asks for the models again and again."""
    click.echo(f"Warning: {text}", err=True)


# One model fills the memory; a second one replaces it. llm's async models will share it, too.
_lock = threading.RLock()
_loaded: dict[tuple[Path, int | None, str], Engine] = {}


def _engine(path: Path, experts: int | None, runtime: str) -> Engine:
    key = (path, experts, runtime)
    if key not in _loaded:
        from flash_moe.engine import Engine
        from flash_moe.measure.backend import find_backends
        from flash_moe.model.load import Settings

        if mend := find_backends().mend:
            _warn(f"MLX is not using the back end that was installed for it. To mend that: {mend}")

        while _loaded:
            _loaded.popitem()[1].close()
        loading = StatusLine("loading", " bytes")
        try:
            settings = Settings(experts=experts, runtime=runtime)
            _loaded[key] = Engine.load(path, settings, loading.update)
        finally:
            loading.clear()
    return _loaded[key]


def _report(engine: Engine, stats: Any, response: llm.Response) -> None:
    plan = engine.model.plan
    lossy = []
    if plan.experts_per_token != plan.own_experts_per_token:
        lossy.append(f"{plan.experts_per_token} experts of {plan.own_experts_per_token} a token")
    response.set_usage(input=stats.prompt_tokens, output=stats.generated_tokens)
    response.response_json = {**stats.to_json(), "lossy": lossy}
