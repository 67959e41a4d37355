"""The figures of a benchmark as tables of text, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flash_moe.measure.bench_prompts import PromptCost
from flash_moe.measure.bench_tokens import TokenCost
from flash_moe.measure.raw_reads import Roofline

UNKNOWN = "–"
RAW_COLUMNS = ("", "GB/s", "ms")
BY_PART = "Where its time goes, in % of a second run, evaluated part by part"


@dataclass(frozen=True, slots=True)
class Table:
    """Columns are (name, whether it is aligned to the right)."""

    title: str
    columns: tuple[tuple[str, bool], ...]
    rows: list[tuple[str, ...]]


def raw_table(roofline: Roofline, token_bytes: int) -> Table:
    rates = {
        "reads past the page cache": roofline.direct,
        "reads through it, nothing cached": roofline.cold,
        "reads from the page cache": roofline.cached,
        "copies in memory": roofline.copy,
        "copies on the GPU": roofline.device_copy,
    }
    rows = [
        (name, f"{rate / 1e9:.2f}", _ms(token_bytes / rate)) for name, rate in rates.items() if rate
    ]
    return _table("The machine, and what it takes for a token's experts", RAW_COLUMNS, rows)


def token_table(costs: Sequence[TokenCost], roofline: Roofline) -> Table:
    columns = ("", "ms", "tokens/s", "MB", "cached", "mapped", "GB/s", "of raw", "floor ms")
    rows = [
        (
            cost.state,
            _ms(cost.seconds),
            f"{1 / cost.seconds:.1f}",
            f"{cost.nbytes / 1e6:,.1f}",
            _percent(cost.hit_rate),
            _percent(cost.mapped / cost.nbytes if cost.nbytes else None),
            UNKNOWN if cost.rate is None else f"{cost.rate / 1e9:.2f}",
            _percent(cost.share_of_raw(roofline)),
            _ms(cost.floor(roofline)),
        )
        for cost in costs
    ]
    return _table("A token", columns, rows)


def parts_table(costs: Sequence[TokenCost]) -> Table:
    names = tuple(costs[0].parts.to_json())
    rows = [
        (
            cost.state,
            _ms(cost.parts.total),
            *(f"{100 * share:.0f}" for share in cost.parts.shares().values()),
        )
        for cost in costs
    ]
    return _table(BY_PART, ("", "ms", *names), rows)


def prompt_table(costs: Sequence[PromptCost]) -> Table:
    columns = ("tokens", "first, s", "again, s", "tokens/s", "reading, s", "GB", "mapped, GB")
    rows = [
        (
            f"{cost.tokens:,}",
            f"{cost.first.seconds:.2f}",
            f"{cost.again.seconds:.2f}",
            f"{cost.tokens / cost.again.seconds:,.1f}",
            f"{cost.again.reading:.2f}",
            f"{cost.again.nbytes / 1e9:.2f}",
            f"{cost.again.mapped / 1e9:.2f}",
        )
        for cost in costs
    ]
    return _table("Prompts, read first and again", columns, rows)


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    named = tuple((name, number > 0) for number, name in enumerate(columns))
    return Table(title, named, list(rows))


def _ms(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds * 1e3:,.1f}"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.0f} %"
