"""One picture of a benchmark: a bar for each state, cut into parts, with a mark where raw reads of
the same bytes would end. Plain SVG, without a library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from flash_moe.measure.bench_tokens import TokenCost
from flash_moe.measure.raw_reads import Roofline

WIDTH, LEFT, RIGHT = 720, 96, 88
TOP, BAR, STEP = 64, 26, 42
COLOURS = {
    "reading": "#4269d0",
    "mixers": "#efb118",
    "router": "#9c6b4e",
    "experts": "#ff725c",
    "head": "#a463f2",
    "sampling": "#3ca951",
    "ours": "#9498a0",
}
LEGEND_STEP = 84


def draw(title: str, costs: Sequence[TokenCost], roofline: Roofline) -> str:
    """Bars are as long as tokens take undisturbed; their parts are shares of the second run."""
    height = TOP + STEP * len(costs) + 24
    longest = max(max(cost.seconds, cost.floor(roofline) or 0) for cost in costs)
    scale = (WIDTH - LEFT - RIGHT) / longest
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
            f'<text x="12" y="22" font-size="14">{escape(title)}: a token by part, '
            "black line: raw reads of the same bytes</text>",
            *_legend(),
            *(
                line
                for number, cost in enumerate(costs)
                for line in _bar(cost, TOP + STEP * number, scale, cost.floor(roofline))
            ),
            "</svg>\n",
        ]
    )


def _legend() -> Iterator[str]:
    for number, (part, colour) in enumerate(COLOURS.items()):
        x = 12 + LEGEND_STEP * number
        yield f'<rect x="{x}" y="34" width="10" height="10" fill="{colour}"/>'
        yield f'<text x="{x + 14}" y="43">{part}</text>'


def _bar(cost: TokenCost, top: int, scale: float, floor: float | None) -> Iterator[str]:
    middle, x = top + BAR / 2 + 4, float(LEFT)
    yield f'<text x="{LEFT - 8}" y="{middle:.0f}" text-anchor="end">{escape(cost.state)}</text>'
    for part, share in cost.parts.shares().items():
        width = share * cost.seconds * scale
        yield (
            f'<rect x="{x:.1f}" y="{top}" width="{max(width, 0):.1f}" height="{BAR}" '
            f'fill="{COLOURS[part]}"/>'
        )
        x += width
    yield f'<text x="{x + 6:.1f}" y="{middle:.0f}">{cost.seconds * 1e3:,.1f} ms</text>'
    if floor is not None and cost.nbytes:
        at = LEFT + floor * scale
        yield f'<path d="M{at:.1f} {top - 4}V{top + BAR + 4}" stroke="black" stroke-width="2"/>'
