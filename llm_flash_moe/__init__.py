"""llm-flash-moe: Mixture-of-Experts models bigger than memory, as models of `llm`.

`llm` imports this on every command, so nothing heavy is imported here: MLX and the engine wait
until a model runs or a command needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import llm

from llm_flash_moe.answering.models import AsyncFlashMoE, FlashMoE, known_models
from llm_flash_moe.commands import flash_moe


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    for name, entry in known_models().items():
        register(FlashMoE(name, entry), AsyncFlashMoE(name, entry))


@llm.hookimpl
def register_commands(cli: Any) -> None:
    group: click.Group = cli
    group.add_command(flash_moe)
