"""The engine's errors as llm and click want them: one line for the user, never a traceback.

`llm chat` catches nothing but ClickException, callers of the Python API expect llm.ModelError; so
ours are both. The engine says what is wrong; the command that mends it is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
import llm

from flash_moe import errors as engine

COMMANDS = {
    engine.Remedy.ADD_AGAIN: "Add it again: llm flash-moe add {path}",
    engine.Remedy.PACK: "Pack it: llm flash-moe pack {path}",
    engine.Remedy.PACK_IN_PLANES: "Pack its 4-bit checkpoint: llm flash-moe pack {path} --planes",
    engine.Remedy.PACK_ELSEWHERE: "Free some space, or give another folder with --to.",
    engine.Remedy.PULL_AGAIN: "Go on with the same command.",
    engine.Remedy.REMOVE_UNFINISHED: "That is: --revision, or llm flash-moe remove NAME",
    engine.Remedy.DOWNLOAD_AND_PACK: (
        "That is: hf download ORG/NAME --local-dir FOLDER, then llm flash-moe pack FOLDER"
    ),
    engine.Remedy.PACK_WITHOUT_BITS: "Leave out --bits.",
    engine.Remedy.PACK_WITHOUT_PLANES: "Leave out --planes.",
    engine.Remedy.PACK_WITHOUT_CALIBRATION: "Leave out --calibrate.",
    engine.Remedy.OTHER_CALIBRATION: "Give another file with --calibrate.",
    engine.Remedy.OTHER_GROUP_SIZE: "Choose another --group-size.",
    engine.Remedy.VERIFY: "Check it with: llm flash-moe info NAME --verify",
    engine.Remedy.UPGRADE_MLX_LM: "Install it with: llm install -U mlx-lm",
    engine.Remedy.USE_LLM_MLX: "In llm, that is the plugin llm-mlx.",
    engine.Remedy.SHORTEN_CONVERSATION: "Or set a larger -o context_length.",
    engine.Remedy.EVALUATE_TEXTS_ONLY: "Measure it with --only text.",
    engine.Remedy.EVALUATE_OTHER_DATA: "Give another folder with --data, or leave out --only.",
    engine.Remedy.EVALUATE_SAME_DATA: "Give --data, --only and --limit as for the reference.",
    engine.Remedy.SAVE_REFERENCE: "Write one with: llm flash-moe eval NAME --save FILE",
}


class PluginError(click.ClickException, llm.ModelError):
    pass


@contextmanager
def as_click_errors() -> Iterator[None]:
    """Errors of the engine and of the operating system raised inside become messages."""
    try:
        yield
    except engine.FlashMoeError as error:
        raise PluginError(message_of(error)) from error
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise PluginError(f"{place}{error.strerror or error}.") from error


def message_of(error: engine.FlashMoeError) -> str:
    text = str(error)
    if error.remedy is not None:
        path = "PATH" if error.path is None else str(error.path)
        text += " " + COMMANDS[error.remedy].format(path=path)
    return printable(text)


def printable(text: str) -> str:
    """Without what a terminal would obey: names and configs come from strangers."""
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode()
        for char in text
    )
