"""What was found: of one text or dialogue, and of all of them together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from flash_moe.evaluation.arrays import Array
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.figures import figure, mean, quantile
from flash_moe.evaluation.held_out import Dialogue, HeldOut, Text
from flash_moe.evaluation.judge import Verdict
from flash_moe.evaluation.likelihood import Surprise
from flash_moe.evaluation.reference import COMPARED, Reference
from flash_moe.evaluation.routing import Routing
from flash_moe.evaluation.spans import SPANS, inside


@dataclass(slots=True)
class Finding:
    """Of one item. `arrays` has the routing's counts; the masses that a grammar left, if there was
    one; what was foreseen, if it is to be kept; and how it compares, if it was compared."""

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
        found = asdict(self)
        del found["arrays"]
        return found

    @classmethod
    def from_json(cls, value: dict[str, Any], arrays: dict[str, Array]) -> Finding:
        costs = {name: Cost(**value[name]) for name in ("prefill", "decode")}
        return cls(**{**value, **costs}, arrays=arrays)


@dataclass(slots=True)
class Evaluation:
    """What was found so far. Everything here is small: what was foreseen stays on the disk."""

    held_out: HeldOut
    routing: Routing
    reference: Reference | None = None
    constrained: bool = False
    texts: dict[str, Surprise] = field(default_factory=dict)
    replies: dict[str, Surprise] = field(default_factory=dict)
    verdicts: list[tuple[Dialogue, Verdict]] = field(default_factory=list)
    compared: list[dict[str, Array]] = field(default_factory=list)
    masses: list[tuple[str, Array]] = field(default_factory=list)
    forced: int = 0
    prefill: Cost = field(default_factory=Cost)
    decode: Cost = field(default_factory=Cost)
    seconds: float = 0.0

    def add(self, item: Text | Dialogue, found: Finding) -> None:
        """In the data's order, so that sums are the same to the bit whoever made the findings."""
        self.routing.add(found.arrays["routing"])
        self.prefill.add(found.prefill)
        self.decode.add(found.decode)
        self.seconds += found.seconds
        self.forced += found.forced
        part = {
            name: np.array(found.arrays[name])
            for name in (*COMPARED, "marks")
            if name in found.arrays
        }
        if "kl" in part:
            self.compared.append(part)
        if isinstance(item, Text):
            by_source = self.texts.setdefault(item.source, Surprise())
            by_source.add(found.nats, found.tokens, found.nbytes)
            return
        self.replies.setdefault(item.kind, Surprise()).add(found.nats, found.tokens)
        self.verdicts.append((item, found.verdict or {}))
        if len(masses := found.arrays.get("masses", ())):
            self.masses.append((item.section, np.array(masses)))

    def to_json(self) -> dict[str, Any]:
        return {
            "items": len(self.held_out),
            "seconds": round(self.seconds, 2),
            **({"text": self._perplexities(self.texts, "sources")} if self.texts else {}),
            **self._sections(),
            **({"replies": self._perplexities(self.replies, "kinds")} if self.replies else {}),
            **({"allowed_mass": self._allowed()} if self.constrained else {}),
            **({"against": self._against(self.reference)} if self.reference else {}),
            "routing": self.routing.summary(),
            "cost": {"prefill": self.prefill.to_json(), "decode": self.decode.to_json()},
        }

    def _perplexities(self, parts: dict[str, Surprise], by: str) -> dict[str, Any]:
        return {
            **_total(parts.values()).to_json(),
            by: {name: part.to_json() for name, part in parts.items()},
        }

    def _sections(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for section in dict.fromkeys(dialogue.section for dialogue, _ in self.verdicts):
            inside = [(d, v) for d, v in self.verdicts if d.section == section]
            kinds = dict.fromkeys(dialogue.kind for dialogue, _ in inside)
            found[section] = {
                **shares(verdict for _, verdict in inside),
                "kinds": {kind: shares(v for d, v in inside if d.kind == kind) for kind in kinds},
            }
        return found

    def _allowed(self) -> dict[str, Any]:
        """How much of the probability the grammars left, of the tokens that the model chose under
        one. Of forced tokens, which nobody asked the model for, there is none to know."""
        sections = dict.fromkeys(section for section, _ in self.masses)
        return {
            **allowed([masses for _, masses in self.masses]),
            "forced_tokens": self.forced,
            "sections": {
                name: allowed([masses for section, masses in self.masses if section == name])
                for name in sections
            },
        }

    def _against(self, reference: Reference) -> dict[str, Any]:
        everything = [np.ones(len(part["kl"]), np.bool_) for part in self.compared]
        spans = {
            span: _compared(self.compared, [inside(part["marks"], span) for part in self.compared])
            for span in SPANS
        }
        return {
            "file": str(reference.path),
            "reference": reference.model,
            "documents_compared": len(self.compared),
            **_compared(self.compared, everything),
            "spans": {span: found for span, found in spans.items() if found},
        }


def shares(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """Of every name in the verdicts: how many have it, how many of them say yes, and the share."""
    found: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, yes in verdict.items():
            found.setdefault(name, []).append(yes)
    return {name: _share(sum(answers), len(answers)) for name, answers in found.items()}


def allowed(replies: Sequence[Array]) -> dict[str, Any]:
    """A reply each. Of a p1 of 0.2, one token in a hundred had less left than that."""
    found: dict[str, Any] = {"tokens": sum(len(masses) for masses in replies)}
    if replies:
        found["mean"] = figure("value", mean(replies))
        found["p1"] = figure("value", quantile(replies, 0.01))
    return found


def _compared(parts: Sequence[dict[str, Array]], places: Sequence[Array]) -> dict[str, Any]:
    """Of the tokens at some places, a document each; nothing if there are none."""
    chosen = [(part, here) for part, here in zip(parts, places, strict=True) if here.any()]
    if not chosen:
        return {}
    kl, same, more = ([part[name][here] for part, here in chosen] for name in COMPARED)
    tokens = sum(len(values) for values in kl)
    return {
        "kl": figure("value", mean(kl)),
        "kl_p99": figure("value", quantile(kl, 0.99)),
        "agreement": {**figure("share", mean(same)), "of": tokens},
        "nats_more": figure("value", mean(more)),
        "tokens": tokens,
        "documents": len(chosen),
    }


def _share(yes: int, of: int) -> dict[str, Any]:
    share = yes / of
    return {"share": share, "standard_error": math.sqrt(share * (1 - share) / of), "of": of}


def _total(parts: Iterable[Surprise]) -> Surprise:
    total = Surprise()
    for part in parts:
        total.nats += part.nats
        total.tokens += part.tokens
        total.nbytes += part.nbytes
    return total
