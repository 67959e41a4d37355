"""The results of one text or dialogue, as measured and as written to disk."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flash_moe.evaluation.arrays import Array
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.judge import Verdict


@dataclass(frozen=True, slots=True)
class ItemResult:
    """`nats` is the log loss of its `tokens`, which stand for `nbytes` of text. Dialogues have a
    `verdict` on the model's own reply, and how many of its tokens a grammar `forced`.

    `arrays` are the routing's counts; under a grammar the probability `masses` that it allowed;
    the columns of predictions.RECORDED and of COMPARED, if asked for, the latter with span marks.
    """

    key: str
    nats: float
    tokens: int
    nbytes: int = 0
    verdict: Verdict | None = None
    forced: int = 0
    prefill: Cost = field(default_factory=Cost)
    decode: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    arrays: dict[str, Array] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the arrays."""
        value = asdict(replace(self, arrays={}))
        del value["arrays"]
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any], arrays: dict[str, Array]) -> ItemResult:
        costs = {name: Cost(**value[name]) for name in ("prefill", "decode")}
        return cls(**{**value, **costs}, arrays=arrays)
