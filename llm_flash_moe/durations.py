"""Durations as people write them: 30m, 1h30m, 90 (seconds); 0; -1 for ever."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {"h": 3600, "m": 60, "s": 1}
_LONGEST = 3650 * 24 * 3600
_PART = r"(\d+(?:\.\d+)?)([hms])"


def parse_duration(value: Any) -> float:
    """Seconds, infinite for what is below zero; ValueError, with what to write instead."""
    text = str(value).strip().lower()
    if re.fullmatch(rf"-?(?:{_PART})+", text):
        parts = re.findall(_PART, text)
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif re.fullmatch(r"-?\d+(\.\d+)?", text):
        seconds = float(text)
    else:
        raise ValueError("choose a time such as 10m, 1h30m or 90 (seconds); 0; or -1 for ever")
    below_zero = text.startswith("-") and seconds != 0
    return math.inf if below_zero or seconds > _LONGEST else abs(seconds)


def in_words(seconds: float) -> str:
    """Of at least a few seconds: `25 s`, `10 min`, `1 h 30 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    words = [f"{hours} h"] * bool(hours) + [f"{rest} min"] * bool(rest)
    return " ".join(words)
