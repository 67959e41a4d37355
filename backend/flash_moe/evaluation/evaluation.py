"""Evaluate a model: how well it predicts, and what it replies, on data that it has never seen.

    with Evaluation(path, settings, sections=("text",), save=file) as evaluation:
        report = evaluation.run()

Whatever is wrong with data or files is reported before the model is loaded. An evaluation
that is interrupted keeps its results in `state_folder`, and the same one resumes from them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from flash_moe.built_in import HELD_OUT
from flash_moe.callbacks import Advance, Progress, no_advance, no_progress
from flash_moe.chat.tokenizer import ChatTokenizer, load_tokenizer
from flash_moe.chat.tool_calls import ToolFormat, find_tool_format
from flash_moe.engine import Engine
from flash_moe.errors import OptionError, Remedy
from flash_moe.evaluation.documents import Document, make_document
from flash_moe.evaluation.held_out import HeldOut, read_held_out
from flash_moe.evaluation.limits import DEFAULT_LIMITS, Limits
from flash_moe.evaluation.measure import Measurer
from flash_moe.evaluation.parts import Subject
from flash_moe.evaluation.reference import Reference, write_reference
from flash_moe.evaluation.replies import grammar_for
from flash_moe.evaluation.report import Report
from flash_moe.evaluation.run_state import RunState, SavedPredictions, key_of_run
from flash_moe.format.atomic import require_target
from flash_moe.model.load import load
from flash_moe.options import EVALUATION_SECTIONS, Settings, user_options


class Evaluation:
    """Owns a loaded model: use it in a `with`, in one thread.

    `data` is a folder with text.jsonl and dialogues.jsonl (None: that of the built-in model), of
    which `sections` are measured, and at most `limit` texts and dialogues of each kind. With
    `constrained`, replies are held to their schema and calls to the tools. `save` is a file for the
    predictions, `against` such a file to compare with, `routing` a file for how often each expert
    was chosen. `about` replaces fields of the report's subject, such as the model's name.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings = Settings(),
        *,
        about: Mapping[str, Any] | None = None,
        data: Path | None = None,
        sections: Iterable[str] = EVALUATION_SECTIONS,
        limit: int | None = None,
        constrained: bool = False,
        save: Path | None = None,
        against: Path | None = None,
        routing: Path | None = None,
        state_folder: Path | None = None,
        progress: Progress = no_progress,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        held_out = read_held_out(data or HELD_OUT, sections, limit)
        self._save, self._routing = require_target(save), require_target(routing)
        reference = None if against is None else Reference(against)
        tokenizer = load_tokenizer(path)
        if reference is not None:
            reference.require(tokenizer)
        tool_format = find_tool_format(path, tokenizer) if held_out.dialogues else None
        if constrained:
            _require_grammars(held_out, tokenizer, tool_format)
        self._documents = [
            make_document(tokenizer, item, tool_format, limits.window) for item in held_out.items
        ]
        if reference is not None:
            _require_shared(self._documents, reference)
        with ExitStack() as stack:
            engine = Engine(load(path, settings, progress), tokenizer)
            stack.callback(engine.close)
            self._measurer = Measurer(
                engine, tool_format, limits, constrained, save is not None, reference
            )
            subject = _describe(engine, settings, held_out, limit, constrained)
            self._subject = replace(subject, **about or {})
            if state_folder is None:
                state_folder = Path(stack.enter_context(TemporaryDirectory()))
            state = RunState(state_folder, self._key(held_out))
            self._state = stack.enter_context(state)
            self._open = stack.pop_all()

    @property
    def done(self) -> int:
        """How many items have results already, from a run that was interrupted."""
        return self._state.done

    @property
    def total(self) -> int:
        return len(self._documents)

    def run(self, advance: Advance = no_advance) -> Report:
        """Measure what is not done, and write the files; `advance` hears of every item, of those
        that were done before, too."""
        totals = self._measurer.measure_all(self._documents, self._state, advance)
        report = totals.report(self._subject, self._measurer.reference)
        if self._save is not None:
            predictions = SavedPredictions(self._state, self.total)
            tokenizer = self._measurer.engine.tokenizer
            write_reference(self._save, self._subject.to_json(), tokenizer, predictions)
        if self._routing is not None:
            report.write_routing(self._routing)
        self._state.clear()
        return report

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Evaluation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _key(self, held_out: HeldOut) -> str:
        measurer = self._measurer
        digest = measurer.reference.digest if measurer.reference else None
        more = self._subject.to_json(), measurer.recording, digest, asdict(measurer.limits)
        return key_of_run(measurer.engine, held_out, *more)


def _describe(
    engine: Engine, settings: Settings, held_out: HeldOut, limit: int | None, constrained: bool
) -> Subject:
    plan, path = engine.plan, engine.model.path
    values = {name: getattr(settings, name) for name in user_options(Settings)}
    return Subject(
        model=path.name,
        path=str(path),
        architecture=plan.architecture,
        experts_per_token=plan.experts_per_token,
        own_experts_per_token=plan.own_experts_per_token,
        bits=plan.bits,
        lossy=engine.lossy,
        runtime=engine.model.runtime.name,
        options={name: value for name, value in values.items() if value is not None},
        data=str(held_out.folder),
        limit=limit,
        constrained=constrained,
    )


def _require_grammars(
    held_out: HeldOut, tokenizer: ChatTokenizer, tool_format: ToolFormat | None
) -> None:
    """OptionError, if a reply cannot be held to its schema or its tools."""
    for dialogue in held_out.dialogues:
        grammar_for(tokenizer, dialogue, tool_format)


def _require_shared(documents: list[Document], reference: Reference) -> None:
    if not any(reference.find(document.key) for document in documents):
        raise OptionError(
            f"{reference.path} has none of these texts and dialogues.", Remedy.EVALUATE_SAME_DATA
        )
