"""How good a loaded model is: what it foresees, and what it replies, on data that it never saw.

One item after the other, in the data's order, greedily, through the code that replies to users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from flash_moe.chat.tool_calls import ToolFormat, tool_format
from flash_moe.engine import Engine
from flash_moe.errors import OptionError
from flash_moe.evaluation import likelihood
from flash_moe.evaluation.arrays import Array
from flash_moe.evaluation.cost import Meter
from flash_moe.evaluation.findings import Evaluation, Finding
from flash_moe.evaluation.held_out import Dialogue, HeldOut, Text
from flash_moe.evaluation.judge import answer, judge
from flash_moe.evaluation.likelihood import Watch, text_nats, token_nats
from flash_moe.evaluation.reference import Comparison, Foresight, Reference, key_of
from flash_moe.evaluation.replies import Expected, expected, grammar_of, greedy
from flash_moe.evaluation.resume import Unfinished
from flash_moe.evaluation.routing import Routing
from flash_moe.evaluation.spans import Marks, marks_of_reply, marks_of_text


@dataclass(frozen=True, slots=True)
class Wanted:
    """`constrained` holds replies to the schema that they are judged by, and calls to the tools;
    `keeping` keeps what was foreseen, for a reference; `against` compares it with one."""

    constrained: bool = False
    keeping: bool = False
    against: Reference | None = None


def evaluate(
    engine: Engine,
    held_out: HeldOut,
    progress: Callable[[int], None] = lambda items: None,
    wanted: Wanted = Wanted(),
    unfinished: Unfinished | None = None,
) -> Evaluation:
    """Measure everything in `held_out` that is not found in `unfinished`, where all findings go;
    `progress` is told of every item that is done."""
    if wanted.against is not None:
        _require_shared(engine, held_out, wanted.against)
    form = tool_format(engine.model.path, engine.tokenizer) if held_out.dialogues else None
    measuring = _Measuring(engine, form, wanted, Routing(engine.model.streamer))
    found = Evaluation(held_out, Routing(engine.model.streamer), wanted.against, wanted.constrained)
    for number, item in enumerate(held_out.items):
        finding = unfinished.get(number) if unfinished else None
        if finding is None:
            finding = measuring.measure(item)
            if unfinished:
                unfinished.put(number, finding)
        found.add(item, finding)
        progress(1)
    return found


@dataclass(frozen=True, slots=True)
class _Measuring:
    engine: Engine
    form: ToolFormat | None
    wanted: Wanted
    routing: Routing

    def measure(self, item: Text | Dialogue) -> Finding:
        start = time.perf_counter()
        finding = self._text(item) if isinstance(item, Text) else self._dialogue(item)
        finding.seconds = time.perf_counter() - start
        return finding

    def _text(self, text: Text) -> Finding:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        watches = _Watches(self.wanted, key := _text_key(self.engine, text))
        meter = Meter(model.streamer)
        with self.routing.watching():
            nats, tokens, nbytes = text_nats(model, tokenizer, text.text, watches.watch)
        found = Finding(key, nats, tokens, nbytes, prefill=meter.cost(tokens))
        found.arrays = watches.arrays(marks_of_text(tokens))
        found.arrays["routing"] = self.routing.taken()
        return found

    def _dialogue(self, dialogue: Dialogue) -> Finding:
        model, right = self.engine.model, expected(self.engine, dialogue)
        ids, first = [*right.prompt, *right.reply], len(right.prompt)
        watches = _Watches(self.wanted, key := _reply_key(right))
        meter = Meter(model.streamer)
        with self.routing.watching():
            nats = token_nats(model, ids, first, watches.watch)
        found = Finding(key, nats, len(right.reply), prefill=meter.cost(len(ids) - 1))
        marks = marks_of_reply(right.text, right.offsets, dialogue.section, self.form)
        found.arrays = watches.arrays(marks)
        found.arrays["routing"] = self.routing.taken()
        self._reply(dialogue, found)
        return found

    def _reply(self, dialogue: Dialogue, found: Finding) -> None:
        held = self.wanted.constrained
        grammar = grammar_of(self.engine, dialogue, self.form) if held else None
        given = greedy(self.engine, dialogue, grammar)
        text = answer(given.text, given.asked)
        found.verdict = judge(text, dialogue.check, dialogue.tools, self.form)
        found.decode, found.forced = given.cost, given.forced
        if grammar is not None:
            found.arrays["masses"] = np.array(given.masses)


class _Watches:
    """Those who look at what is said about one document, if anybody does: it costs a sort."""

    def __init__(self, wanted: Wanted, key: str) -> None:
        kept = wanted.against.find(key) if wanted.against else None
        self._all: list[Foresight | Comparison] = []
        if wanted.keeping:
            self._all.append(Foresight())
        if kept is not None:
            self._all.append(Comparison(kept))

    @property
    def watch(self) -> Watch | None:
        return self._tell if self._all else None

    def arrays(self, marks: Marks) -> dict[str, Array]:
        found = {name: array for one in self._all for name, array in one.arrays().items()}
        return {**found, "marks": marks} if "kl" in found else found

    def _tell(self, log_probabilities: mx.array, targets: Sequence[int]) -> None:
        for one in self._all:
            one(log_probabilities, targets)


def _require_shared(engine: Engine, held_out: HeldOut, reference: Reference) -> None:
    """Before hours are spent."""
    reference.require(engine.tokenizer)
    keys = (_text_key(engine, text) for text in held_out.texts)
    more = (_reply_key(expected(engine, dialogue)) for dialogue in held_out.dialogues)
    if not any(reference.find(key) for each in (keys, more) for key in each):
        raise OptionError(
            f"{reference.path} has none of these texts and dialogues. Give --data, --only and "
            "--limit as the reference had them, or save another one."
        )


def _text_key(engine: Engine, text: Text) -> str:
    return key_of(engine.tokenizer.encode(text.text), 1, likelihood.WINDOW)


def _reply_key(right: Expected) -> str:
    return key_of([*right.prompt, *right.reply], len(right.prompt))
