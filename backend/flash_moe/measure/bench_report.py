"""The report of a benchmark: typed, as JSON for scripts, as tables for people, as one picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flash_moe.format.atomic import replacing
from flash_moe.machine import Machine
from flash_moe.measure.bench_picture import draw
from flash_moe.measure.bench_prompts import PromptCost
from flash_moe.measure.bench_tables import Table, parts_table, prompt_table, raw_table, token_table
from flash_moe.measure.bench_tokens import TokenCost
from flash_moe.measure.memory_limit import Held
from flash_moe.measure.raw_reads import Roofline
from flash_moe.model.load import StreamedModel


@dataclass(frozen=True, slots=True)
class Subject:
    """The model as it was measured. `token_bytes` are the experts that a token uses."""

    model: str
    architecture: str
    form: str
    layers: int
    experts: int
    experts_per_token: int
    bits: str
    runtime: str
    lossy: tuple[str, ...]
    expert_bytes: int
    resident_bytes: int
    bank_bytes: int
    token_bytes: int
    load_seconds: float

    @classmethod
    def of(cls, name: str, model: StreamedModel) -> Subject:
        plan = model.plan
        return cls(
            model=name,
            architecture=plan.architecture,
            form=plan.form,
            layers=plan.layers,
            experts=plan.experts,
            experts_per_token=plan.experts_per_token,
            bits=plan.bits,
            runtime=model.runtime.name,
            lossy=tuple(model.lossy),
            expert_bytes=plan.expert_bytes,
            resident_bytes=plan.resident_bytes,
            bank_bytes=plan.bank_bytes,
            token_bytes=plan.token_bytes,
            load_seconds=model.load_seconds,
        )


@dataclass(frozen=True, slots=True)
class BenchReport:
    """`no_eviction` says why nothing was measured cold."""

    subject: Subject
    machine: Machine
    held: Held | None
    roofline: Roofline
    tokens: tuple[TokenCost, ...]
    prompts: tuple[PromptCost, ...]
    no_eviction: str | None

    def to_json(self) -> dict[str, Any]:
        """Seconds, bytes, and bytes a second."""
        return {
            **asdict(self.subject),
            "lossy": list(self.subject.lossy),
            "machine": asdict(self.machine),
            "memory": None if self.held is None else asdict(self.held),
            "roofline": {**asdict(self.roofline), "disk": self.roofline.disk},
            "tokens": {cost.state: cost.to_json(self.roofline) for cost in self.tokens},
            "prompts": [cost.to_json() for cost in self.prompts],
            "left_out": list(self.left_out()),
        }

    def heading(self) -> list[str]:
        """Lines to print before the tables."""
        subject, machine = self.subject, self.machine
        lines = [
            f"{subject.model}: {subject.architecture}, {subject.layers} layers, "
            f"{subject.experts_per_token} of {subject.experts} experts a token, {subject.bits}, "
            f"{subject.runtime} runtime",
            f"  {subject.expert_bytes / 1e9:.1f} GB of experts, "
            f"{subject.token_bytes / 1e6:,.1f} MB of them a token; "
            f"{subject.resident_bytes / 1e9:.1f} GB resident, loaded in "
            f"{subject.load_seconds:.1f} s",
            f"  {machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 1e9:.0f} GB",
        ]
        if self.held is not None:
            lines.append(f"  held to {self.held.nbytes / 1e9:.1f} GB of memory by {_by(self.held)}")
        return lines + [f"  less exact: {reason}" for reason in subject.lossy]

    def tables(self) -> list[Table]:
        tables = [
            raw_table(self.roofline, self.subject.token_bytes),
            token_table(self.tokens, self.roofline),
            parts_table(self.tokens),
        ]
        return [*tables, prompt_table(self.prompts)] if self.prompts else tables

    def left_out(self) -> Iterator[str]:
        """Lines to print after the tables: what was not measured, and why."""
        if self.no_eviction:
            yield f"Nothing was measured cold: {self.no_eviction}."
        if self.roofline.direct is None:
            yield "This file system has no reads past the page cache."
        if any(cost.from_disk is None for cost in self.tokens):
            yield "This system does not tell what came from the disk, so floors are unknown."

    def write_picture(self, path: Path) -> None:
        """As SVG: every state's time by part, and its floor."""
        with replacing(path) as temporary:
            temporary.write_text(draw(self.subject.model, self.tokens, self.roofline), "utf-8")


def _by(held: Held) -> str:
    if held.by == "group":
        return "a control group"
    return f"a ballast of {held.ballast / 1e9:.1f} GB"
