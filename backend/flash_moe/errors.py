"""Every error a user can meet: one tree, each message says what happened and what mends it.

FlashMoeError
├── CheckpointError      a file or folder is not what it claims to be
│   └── NotContiguous    sound, but its experts cannot be read where they lie: pack it
├── UnsupportedModel     an architecture whose experts we cannot stream
├── RegistryError        a model name that is unknown, taken or unusable
├── ReadFailed           the disk did not deliver an expert
├── NoSpace              the disk is too small, found before writing
├── NativeUnavailable    a C library could not be compiled (in kernels.native_build)
└── OptionError          a setting outside its range
"""

from __future__ import annotations


class FlashMoeError(Exception):
    """Base of all errors of the engine; its text is meant for the user."""


class CheckpointError(FlashMoeError):
    pass


class NotContiguous(CheckpointError):
    pass


class UnsupportedModel(FlashMoeError):
    pass


class RegistryError(FlashMoeError):
    pass


class ReadFailed(FlashMoeError):
    pass


class NoSpace(FlashMoeError):
    pass


class OptionError(FlashMoeError):
    pass
