"""The sampler's public door: choosing the next token."""

from troupe.policy.decode.filters import (
    apply_min_p,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    apply_xtc,
)
from troupe.policy.decode.sampling import Sampler, SamplingConfig, categorical_sample

__all__ = [
    "Sampler",
    "SamplingConfig",
    "apply_min_p",
    "apply_repetition_penalty",
    "apply_top_k",
    "apply_top_p",
    "apply_xtc",
    "categorical_sample",
]
