"""Every error a user can meet: one tree, each message says what happened and what mends it.

FlashMoeError
├── CheckpointError      a file or folder is not what it claims to be
│   └── NotContiguous    sound, but its experts cannot be read where they lie
├── UnsupportedModel     an architecture whose experts we cannot stream
├── ReadFailed           the disk did not deliver an expert
├── NoSpace              the disk is too small, noticed before writing or while it fills up
├── FetchFailed          the network or a repository did not deliver
├── NativeUnavailable    a C library could not be compiled
├── HolderGone           a process that held a model ended, or does not answer
└── OptionError          a setting outside its range, or one that this model does not have

Messages speak of files and of the engine's own arguments. Where one command or option of a front
end would mend the fault, `remedy` names it, and the front end adds the words for it.
"""

from __future__ import annotations

from enum import Enum, auto
from pathlib import Path


class Remedy(Enum):
    """What to do, for a front end to say in terms of its own commands."""

    ADD_AGAIN = auto()
    PACK = auto()
    PACK_IN_PLANES = auto()
    PACK_ELSEWHERE = auto()
    PULL_AGAIN = auto()
    REMOVE_UNFINISHED = auto()
    DOWNLOAD_AND_PACK = auto()
    PACK_WITHOUT_BITS = auto()
    PACK_WITHOUT_PLANES = auto()
    PACK_WITHOUT_CALIBRATION = auto()
    OTHER_CALIBRATION = auto()
    OTHER_GROUP_SIZE = auto()
    VERIFY = auto()
    UPGRADE_MLX_LM = auto()
    USE_LLM_MLX = auto()
    SHORTEN_CONVERSATION = auto()
    EVALUATE_TEXTS_ONLY = auto()
    EVALUATE_OTHER_DATA = auto()
    EVALUATE_SAME_DATA = auto()
    SAVE_REFERENCE = auto()


class FlashMoeError(Exception):
    """Base of all errors of the engine; its text is meant for the user. `path` is what the remedy
    is applied to, if it needs one."""

    def __init__(
        self, message: str, remedy: Remedy | None = None, path: Path | None = None
    ) -> None:
        super().__init__(message)
        self.remedy, self.path = remedy, path


class CheckpointError(FlashMoeError):
    pass


class NotContiguous(CheckpointError):
    pass


class UnsupportedModel(FlashMoeError):
    pass


class ReadFailed(FlashMoeError):
    pass


class NoSpace(FlashMoeError):
    pass


class FetchFailed(FlashMoeError):
    pass


class NativeUnavailable(FlashMoeError):
    pass


class HolderGone(FlashMoeError):
    pass


class OptionError(FlashMoeError):
    pass
