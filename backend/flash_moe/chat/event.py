"""One piece of a reply, as it is made. Needs no MLX: other processes are sent them, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Call = dict[str, Any]  # {"name", "arguments"}


@dataclass(frozen=True, slots=True)
class Event:
    """Text and reasoning come in pieces. A call comes twice: by name as soon as that is known, and
    with its arguments once it is complete; `index` numbers the calls of a reply."""

    kind: Literal["text", "reasoning", "call_name", "call"]
    text: str = ""
    index: int = 0
    call: Call | None = None
