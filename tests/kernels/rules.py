"""The gated delta rule in float64, for the kernels of CPU and GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.floating[Any]]


def in_float64(
    q: Numbers, k: Numbers, v: Numbers, decay: Numbers, beta: Numbers, state: Numbers
) -> tuple[F64, F64]:
    """The rows [tokens, heads, values] and the new state. q and k are [tokens, key heads, keys], a
    decay may be a head's or every key's."""
    q, k, v, decay, beta, s = (np.float64(array) for array in (q, k, v, decay, beta, state))
    q, k = (np.repeat(array, v.shape[1] // k.shape[1], axis=1) for array in (q, k))
    y = np.empty_like(v)
    for t in range(len(v)):
        s = s * (decay[t][:, None] if decay.ndim == 3 else decay[t][:, None, None])
        delta = (v[t] - np.einsum("hvk,hk->hv", s, k[t])) * beta[t, :, None]
        s = s + delta[..., None] * k[t, :, None]
        y[t] = np.einsum("hvk,hk->hv", s, q[t])
    return y, s


def sigmoid(x: Numbers) -> F64:
    return np.asarray(1 / (1 + np.exp(-np.float64(x))))
