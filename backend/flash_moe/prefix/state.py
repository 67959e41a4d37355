"""The state of a conversation as plain data: a structure that JSON can hold, and arrays.

mlx-lm's caches differ by architecture (keys and values, windows, recurrent states, lists of
these), and not all can be saved by mlx-lm's own means; what all have is attributes of plain types,
so these are what is taken and put back.

MLX's arrays look immutable, but `keys[..., a:b, :] = new` changes the Python object in place. So
nothing is shared with a running cache: on both ways every array becomes another object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


class NotKept(Exception):
    """A state that holds what we do not know, or that does not fit the model."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after `tokens`, computed in chunks that end at `ends`."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    structure: list[Any]
    arrays: list[mx.array]

    @property
    def nbytes(self) -> int:
        # A small integer of CPython and its place in the tuple take no more than 36.
        return sum(array.nbytes for array in self.arrays) + 36 * len(self.tokens)

    def holds(self, ids: Sequence[int], ends: Sequence[int]) -> bool:
        """Whether this is the state of a prompt's start, cut in the same way."""
        count = len(self.tokens)
        return self.tokens == tuple(ids[:count]) and self.ends == tuple(
            end for end in ends if end <= count
        )


def take(cache: list[Any], tokens: Sequence[int], ends: Sequence[int]) -> Snapshot:
    """Copy a running cache, evaluated; NotKept if it holds what we do not know."""
    arrays: list[mx.array] = []
    structure = [_taken(layer, arrays) for layer in cache]
    mx.eval(arrays)
    return Snapshot(tuple(tokens), tuple(ends), structure, arrays)


def put(snapshot: Snapshot, cache: list[Any]) -> None:
    """Bring a new cache of the same model into the state of a snapshot, which stays as it is."""
    if len(cache) != len(snapshot.structure):
        raise NotKept(f"{len(snapshot.structure)} layers for {len(cache)}")
    try:
        for saved, layer in zip(snapshot.structure, cache, strict=True):
            _restore(saved, layer, snapshot.arrays)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise NotKept(str(error)) from error


def _taken(value: Any, arrays: list[mx.array]) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, mx.array):
        arrays.append(mx.contiguous(value))
        return {"array": len(arrays) - 1}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_taken(item, arrays) for item in value]}
    if hasattr(type(value), "state"):
        fields = {name: _taken(item, arrays) for name, item in vars(value).items()}
        _cut(value, fields, arrays)
        return {"class": type(value).__name__, "fields": fields}
    raise NotKept(f"a {type(value).__name__}")


def _cut(layer: Any, fields: dict[str, Any], arrays: list[mx.array]) -> None:
    """Leave out the room that keys and values have to grow; its size is remembered, because the
    same arithmetic wants the same layout in memory."""
    used = _used(layer)
    for name in ("keys", "values"):
        if used is not None and fields.get(name) is not None:
            place = fields[name]["array"]
            whole = getattr(layer, name)
            fields[name]["room"] = whole.shape[2]
            arrays[place] = mx.contiguous(whole[:, :, :used])


def _used(layer: Any) -> int | None:
    from mlx_lm.models.cache import ChunkedKVCache, KVCache

    # By exact type: a subclass may lay things out otherwise, and is then taken whole.
    if type(layer) is KVCache:
        return int(layer.offset)
    if type(layer) is ChunkedKVCache:
        return int(layer.offset - layer.start_position)
    return None


def _restore(saved: Any, current: Any, arrays: list[mx.array]) -> Any:
    if not isinstance(saved, dict):
        return saved
    if "array" in saved:
        return _array(arrays[saved["array"]], saved.get("room"))
    if "class" in saved:
        if type(current).__name__ != saved["class"]:
            raise NotKept(f"a {saved['class']} for a {type(current).__name__}")
        for name, item in saved["fields"].items():
            setattr(current, name, _restore(item, getattr(current, name, None), arrays))
        return current
    items = saved["list"] if "list" in saved else saved["tuple"]
    known = isinstance(current, (list, tuple)) and len(current) == len(items)
    places = current if known else [None] * len(items)
    found = [_restore(item, place, arrays) for item, place in zip(items, places, strict=True)]
    return found if "list" in saved else tuple(found)


def _array(array: mx.array, room: int | None) -> mx.array:
    if room is None or room <= array.shape[2]:
        return mx.contiguous(array)
    rest = mx.zeros((*array.shape[:2], room - array.shape[2], *array.shape[3:]), array.dtype)
    return mx.concatenate([array, rest], axis=2)
