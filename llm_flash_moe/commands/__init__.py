"""`llm flash-moe …`: one file for each command."""

from __future__ import annotations

import click

from llm_flash_moe.commands.add import add
from llm_flash_moe.commands.bench import bench
from llm_flash_moe.commands.cache import cache
from llm_flash_moe.commands.doctor import doctor
from llm_flash_moe.commands.evaluate import evaluate
from llm_flash_moe.commands.info import info
from llm_flash_moe.commands.keep import keep
from llm_flash_moe.commands.models import models
from llm_flash_moe.commands.pack import pack
from llm_flash_moe.commands.path import path
from llm_flash_moe.commands.ps import ps
from llm_flash_moe.commands.pull import pull
from llm_flash_moe.commands.remove import remove
from llm_flash_moe.commands.stop import stop
from llm_flash_moe.commands.synth import synth


@click.group(name="flash-moe")
def flash_moe() -> None:
    """Run Mixture-of-Experts models that are bigger than memory."""


COMMANDS = (
    *(add, bench, cache, doctor, evaluate, info, keep, models),
    *(pack, path, ps, pull, remove, stop, synth),
)
for command in COMMANDS:
    flash_moe.add_command(command)
