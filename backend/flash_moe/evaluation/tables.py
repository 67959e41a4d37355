"""The figures of a report as tables of text, at most 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flash_moe.evaluation.cost import Cost
from flash_moe.evaluation.figures import Estimate, finite
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
)

Row = tuple[str, ...]

# What the names of verdicts mean, in the order of the rows.
VERDICTS = {
    "right": "right replies",
    "valid": "valid JSON",
    "schema": "valid by the schema",
    "equal": "the expected value",
    "parses": "calls that parse",
    "names": "right functions",
    "arguments": "right arguments, too",
}
SECTIONS = ("questions", "json", "tools")
SPANS = {
    "texts": "texts",
    "replies": "right replies",
    "json": "JSON",
    "calls": "calls",
    "structural": "structure",
}
NOT_A_NUMBER = "not a number"


class Column(NamedTuple):
    name: str
    right: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """`title` are the lines above it, often none. Columns of numbers are aligned to the right."""

    columns: tuple[Column, ...]
    rows: list[Row]
    title: str = ""


def perplexity_table(text: Perplexities | None, replies: Perplexities | None) -> Table:
    """Texts by source, and right replies by kind."""
    rows: list[Row] = []
    for title, perplexities in (("texts", text), ("right replies", replies)):
        if perplexities is not None:
            rows.append((title, *_perplexity(perplexities.total)))
            parts = perplexities.parts.items()
            rows += [(f"  {name}", *_perplexity(part)) for name, part in parts]
    return _table(("predicted", "perplexity", "bits a byte", "tokens", "documents"), rows)


def divergence_table(against: Against | None, items: int) -> Table:
    columns = ("compared", "mean KL, nats", "p99", "same choice", "tokens")
    if against is None or against.total is None:
        return _table(columns, [], "" if against is None else _title(against, items))
    rows = [("everything", *_divergence(against.total))]
    rows += [(SPANS[name], *_divergence(part)) for name, part in against.spans.items()]
    return _table(columns, rows, _title(against, items))


def verdict_table(sections: Mapping[str, Replies]) -> Table:
    rows: list[Row] = []
    for section in SECTIONS:
        if section in sections:
            replies = sections[section]
            rows += _shares(section, replies.total)
            for kind, shares in replies.kinds.items() if set(replies.kinds) != {section} else ():
                rows += _shares(f"  {kind}", shares)
    return Table((Column("replies", False), Column("", False), Column("share"), Column("of")), rows)


def allowed_table(masses: AllowedMasses | None) -> Table:
    columns = ("allowed by grammars", "mean", "p1", "tokens")
    if masses is None:
        return _table(columns, [])
    parts = {"everything": masses.total, **masses.sections}
    return _table(columns, [row for title, part in parts.items() for row in _allowed(title, part)])


def cost_line(title: str, cost: Cost) -> str:
    return (
        f"{title}: {cost.tokens:,} tokens at {cost.tokens_per_second or 0:,.1f}/s, "
        f"{(cost.bytes_per_token or 0) / 1e6:,.2f} MB of experts read a token."
    )


def format_perplexity(perplexity: Estimate) -> str:
    value, error = map(finite, perplexity)
    text = NOT_A_NUMBER if value is None else f"{value:,.2f}"
    return text + ("" if error is None else f" ± {error:,.2f}")


def format_share(share: Share) -> str:
    value, error = map(finite, share.share)
    if value is None:
        return NOT_A_NUMBER
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"


def format_with_error(estimate: Estimate, unit: float = 1.0) -> str:
    """With as many digits as the error leaves a meaning to."""
    value, error = map(finite, estimate)
    if value is None:
        return NOT_A_NUMBER
    value, error = value * unit, error and error * unit
    if not error:
        return f"{value:.3g}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 6)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _table(names: tuple[str, ...], rows: list[Row], title: str = "") -> Table:
    first, *others = names
    return Table((Column(first, False), *map(Column, others)), rows, title)


def _perplexity(part: Perplexity) -> Row:
    bits = finite(part.bits_per_byte)
    perplexity = format_perplexity(part.perplexity)
    return perplexity, f"{bits:.3f}" if bits else "", f"{part.tokens:,}", f"{part.documents:,}"


def _title(against: Against, items: int) -> str:
    model = {name: against.model.get(name, "?") for name in ("model", "bits", "experts_per_token")}
    return (
        f"Against {against.file.name}: {model['model']}, {model['bits']}, "
        f"{model['experts_per_token']} experts a token.\n"
        f"{against.documents} of {items} items are in both."
    )


def _divergence(part: Divergence) -> Row:
    kl, p99 = format_with_error(part.kl), format_with_error(part.kl_p99)
    return kl, p99, format_share(part.agreement), f"{part.tokens:,}"


def _shares(title: str, shares: Shares) -> Iterator[Row]:
    for name, meaning in VERDICTS.items():
        if name in shares:
            yield title, meaning, format_share(shares[name]), f"{shares[name].of:,}"
            title = ""


def _allowed(title: str, part: AllowedMass) -> Iterator[Row]:
    if part.tokens and part.mean is not None and part.p1 is not None:
        mean, p1 = (format_with_error(estimate, 100) for estimate in (part.mean, part.p1))
        yield title, f"{mean} %", f"{p1} %", f"{part.tokens:,}"
