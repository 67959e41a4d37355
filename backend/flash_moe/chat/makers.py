"""How a model's makers say that its tokens be chosen: `generation_config.json`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from flash_moe.format.json_files import read_json_if_present
from flash_moe.options import Sampling, user_options

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Without them as far as they say nothing: what sampling is, unfiltered.
PLAIN = Sampling(temperature=1.0)


def makers_sampling(path: Path) -> Sampling:
    """Greedy, unless they say that tokens be sampled. What makes no sense is not listened to."""
    table = read_json_if_present(path / "generation_config.json")
    options = user_options(Sampling)
    said = {
        name: table[name]
        for name in FIELDS
        if table.get(name) is not None and options[name].problem(table[name]) is None
    }
    if not table.get("do_sample", "temperature" in said):
        said = {name: value for name, value in said.items() if name == "repetition_penalty"}
        return Sampling(**said)
    return replace(PLAIN, **said)


def completed(asked: Any, makers: Sampling) -> Sampling:
    """What is asked for, and where nothing is, what the makers say."""
    given = {one.name: getattr(asked, one.name) for one in fields(Sampling)}
    set_here = {name: value for name, value in given.items() if value is not None}
    return replace(makers, **set_here)


def without_effect(asked: Any, used: Sampling) -> list[str]:
    """Options that were asked for and do nothing."""
    if used.temperature:
        return []
    return [name for name in ("top_p", "top_k", "min_p") if getattr(asked, name) is not None]
