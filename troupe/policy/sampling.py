"""The sampler's public door: choosing the next token. `decode/sampling.py` and `decode/filters.py` have the work."""

from troupe.policy.decode.filters import (
    apply_frequency_penalty,
    apply_logit_bias,
    apply_min_p,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_top_k,
    apply_top_p,
    apply_xtc,
)
from troupe.policy.decode.sampling import GREEDY_BELOW, Sampler, SamplingConfig, categorical_sample

__all__ = [
    "GREEDY_BELOW",
    "Sampler",
    "SamplingConfig",
    "apply_frequency_penalty",
    "apply_logit_bias",
    "apply_min_p",
    "apply_presence_penalty",
    "apply_repetition_penalty",
    "apply_top_k",
    "apply_top_p",
    "apply_xtc",
    "categorical_sample",
]
