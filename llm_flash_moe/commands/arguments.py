"""Arguments that several commands have."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from llm_flash_moe.errors import PluginError
from llm_flash_moe.options import SETTINGS, ModelOptions

PATH = click.Path(path_type=Path)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON")
EXPERTS = click.option(
    "--experts", type=click.IntRange(1), help="Experts a token uses, if not the model's own number"
)
NAME = click.option("--name", help="Name for llm -m (the folder's name)")
TO = click.option("--to", type=PATH, help="Folder to write into, instead of llm's own")
OPTIONS = click.option(
    "-o",
    "--option",
    "options",
    type=(str, str),
    multiple=True,
    metavar="KEY VALUE",
    help=f"As llm -o, for what a model is loaded with: {', '.join(SETTINGS)}",
)


def given_options(pairs: Sequence[tuple[str, str]]) -> ModelOptions:
    """What OPTIONS were given. Replies are greedy, and their length is set: only what a model is
    loaded with can differ."""
    known = f"Choose {', '.join(SETTINGS)}."
    for key, _ in pairs:
        if key not in SETTINGS:
            fault = "changes nothing here" if key in ModelOptions.model_fields else "is no option"
            raise PluginError(f"-o {key} {fault}. {known}")
    try:
        return ModelOptions(**dict(pairs))  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise PluginError(f"-o {first['loc'][0]} {first['input']}: {message}.") from error


def command(verb: str, what: object, given: Mapping[str, Any]) -> str:
    """The command that does it again, from any folder: options that were given, by name."""
    words: list[Any] = ["llm", "flash-moe", verb, what]
    for name, value in given.items():
        if value:
            words += [f"--{name}"] if value is True else [f"--{name}", value]
    return shlex.join(map(str, words))


def expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
