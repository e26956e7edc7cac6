"""Small distributions and counts for the tests of sampling."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

INF = math.inf


def log(*probs: float) -> mx.array:
    """Log-probs, float32."""
    with np.errstate(divide="ignore"):
        return mx.array(np.log(np.array(probs)).astype(np.float32))


def kept(logprobs: mx.array) -> list[Any]:
    """Ids that survive, per row."""
    alive = np.array(logprobs) > -INF
    return [np.flatnonzero(row).tolist() for row in alive] if alive.ndim == 2 else np.flatnonzero(alive).tolist()


def chi_square(ids: npt.NDArray[Any], probs: npt.NDArray[Any]) -> float:
    """Pearson's statistic of drawn ids; fails where an impossible one was drawn."""
    expected = probs * len(ids)
    alive = probs > 0
    counts = np.bincount(ids, minlength=len(probs))
    assert counts[~alive].sum() == 0
    return float((((counts - expected) ** 2)[alive] / expected[alive]).sum())
