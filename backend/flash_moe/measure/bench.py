"""Measures where a model's time goes on this machine, and what the machine could do.

    report = Benchmark(path, memory=16_000_000_000).run()
    print(*report.heading(), sep="\n")

Whatever is wrong with the arguments is reported before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from flash_moe.callbacks import Notice, no_notice
from flash_moe.errors import OptionError
from flash_moe.format.atomic import require_target
from flash_moe.inspection import Checkpoint
from flash_moe.machine import inspect_machine
from flash_moe.measure.bench_prompts import PromptCost, measure_prompt
from flash_moe.measure.bench_report import BenchReport, Subject
from flash_moe.measure.bench_tokens import TokenBench
from flash_moe.measure.eviction import Eviction
from flash_moe.measure.memory_limit import Held, held_to, require_sense
from flash_moe.measure.raw_reads import measure_roofline, memory_copy
from flash_moe.model.load import StreamedModel, load
from flash_moe.native.build import announcing
from flash_moe.options import Settings


class Benchmark:
    """`tokens` of each state count. `prompts` are lengths. `memory`: bytes to hold the machine to,
    page cache included. `picture` is a file to draw the report into, `name` what it calls the
    model."""

    def __init__(
        self,
        path: Path,
        settings: Settings = Settings(),
        *,
        name: str = "",
        tokens: int = 8,
        prompts: Sequence[int] = (32, 512),
        memory: int | None = None,
        picture: Path | None = None,
    ) -> None:
        self._picture = require_target(picture)
        if tokens < 1:
            raise OptionError(f"tokens={tokens}: choose 1 or more.")
        if wrong := [length for length in prompts if length < 1]:
            raise OptionError(f"prompts={wrong[0]}: choose 1 token or more.")
        plan = Checkpoint(path).plan(settings.experts)
        if memory is not None:
            available = inspect_machine().page_cache_bytes
            require_sense(memory, plan.resident_bytes + plan.bank_bytes, available)
            # As a machine of that size would be loaded with.
            if settings.mapped_bytes is None:
                settings = replace(settings, mapped_bytes=memory // 2)
        self._path, self._settings, self._name = path, settings, name or path.name
        self._tokens, self._prompts, self._memory = tokens, tuple(prompts), memory

    def run(self, notice: Notice = no_notice) -> BenchReport:
        """Loads the model and closes it. `notice` hears what is measured next."""
        notice("copying memory")
        copy = memory_copy()
        with held_to(self._memory, notice) as held, announcing(notice):
            notice("loading")
            with closing(load(self._path, self._settings)) as model:
                report = self.measure(model, copy, held, notice)
        if self._picture is not None:
            report.write_picture(self._picture)
        return report

    def measure(
        self, model: StreamedModel, copy: float, held: Held | None, notice: Notice = no_notice
    ) -> BenchReport:
        """A model that is loaded, which stays as it is."""
        evict = Eviction(model.streamer)
        roofline = measure_roofline(model, evict, copy, notice)
        tokens = TokenBench(model, self._tokens, evict, notice)
        costs, prompts = tokens.measure(), list[PromptCost]()
        for length in self._prompts:
            notice(f"a prompt of {length:,} tokens")
            prompts.append(measure_prompt(model, length, tokens.words, evict))
        return BenchReport(
            Subject.of(self._name, model),
            inspect_machine(),
            held,
            roofline,
            tuple(costs),
            tuple(prompts),
            evict.why_not,
        )
