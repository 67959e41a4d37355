"""Measure one document after the other: what the model predicts, and what it replies.

In the data's order, greedily, and with the code that computes replies for users.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flash_moe.callbacks import Advance, no_advance
from flash_moe.chat.tool_calls import ToolFormat
from flash_moe.engine import Engine
from flash_moe.evaluation.arrays import Array
from flash_moe.evaluation.cost import Cost, Meter
from flash_moe.evaluation.documents import Document
from flash_moe.evaluation.held_out import Dialogue
from flash_moe.evaluation.likelihood import token_nats
from flash_moe.evaluation.limits import DEFAULT_LIMITS, Limits
from flash_moe.evaluation.predictions import Comparison, PredictionRecorder
from flash_moe.evaluation.reference import Reference
from flash_moe.evaluation.replies import grammar_for, greedy_reply, verdict_on
from flash_moe.evaluation.results import ItemResult
from flash_moe.evaluation.routing import RoutingCounter
from flash_moe.evaluation.run_state import RunState
from flash_moe.evaluation.totals import Totals


@dataclass(frozen=True, slots=True)
class Measurer:
    """`constrained` holds replies to the schema that they are judged by, and calls to the tools.
    `recording` records predictions, for a reference; `reference` is one to compare them with."""

    engine: Engine
    tool_format: ToolFormat | None = None
    limits: Limits = DEFAULT_LIMITS
    constrained: bool = False
    recording: bool = False
    reference: Reference | None = None

    def measure_all(
        self,
        documents: Sequence[Document],
        state: RunState | None = None,
        advance: Advance = no_advance,
    ) -> Totals:
        """Results that `state` has are taken from there, all others are measured and put there."""
        totals = Totals(self.engine.model.streamer.store.layers)
        for number, document in enumerate(documents):
            result = state.get(number) if state else None
            if result is None:
                result = self.measure(document)
                if state:
                    state.put(number, result)
            totals.add(document.item, result)
            advance(1)
        return totals

    def measure(self, document: Document) -> ItemResult:
        start = time.perf_counter()
        nats, prefill, arrays = self._predict(document)
        result = ItemResult(
            document.key, nats, document.tokens, document.nbytes, prefill=prefill, arrays=arrays
        )
        if isinstance(document.item, Dialogue):
            result = self._with_reply(result, document.item)
        return replace(result, seconds=time.perf_counter() - start)

    def _predict(self, document: Document) -> tuple[float, Cost, dict[str, Array]]:
        model, nats, observers = self.engine.model, 0.0, self._observers(document)
        counter, meter = RoutingCounter(model.streamer), Meter(model.streamer)
        with counter.counting():
            for piece in document.pieces:
                nats += token_nats(model, piece, document.first, observers, self.limits)
        cost = meter.cost(document.computed)
        arrays = {"routing": counter.row()}
        for observer in observers:
            arrays |= observer.arrays()
        return nats, cost, arrays | ({"marks": document.marks} if "kl" in arrays else {})

    def _observers(self, document: Document) -> list[PredictionRecorder | Comparison]:
        """None, if nothing is asked for: they cost a sort of the vocabulary for every token."""
        record = self.reference.find(document.key) if self.reference else None
        observers: list[PredictionRecorder | Comparison] = []
        if self.recording:
            observers.append(PredictionRecorder())
        if record is not None:
            observers.append(Comparison(record))
        return observers

    def _with_reply(self, result: ItemResult, dialogue: Dialogue) -> ItemResult:
        grammar = None
        if self.constrained:
            grammar = grammar_for(self.engine.tokenizer, dialogue, self.tool_format)
        reply = greedy_reply(self.engine, dialogue, self.limits.max_tokens, grammar)
        masses = {"masses": np.array(reply.allowed_masses)} if reply.allowed_masses else {}
        return replace(
            result,
            verdict=verdict_on(reply, dialogue, self.tool_format),
            forced=reply.forced_tokens,
            decode=reply.cost,
            arrays=result.arrays | masses,
        )
