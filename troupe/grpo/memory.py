"""How much memory AdamW holds and takes, by numbers and types of weights."""

from __future__ import annotations

import math

import mlx.core as mx

from troupe.grpo.optimizer import UPDATED_AT_ONCE


def optimizer_state_bytes(numbers: int, dtype: mx.Dtype) -> int:
    """Of the state of `adamw_init` for so many weights of one type: two float32 moments, and what `dtype` lacks."""
    lacking = 2 if dtype == mx.bfloat16 else 0 if dtype == mx.float32 else 4
    return numbers * (4 + 4 + lacking)


def update_bytes(numbers: int, largest: int, dtype: mx.Dtype) -> int:
    """What `adamw_update_in_place` takes beside the weights, the state and the gradients: an upper end, as measured.

    `numbers` of all weights, of which `largest` are in the largest ones (embedding and head). No more than a portion
    is under way: the new arrays of its largest weights and what their kernels make, or a little of all of it. A weight
    larger than a portion is there anew before its gradient is gone.
    """
    portion = math.ceil(max(8 * min(numbers, UPDATED_AT_ONCE), 18 * min(largest, UPDATED_AT_ONCE)))
    return portion + (largest * dtype.size if largest > UPDATED_AT_ONCE else 0)
