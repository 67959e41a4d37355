"""A SHA-256 that can be written down in the middle and continued by another process.

`hashlib` keeps its state to itself. macOS's CommonCrypto and OpenSSL's libcrypto keep it in plain
memory, so there it can be saved; each is compared with hashlib before it is used. Where neither is
found, hashlib computes the same, and a file that was interrupted is fetched again from its start.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from functools import cache
from typing import Any, NamedTuple

# A context is 104 bytes with CommonCrypto, 112 with OpenSSL; what is beyond stays zero.
STATE_BYTES = 128
_OPENSSL = ("libcrypto.so.3", "libcrypto.so.1.1")
_MACOS = "/usr/lib/libSystem.B.dylib"


class _Library(NamedTuple):
    name: str
    start: Any
    update: Any
    finish: Any


class RunningHash:
    """`state` is None where it cannot be saved."""

    def __init__(self) -> None:
        self._library, self._plain = _library(), hashlib.sha256()
        self._context = ctypes.create_string_buffer(STATE_BYTES)
        if self._library is not None:
            self._library.start(self._context)

    @classmethod
    def resumed(cls, state: str | None) -> RunningHash | None:
        """One that goes on from a saved state; None if that is of another library."""
        running = cls()
        name, _, digits = (state or "").partition(":")
        if running._library is None or name != running._library.name:
            return None
        if len(digits) != 2 * STATE_BYTES:
            return None
        try:
            running._context.raw = bytes.fromhex(digits)
        except ValueError:
            return None
        return running

    def update(self, data: memoryview) -> None:
        if self._library is None:
            self._plain.update(data)
        elif len(data):
            # The bytes themselves, without a copy; ctypes wants them to be writable.
            place = (ctypes.c_char * len(data)).from_buffer(data)
            self._library.update(self._context, place, len(data))

    def hexdigest(self) -> str:
        if self._library is None:
            return self._plain.hexdigest()
        context = ctypes.create_string_buffer(self._context.raw, STATE_BYTES)
        digest = ctypes.create_string_buffer(32)
        self._library.finish(digest, context)
        return digest.raw.hex()

    @property
    def state(self) -> str | None:
        if self._library is None:
            return None
        return f"{self._library.name}:{self._context.raw.hex()}"


@cache
def _library() -> _Library | None:
    """One that agrees with hashlib, also when it goes on from a saved state."""
    for library in _libraries():
        context, text = ctypes.create_string_buffer(STATE_BYTES), b"abc" * 50
        library.start(context)
        library.update(context, text, 100)
        again = ctypes.create_string_buffer(context.raw, STATE_BYTES)
        library.update(again, text[100:], 50)
        digest = ctypes.create_string_buffer(32)
        library.finish(digest, again)
        if digest.raw == hashlib.sha256(text).digest():
            return library
    return None


def _libraries() -> list[_Library]:
    names = (_MACOS,) if sys.platform == "darwin" else _OPENSSL
    prefix = "CC_SHA256" if sys.platform == "darwin" else "SHA256"
    # CommonCrypto counts in 32 bits, which no piece that is hashed at once exceeds.
    count = ctypes.c_uint32 if sys.platform == "darwin" else ctypes.c_size_t
    found = []
    for name in names:
        try:
            library = ctypes.CDLL(name)
            start, update, finish = (
                getattr(library, f"{prefix}_{verb}") for verb in ("Init", "Update", "Final")
            )
        except (OSError, AttributeError):
            continue
        start.argtypes = [ctypes.c_void_p]
        update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, count]
        finish.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        found.append(_Library(name.rpartition("/")[2], start, update, finish))
    return found
