"""What TRL 1.16 does around its loss, for the tests that compare with it."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from troupe.grpo import LossConfig, Normalizer, batch_normalizer
from troupe.grpo.comparisons import entropy_threshold, high_entropy_mask

OVER_THE_GENERATION_BATCH = {"dapo", "cispo", "vespo"}
"""Loss types that TRL divides by the tokens of a whole generation batch."""


def number(value: Any) -> Any:
    """A JSON figure, whose NaN and infinities are strings and whose missing score is null."""
    if isinstance(value, list):
        return [number(v) for v in value]
    return math.nan if value is None else float(value)


def assert_close(actual: Any, expected: Any, tolerance: float, scale: float = 1.0) -> None:
    """|a − b| ≤ tolerance · max(1, |b|, scale); NaN agrees with NaN."""
    a, b = np.array(actual, dtype=np.float64), np.array(expected, dtype=np.float64)
    assert a.shape == b.shape
    bound = tolerance * np.maximum(np.maximum(1.0, np.abs(b)), scale)
    same = (np.isnan(a) & np.isnan(b)) | (a == b)
    with np.errstate(invalid="ignore"):
        off = np.where(same, 0.0, np.abs(a - b) / bound)
    assert np.all(off <= 1.0), f"off by {np.nanmax(off)} tolerances: {a} instead of {b}"


def normalizer_of_a_micro_batch(
    config: LossConfig,
    mask: mx.array,
    entropies: mx.array,
    *,
    num_items_in_batch: float,
    max_completion_length: int,
    gradient_accumulation_steps: int = 1,
    steps_per_generation: int = 1,
    mode: str = "train",
) -> Normalizer:
    """What TRL divides the loss of one micro-batch by.

    `num_items_in_batch`: the tokens of the generation batch. In evaluation nothing is accumulated.
    """
    steps = gradient_accumulation_steps if mode == "train" else 1
    tokens = mx.sum(mask).astype(mx.float32)
    policy: mx.array | float
    if config.loss_type in OVER_THE_GENERATION_BATCH:
        policy = max(num_items_in_batch, 1.0) * (steps / steps_per_generation if mode == "train" else 1.0)
    else:
        local = batch_normalizer(config, rows=mask.shape[0], tokens=tokens, max_completion_length=max_completion_length)
        policy = mx.array(local.policy) * steps
    if config.top_entropy_quantile < 1.0:
        threshold = entropy_threshold(entropies, mask, config.top_entropy_quantile)
        tokens = mx.sum(high_entropy_mask(entropies, mask, threshold))
    return Normalizer(policy=policy, entropy=mx.maximum(tokens, 1.0) * steps)
