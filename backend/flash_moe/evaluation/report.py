"""The report of an evaluation: typed, as JSON for scripts, and as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.parts import Against, AllowedMasses, Perplexities, Replies, Subject
from flash_moe.evaluation.routing import Routing
from flash_moe.evaluation.tables import (
    Table,
    allowed_table,
    cost_line,
    divergence_table,
    perplexity_table,
    verdict_table,
)
from flash_moe.format.atomic import write_json


@dataclass(frozen=True, slots=True)
class Report:
    """Parts are None where nothing of that kind was measured. `replies` are the log losses of right
    replies, `sections` the verdicts on the model's own."""

    subject: Subject
    items: int
    seconds: float
    text: Perplexities | None
    sections: Mapping[str, Replies]
    replies: Perplexities | None
    allowed_mass: AllowedMasses | None
    against: Against | None
    routing: Routing
    prefill: Cost
    decode: Cost

    def to_json(self) -> dict[str, Any]:
        return {
            **self.subject.to_json(),
            "items": self.items,
            "seconds": round(self.seconds, 2),
            **({"text": self.text.to_json("sources")} if self.text else {}),
            **{name: replies.to_json() for name, replies in self.sections.items()},
            **({"replies": self.replies.to_json("kinds")} if self.replies else {}),
            **({"allowed_mass": self.allowed_mass.to_json()} if self.allowed_mass else {}),
            **({"against": self.against.to_json()} if self.against else {}),
            "routing": self.routing.summary(),
            "cost": {"prefill": self.prefill.to_json(), "decode": self.decode.to_json()},
        }

    def heading(self) -> list[str]:
        """Lines to print before the tables."""
        subject = self.subject
        line = (
            f"{subject.model}: {subject.architecture}, {subject.bits}, "
            f"{subject.experts_per_token} experts a token, {subject.runtime} runtime"
        )
        grammars = ", constrained" if subject.constrained else ""
        return [line + grammars, *(f"  less exact: {reason}" for reason in subject.lossy)]

    def tables(self) -> list[Table]:
        tables = [
            perplexity_table(self.text, self.replies),
            divergence_table(self.against, self.items),
            verdict_table(self.sections),
            allowed_table(self.allowed_mass),
        ]
        return [table for table in tables if table.title or table.rows]

    def summary(self) -> list[str]:
        """Lines to print after the tables."""
        routing, costs = self.routing, {"Predicting": self.prefill, "Replying": self.decode}
        return [
            f"Routing entropy: {routing.entropy_bits:.2f} of {routing.most_bits:.2f} bits; "
            f"experts never used: {routing.unused_experts:,}. "
            f"{self.items} items in {self.seconds:.1f} s.",
            *(cost_line(title, cost) for title, cost in costs.items() if cost.tokens),
        ]

    def write_routing(self, path: Path) -> None:
        """How often each expert was chosen, as JSON."""
        write_json(path, {**self.subject.to_json(), **self.routing.to_json()})
