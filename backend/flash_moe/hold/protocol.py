"""What is said through the socket: frames of JSON, each after its length in four bytes.

The one that asks says `hello`, then `request` or `ready`, then `next` for every frame of the reply
that it wants, or `cancel`, after which the rest comes by itself. It is answered with `hello`,
`begin`, `event`s, `logprobs` if they were asked for, and `end` or `error`; `alive` comes while it
waits. What is made of JSON is checked: a socket is nothing to trust.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_moe import errors
from flash_moe.chat.event import Event
from flash_moe.decode.statistics import Stats
from flash_moe.errors import FlashMoeError, Remedy
from flash_moe.hold.places import printable
from flash_moe.options import Request

if TYPE_CHECKING:
    from flash_moe.checkpoint.plan import Plan

LENGTH = struct.Struct(">I")
# A prompt of a million tokens takes 5 MB.
MOST_BYTES = 64 << 20
# Of a greeting.
FEW_BYTES = 4096
# Tokens in a frame of log-probabilities: each may have thousands of others beside it.
LOGPROBS_IN_A_FRAME = 64
CALLBACKS = ("cancelled", "progress")
LISTS = ("messages", "tools")

Frame = dict[str, Any]
# Of which the prompt or the model so much is read; or words; or nothing.
Alive = list[Any] | str | None


class Malformed(Exception):
    """Not what this version says."""


def pack(frame: Frame) -> bytes:
    """Malformed for what JSON has no words for, or too many."""
    try:
        body = json.dumps(frame).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(str(error)) from error
    if len(body) > MOST_BYTES:
        raise Malformed(f"{len(body):,} bytes")
    return LENGTH.pack(len(body)) + body


def length(header: bytes, most: int = MOST_BYTES) -> int:
    (nbytes,) = LENGTH.unpack(header)
    if nbytes > most:
        raise Malformed(f"{nbytes:,} bytes")
    return int(nbytes)


def unpack(body: bytes) -> Frame:
    try:
        frame = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed("not JSON") from error
    if not isinstance(frame, dict):
        raise Malformed("not an object")
    return frame


def request_to_json(request: Request) -> dict[str, Any]:
    """Without its callbacks, which stay on their side."""
    names = [one.name for one in fields(Request) if one.name not in CALLBACKS]
    values = {name: getattr(request, name) for name in names}
    return {name: value for name, value in values.items() if value not in (None, ())}


def request_from_json(value: Any) -> Request:
    """OptionError for a value that is not allowed, as where the request was made."""
    if not isinstance(value, dict) or value.keys() - {one.name for one in fields(Request)}:
        raise Malformed("not a request")
    if value.keys() & set(CALLBACKS):
        raise Malformed("not a request")
    for name in LISTS:
        if not is_list_of(dict, value.get(name, [])):
            raise Malformed(name)
    if not isinstance(value.get("schema"), dict | None):
        raise Malformed("schema")
    return Request(**value)


def seconds_from_json(value: Any) -> float:
    if isinstance(value, (int, float)) and value >= 0:
        return float(value)
    raise Malformed("not a time")


def begin_frame(plan: Plan, lossy: list[str], warning: str | None) -> Frame:
    words = {"architecture": plan.architecture, "bits": plan.bits, "warning": warning}
    return {"begin": {**words, "lossy": lossy}}


def logprobs_frames(logprobs: list[dict[str, Any]]) -> Iterator[Frame]:
    for start in range(0, len(logprobs), LOGPROBS_IN_A_FRAME):
        yield {"logprobs": logprobs[start : start + LOGPROBS_IN_A_FRAME]}


def end_frame(stats: Stats, complete: bool) -> Frame:
    return {"end": {"stats": asdict(stats), "complete": complete}}


def event_to_json(event: Event) -> list[Any]:
    return [event.kind, event.text, event.index, event.call]


def event_from_json(value: Any) -> Event:
    match value:
        case ["text" | "reasoning" | "call_name" | "call" as kind, str(text), int(index), None]:
            return Event(kind, text, index)
        case ["call", str(text), int(index), {"name": str(), "arguments": dict()} as call]:
            return Event("call", text, index, call)
    raise Malformed("not an event")


def stats_from_json(value: Any) -> Stats:
    if not isinstance(value, dict):
        raise Malformed("not statistics")
    try:
        return Stats(**value)
    except TypeError as error:
        raise Malformed("not statistics") from error


def error_to_json(error: Exception) -> dict[str, Any]:
    if isinstance(error, FlashMoeError):
        remedy = error.remedy and error.remedy.name
        path = None if error.path is None else str(error.path)
        kind = type(error).__name__
        return {"kind": kind, "text": str(error), "remedy": remedy, "path": path}
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return {"kind": "FlashMoeError", "text": f"{place}{error.strerror or error}."}
    text = f"The process that holds the model failed: {type(error).__name__}: {error}."
    return {"kind": "FlashMoeError", "text": text}


def error_from_json(value: Any) -> FlashMoeError:
    match value:
        case {"kind": str(kind), "text": str(text)}:
            found = getattr(errors, kind, None)
            if not (isinstance(found, type) and issubclass(found, FlashMoeError)):
                found = FlashMoeError
            name, path = value.get("remedy"), value.get("path")
            remedy = Remedy[name] if isinstance(name, str) and name in Remedy.__members__ else None
            shown = "\n".join(map(printable, text.split("\n")))
            return found(shown, remedy, Path(path) if isinstance(path, str) else None)
    raise Malformed("not an error")


def is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(item, kind) for item in value)
