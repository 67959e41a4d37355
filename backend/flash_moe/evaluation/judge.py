"""Whether a reply is right: the criteria of a held-out dialogue's `check`, each true or false.

The figures count these, so they are strict: JSON in a code fence is not JSON, and a call without
its end is not a call.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from flash_moe.chat.event import Call
from flash_moe.chat.tool_calls import ToolFormat, is_call
from flash_moe.errors import OptionError
from flash_moe.evaluation.json_schema import canonical, check_schema, same, valid

Verdict = dict[str, bool]
END_OF_THOUGHTS = "</think>"
START_OF_THOUGHTS = "<think>"


def answer(text: str, prompt: str) -> str:
    """A reply without its thoughts; empty if it was cut off inside of them."""
    thinking = prompt.rfind(START_OF_THOUGHTS) > prompt.rfind(END_OF_THOUGHTS)
    _, end, rest = text.rpartition(END_OF_THOUGHTS)
    if end:
        return rest
    return "" if thinking or START_OF_THOUGHTS in rest else rest


def judge(
    text: str, check: dict[str, Any], tools: list[dict[str, Any]], tool_format: ToolFormat | None
) -> Verdict:
    """Judge an answer by its check: a text is `right`; JSON is `valid`, valid by its `schema`, and
    `equal` to the expected value; calls `parse`, and have the right `names` and `arguments`."""
    if "equals" in check:
        return {"right": _folded(text) == _folded(check["equals"])}
    if "contains" in check:
        return {"right": all(part.casefold() in text.casefold() for part in check["contains"])}
    if "schema" in check:
        return _judge_json(text, check)
    calls = None if tool_format is None else tool_format.calls(text, tools)
    return _judge_calls(calls, check["calls"])


def check_check(check: Any) -> None:
    """OptionError, unless `judge` can use it."""
    keys = set(check) if isinstance(check, dict) else None
    if keys not in ({"equals"}, {"contains"}, {"schema"}, {"json", "schema"}, {"calls"}):
        raise OptionError(
            f"{check!r:.80} is not a check: choose equals, contains, schema (with json) or calls."
        )
    if "schema" in check:
        check_schema(check["schema"])
    texts = [check["equals"]] if "equals" in check else check.get("contains", [])
    calls = check.get("calls", [])
    sound = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    if not sound or not isinstance(calls, list) or not all(map(is_call, calls)):
        raise OptionError(f"{check!r:.80} is not a check: its texts or calls are malformed.")


def parse_json(text: str) -> Any:
    """The value, or ValueError; also for NaN, which Python accepts and JSON does not have."""
    return json.loads(text.strip(), parse_constant=_refuse)


def _judge_json(text: str, check: dict[str, Any]) -> Verdict:
    """Without `json` the check expects no particular value."""
    equal = {"equal": False} if "json" in check else {}
    try:
        value = parse_json(text)
        if "json" in check:
            equal = {"equal": same(value, check["json"])}
        return {"valid": True, "schema": valid(value, check["schema"]), **equal}
    # RecursionError: a poor model may open brackets without end.
    except (ValueError, RecursionError):
        return {"valid": False, "schema": False, **equal}


def _judge_calls(calls: list[Call] | None, expected: list[Call]) -> Verdict:
    """In any order: calls that are made at once have none."""
    if calls is None or (expected and not calls):
        return {"parses": False, "names": False, "arguments": False}
    names = Counter(call["name"] for call in calls) == Counter(c["name"] for c in expected)
    return {"parses": True, "names": names, "arguments": _counted(calls) == _counted(expected)}


def _counted(calls: list[Call]) -> Counter[str]:
    return Counter(canonical([call["name"], call["arguments"]]) for call in calls)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
