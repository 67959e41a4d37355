"""The state of a conversation as plain data: a structure that JSON can hold, and arrays.

mlx-lm's caches differ by architecture (keys and values, windows, recurrent states, lists of
these), and mlx-lm cannot save all of them itself. But all have attributes of plain types, which
are taken from one cache and put into another.

MLX's arrays look immutable, but `keys[..., a:b, :] = new` changes the Python object in place. So a
snapshot shares nothing with a running cache: in both directions every array becomes a new object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from flash_moe.upstream import cache_types


class NotSaved(Exception):
    """A state cannot be saved or restored; the message tells the user why."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after `tokens`, computed in chunks that end at `ends`."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    structure: list[Any]
    arrays: list[mx.array]

    @property
    def nbytes(self) -> int:
        # An int of CPython and its slot in the tuple take at most 36 bytes.
        return sum(array.nbytes for array in self.arrays) + 36 * len(self.tokens)

    def holds(self, ids: Sequence[int], ends: Sequence[int]) -> bool:
        """Whether this is the state of a prompt's start, cut in the same places."""
        count = len(self.tokens)
        return self.tokens == tuple(ids[:count]) and self.ends == tuple(
            end for end in ends if end <= count
        )


def take(cache: list[Any], tokens: Sequence[int], ends: Sequence[int]) -> Snapshot:
    """Copy a running cache, evaluated; NotSaved if it holds an unknown type."""
    arrays: list[mx.array] = []
    structure = [_take(layer, arrays) for layer in cache]
    mx.eval(arrays)
    return Snapshot(tuple(tokens), tuple(ends), structure, arrays)


def put(snapshot: Snapshot, cache: list[Any]) -> None:
    """Bring a new cache of the same model into the state of a snapshot, which does not change."""
    if len(cache) != len(snapshot.structure):
        raise NotSaved(f"the state has {len(snapshot.structure)} layers, the model {len(cache)}")
    try:
        for saved, layer in zip(snapshot.structure, cache, strict=True):
            _restore(saved, layer, snapshot.arrays)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NotSaved(str(error)) from error


def _take(value: Any, arrays: list[mx.array]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, mx.array):
        arrays.append(mx.contiguous(value))
        return {"array": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_take(item, arrays) for item in value]}
    if hasattr(type(value), "state"):
        fields = {name: _take(item, arrays) for name, item in vars(value).items()}
        _trim(value, fields, arrays)
        return {"class": type(value).__name__, "fields": fields}
    raise NotSaved(f"the state contains a {type(value).__name__}")


def _trim(layer: Any, fields: dict[str, Any], arrays: list[mx.array]) -> None:
    """Leave out the room that keys and values have to grow. Its size is saved, because the same
    arithmetic needs the same layout in memory."""
    used = _used(layer)
    for name in ("keys", "values"):
        if used is not None and fields.get(name) is not None:
            number = fields[name]["array"]
            whole = getattr(layer, name)
            fields[name]["room"] = whole.shape[2]
            arrays[number] = mx.contiguous(whole[:, :, :used])


def _used(layer: Any) -> int | None:
    """How many positions of its keys and values are in use; None if all are."""
    # By exact type: a subclass may have another layout, and is saved without trimming.
    kind, (kv_cache, chunked) = type(layer), cache_types()
    if kind is kv_cache:
        return int(layer.offset)
    if kind is chunked:
        return int(layer.offset - layer.start_position)
    return None


def _restore(saved: Any, current: Any, arrays: list[mx.array]) -> Any:
    if not isinstance(saved, dict):
        return saved
    if "array" in saved:
        return _array(arrays[saved["array"]], saved.get("room"))
    if "class" in saved:
        if type(current).__name__ != saved["class"]:
            raise NotSaved(
                f"the state has a {saved['class']}, the model a {type(current).__name__}"
            )
        for name, item in saved["fields"].items():
            setattr(current, name, _restore(item, getattr(current, name, None), arrays))
        return current
    items = saved["list"] if "list" in saved else saved["tuple"]
    matches = isinstance(current, (list, tuple)) and len(current) == len(items)
    targets = current if matches else [None] * len(items)
    restored = [_restore(item, old, arrays) for item, old in zip(items, targets, strict=True)]
    return restored if "list" in saved else tuple(restored)


def _array(array: mx.array, room: int | None) -> mx.array:
    if room is None or room <= array.shape[2]:
        return mx.contiguous(array)
    rest = mx.zeros((*array.shape[:2], room - array.shape[2], *array.shape[3:]), array.dtype)
    return mx.concatenate([array, rest], axis=2)
