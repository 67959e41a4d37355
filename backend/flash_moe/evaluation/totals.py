"""The results of all items together, and the figures computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from flash_moe.checkpoint.locations import ExpertLayer
from flash_moe.evaluation.arrays import Array
from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.figures import Estimate, mean, quantile
from flash_moe.evaluation.held_out import Dialogue, Item, Text
from flash_moe.evaluation.judge import Verdict
from flash_moe.evaluation.likelihood import LogLoss
from flash_moe.evaluation.parts import (
    Against,
    AllowedMass,
    AllowedMasses,
    Divergence,
    Perplexities,
    Perplexity,
    Replies,
    Share,
    Shares,
    Subject,
)
from flash_moe.evaluation.predictions import COMPARED
from flash_moe.evaluation.reference import Reference
from flash_moe.evaluation.report import Report
from flash_moe.evaluation.results import ItemResult
from flash_moe.evaluation.routing import Routing
from flash_moe.evaluation.spans import SPANS, inside


class Totals:
    """Of the items added so far. Small: predictions stay on the disk."""

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._layers = layers
        self._routing = np.zeros(sum(layer.experts for layer in layers), np.int64)
        self._texts: dict[str, LogLoss] = {}
        self._replies: dict[str, LogLoss] = {}
        self._verdicts: list[tuple[Dialogue, Verdict]] = []
        self._compared: list[dict[str, Array]] = []
        self._masses: list[tuple[str, Array]] = []
        self._forced = 0
        self._prefill = self._decode = Cost()
        self._items, self._seconds = 0, 0.0

    def add(self, item: Item, result: ItemResult) -> None:
        """In the data's order, so that sums are the same to the bit however often an evaluation
        was interrupted."""
        self._items += 1
        self._seconds += result.seconds
        self._prefill += result.prefill
        self._decode += result.decode
        self._routing += result.arrays["routing"].astype(np.int64)
        if "kl" in result.arrays:
            columns = (*COMPARED, "marks")
            self._compared.append({name: np.array(result.arrays[name]) for name in columns})
        if isinstance(item, Text):
            loss = self._texts.setdefault(item.source, LogLoss())
            loss.add(result.nats, result.tokens, result.nbytes)
        else:
            self._replies.setdefault(item.kind, LogLoss()).add(result.nats, result.tokens)
            self._add_reply(item, result)

    def _add_reply(self, dialogue: Dialogue, result: ItemResult) -> None:
        self._verdicts.append((dialogue, result.verdict or {}))
        self._forced += result.forced
        if len(masses := result.arrays.get("masses", ())):
            self._masses.append((dialogue.section, np.array(masses)))

    def report(self, subject: Subject, reference: Reference | None = None) -> Report:
        return Report(
            subject=subject,
            items=self._items,
            seconds=self._seconds,
            text=_perplexities(self._texts),
            sections=self._sections(),
            replies=_perplexities(self._replies),
            allowed_mass=self._allowed() if subject.constrained else None,
            against=None if reference is None else self._against(reference),
            routing=Routing.from_row(self._layers, self._routing),
            prefill=self._prefill,
            decode=self._decode,
        )

    def _sections(self) -> dict[str, Replies]:
        sections: dict[str, list[tuple[str, Verdict]]] = {}
        for dialogue, verdict in self._verdicts:
            sections.setdefault(dialogue.section, []).append((dialogue.kind, verdict))
        return {section: _replies(verdicts) for section, verdicts in sections.items()}

    def _allowed(self) -> AllowedMasses:
        sections: dict[str, list[Array]] = {}
        for section, masses in self._masses:
            sections.setdefault(section, []).append(masses)
        return AllowedMasses(
            allowed_mass([masses for _, masses in self._masses]),
            self._forced,
            {section: allowed_mass(replies) for section, replies in sections.items()},
        )

    def _against(self, reference: Reference) -> Against:
        spans = {span: self._divergence(span) for span in SPANS}
        return Against(
            reference.path,
            reference.model,
            len(self._compared),
            self._divergence(),
            {span: divergence for span, divergence in spans.items() if divergence},
        )

    def _divergence(self, span: str | None = None) -> Divergence | None:
        """Of the tokens inside of a span, or of all; None if there are none."""
        parts = []
        for part in self._compared:
            marks = part["marks"]
            here = np.ones(len(marks), np.bool_) if span is None else inside(marks, span)
            if here.any():
                parts.append([part[name][here] for name in COMPARED])
        if not parts:
            return None
        kl, same, more = zip(*parts, strict=True)
        tokens = sum(len(values) for values in kl)
        agreement = Share(mean(same), tokens)
        return Divergence(mean(kl), quantile(kl, 0.99), agreement, mean(more), len(parts))


def shares(verdicts: Iterable[Verdict]) -> Shares:
    """For every name in the verdicts: how often it is true, of those that have it."""
    answers: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, yes in verdict.items():
            answers.setdefault(name, []).append(yes)
    return {name: _share(sum(yes), len(yes)) for name, yes in answers.items()}


def allowed_mass(replies: Sequence[Array]) -> AllowedMass:
    """The masses of each reply."""
    tokens = sum(len(masses) for masses in replies)
    if not replies:
        return AllowedMass(tokens)
    return AllowedMass(tokens, mean(replies), quantile(replies, 0.01))


def perplexity_of(loss: LogLoss) -> Perplexity:
    return Perplexity(
        loss.perplexity, len(loss.nats), sum(loss.tokens), loss.bits_per_byte, loss.nbytes
    )


def _perplexities(losses: dict[str, LogLoss]) -> Perplexities | None:
    if not losses:
        return None
    total = LogLoss()
    for loss in losses.values():
        total.extend(loss)
    parts = {name: perplexity_of(loss) for name, loss in losses.items()}
    return Perplexities(perplexity_of(total), parts)


def _replies(verdicts: Sequence[tuple[str, Verdict]]) -> Replies:
    """Verdicts with the kinds of their dialogues."""
    kinds: dict[str, list[Verdict]] = {}
    for kind, verdict in verdicts:
        kinds.setdefault(kind, []).append(verdict)
    total = shares(verdict for _, verdict in verdicts)
    return Replies(total, {kind: shares(part) for kind, part in kinds.items()})


def _share(yes: int, of: int) -> Share:
    share = yes / of
    return Share(Estimate(share, math.sqrt(share * (1 - share) / of)), of)
