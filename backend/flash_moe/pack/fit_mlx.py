"""The least-squares fit in MLX's operations, for machines without a C compiler: alternating steps
(nearest codes, then the best scale and bias) from several starts, for many groups at once."""

from __future__ import annotations

import mlx.core as mx

from flash_moe.pack.affine import extremes, nearest_codes

# Starts: shares of the group's range that the levels span, and where in the rest they lie. With
# these, errors are within 1 % of those of the fit in C; with levels that are always about the mean,
# 3 bits of a heavy-tailed group ended 12 % above it.
WIDTHS = (0.9, 0.75, 0.6)
PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
STEPS = 5
# Groups at once: 1 M weights, some 40 copies of them while they are worked on.
BATCH = 1 << 14


def alternating(
    groups: mx.array, weights: mx.array | None, largest: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """Groups [n, size] in float32, weights alike or none → scale and bias of each group [n, 1]."""
    parts = []
    for at in range(0, groups.shape[0], BATCH):
        some = None if weights is None else weights[at : at + BATCH]
        parts.append(_rounded(groups[at : at + BATCH], some, largest, dtype))
        mx.eval(parts[-1])
    scales, biases = zip(*parts, strict=True)
    return mx.concatenate(list(scales)), mx.concatenate(list(biases))


def _rounded(
    groups: mx.array, weights: mx.array | None, largest: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    w = mx.ones_like(groups) if weights is None else weights
    total = w.sum(axis=-1, keepdims=True)
    # A group without any weight is fitted as if all were equal.
    w = mx.where(total > 0, w / mx.where(total > 0, total, 1), 1 / groups.shape[-1])
    scales, biases = _fit(groups, w, mx.array(float(largest)))
    scales = scales.astype(dtype)
    codes = nearest_codes(groups, scales, biases, largest)
    # The best bias for the scale that was rounded. About the old one: weights add up to nearly 1.
    rest = groups - scales.astype(mx.float32) * codes - biases
    biases = (biases + (w * rest).sum(axis=-1, keepdims=True)).astype(dtype)
    wide = extremes(groups, largest, dtype)
    worse = _error(groups, w, *wide, largest) < _error(groups, w, scales, biases, largest)
    return mx.where(worse, wide[0], scales), mx.where(worse, wide[1], biases)


def _fit(groups: mx.array, w: mx.array, largest: mx.array) -> tuple[mx.array, mx.array]:
    low, span = groups.min(axis=-1, keepdims=True), _span(groups)
    x = (groups - low) / span
    mean = (w * x).sum(axis=-1, keepdims=True)
    x = x - mean
    best = scale = bias = mx.zeros_like(mean)
    for width in WIDTHS:
        for place in PLACES:
            s = mx.full(mean.shape, width) / largest
            b = (1 - width) * place - mean
            for _ in range(STEPS):
                gain, s, b = _step(x, w, s, b, largest)
            better = gain > best
            best, scale, bias = (
                mx.where(better, new, old) for new, old in ((gain, best), (s, scale), (b, bias))
            )
    return scale * span, (bias + mean) * span + low


def _span(groups: mx.array) -> mx.array:
    """In its place, squares of small weights would be 0 in float32."""
    span = groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)
    return mx.where(span > 0, span, 1)


@mx.compile
def _step(
    x: mx.array, w: mx.array, s: mx.array, b: mx.array, largest: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """What the new scale and bias take off the variance, and both; the mean of x is 0."""
    codes = mx.clip(mx.round((x - b) / mx.where(s == 0, 1, s)), 0, largest)
    q = (w * codes).sum(axis=-1, keepdims=True)
    v = (w * codes * x).sum(axis=-1, keepdims=True)
    spread = (w * (codes - q) ** 2).sum(axis=-1, keepdims=True)
    some = spread > 1e-7  # below it, both are rounding errors
    s = mx.where(some, v / mx.where(some, spread, 1), 0)
    return s * v, s, -s * q


def _error(
    groups: mx.array, w: mx.array, scales: mx.array, biases: mx.array, largest: int
) -> mx.array:
    codes = nearest_codes(groups, scales, biases, largest)
    found = scales.astype(mx.float32) * codes + biases.astype(mx.float32)
    return (w * ((groups - found) / _span(groups)) ** 2).sum(axis=-1, keepdims=True)
