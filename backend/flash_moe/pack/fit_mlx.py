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
# Groups at once: 1 M weights, of which there are some 40 copies in between.
BATCH = 1 << 14


def alternating(
    groups: mx.array, weights: mx.array | None, largest: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    """The scale and bias [n, 1] of each group. Groups are [n, size] in float32; `weights` of the
    same shape, or None, say how much the error of each weight counts; `largest` is the largest
    code."""
    parts = []
    for at in range(0, groups.shape[0], BATCH):
        batch = None if weights is None else weights[at : at + BATCH]
        parts.append(_rounded(groups[at : at + BATCH], batch, largest, dtype))
        mx.eval(parts[-1])
    scales, biases = zip(*parts, strict=True)
    return mx.concatenate(list(scales)), mx.concatenate(list(biases))


def _rounded(
    groups: mx.array, weights: mx.array | None, largest: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array]:
    w = _shares(groups, weights)
    scales, biases = _fit(groups, w, mx.array(float(largest)))
    scales = scales.astype(dtype)
    codes = nearest_codes(groups, scales, biases, largest)
    # The best bias for the rounded scale. About the old one: weights add up to nearly 1.
    rest = groups - scales.astype(mx.float32) * codes - biases
    biases = (biases + (w * rest).sum(axis=-1, keepdims=True)).astype(dtype)
    wide = extremes(groups, largest, dtype)
    worse = _error(groups, w, *wide, largest) < _error(groups, w, scales, biases, largest)
    return mx.where(worse, wide[0], scales), mx.where(worse, wide[1], biases)


def _shares(groups: mx.array, weights: mx.array | None) -> mx.array:
    """Weights that add up to 1 in each group. A group without any is fitted as if all were
    equal."""
    w = mx.ones_like(groups) if weights is None else weights
    total = w.sum(axis=-1, keepdims=True)
    return mx.where(total > 0, w / mx.where(total > 0, total, 1), 1 / groups.shape[-1])


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
    """What weights are divided by: squares of small ones would be 0 in float32."""
    span = groups.max(axis=-1, keepdims=True) - groups.min(axis=-1, keepdims=True)
    return mx.where(span > 0, span, 1)


@mx.compile
def _step(
    x: mx.array, w: mx.array, s: mx.array, b: mx.array, largest: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """How much of the variance the new scale and bias explain, and both; the mean of x is 0."""
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
    fitted = scales.astype(mx.float32) * codes + biases.astype(mx.float32)
    return (w * ((groups - fitted) / _span(groups)) ** 2).sum(axis=-1, keepdims=True)
