"""Arguments that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON")
EXPERTS = click.option(
    "--experts", type=click.IntRange(1), help="Experts a token uses, if not the model's own number"
)
NAME = click.option("--name", help="Name for llm -m (the folder's name)")
TO = click.option("--to", type=PATH, help="Folder to write into, instead of llm's own")
