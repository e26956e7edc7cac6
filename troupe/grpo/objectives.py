"""The policy terms: one function an algorithm, and the table `OBJECTIVES` that says how each becomes a loss.

Shapes: B rows, T completion tokens; ratios and losses are (B, T) at token level and (B, 1) at sequence level.
Everything is float32.

To add an objective, write its function and its line in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.config import LossConfig
from troupe.grpo.ratios import masked_sum, row_means
from troupe.grpo.tallies import Tallies, nan_max, nan_min, row_fractions, tally


class PolicyInputs(NamedTuple):
    """What a policy term may use."""

    log_probs: mx.array
    """ℓ (B, T), with gradient."""
    log_ratio: mx.array
    """ℓ − ℓo (B, T), with gradient where not masked."""
    ratio: mx.array
    """r: e^(ℓ−ℓo) (B, T), or its geometric mean over the row (B, 1)."""
    advantages: mx.array
    """A (B, 1) or (B, T)."""
    mask: mx.array
    """m (B, T)."""
    token_mask: mx.array
    """m, without the tokens of low entropy (B, T); equal to m where no entropy quantile is set."""
    sampler_ratio: mx.array | None
    """ρ (B, T) or (B, 1), without gradient."""


PolicyTerm = Callable[[PolicyInputs, LossConfig], tuple[mx.array, Tallies]]


def clipped(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−min(min(r, δ)·A, clip(r, 1−ε, 1+ε_high)·A).

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with the raised upper bound of DAPO (Yu et al.
    2025, arXiv:2503.14476) and the two-sided bound δ of INTELLECT-2 (2025, arXiv:2505.07291).
    """
    low, high = 1.0 - config.epsilon, 1.0 + config.upper_epsilon
    bounded = x.ratio if config.delta is None else mx.minimum(x.ratio, config.delta)
    loss = -mx.minimum(bounded * x.advantages, mx.clip(x.ratio, low, high) * x.advantages)
    return loss, clip_tallies(bounded < low, bounded > high, x)


def cispo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−sg(min(r, ε_high))·A·ℓ: clips the weight of a token, never its gradient (MiniMax-M1 2025, arXiv:2506.13585)."""
    weight = mx.stop_gradient(mx.minimum(x.ratio, config.upper_epsilon))
    was_clipped = mx.logical_and(x.ratio > config.upper_epsilon, x.advantages > 0).astype(mx.float32)
    return -weight * x.advantages * x.log_probs, {"cispo_clip_ratio": tally(was_clipped, x.mask)}


def sapo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−σ(τ(r−1))·4/τ·A, τ by the sign of A: a soft gate for the hard clip (Gao et al. 2025, arXiv:2511.20347)."""
    tau = mx.where(x.advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    return -mx.sigmoid(tau * (x.ratio - 1.0)) * (4.0 / tau) * x.advantages, {}


def vespo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−sg(φ(w))·A·ℓ with φ(w) = w^k·e^(λ(1−w)) and w the ratio of whole sequences, the sampler's part included.

    log w = Σ_t clip(ℓ−ℓo, ±20)·m + Σ_t clip(log ρ, log 1e-8, 20), clipped once more; (k, λ) by the sign of A
    (VESPO 2026, arXiv:2602.10693). A weight that is not finite is 0; ρ must be 1 where masked.
    """
    lowest = math.log(1e-8)
    log_w = masked_sum(mx.clip(x.log_ratio, -20.0, 20.0), x.mask)
    if x.sampler_ratio is not None:
        log_w = log_w + mx.sum(mx.clip(mx.log(x.sampler_ratio), lowest, 20.0), axis=1, keepdims=True)
    log_w = mx.clip(log_w, lowest, 20.0)
    positive = x.advantages >= 0
    k = mx.where(positive, config.vespo_k_pos, config.vespo_k_neg)
    lam = mx.maximum(mx.where(positive, config.vespo_lambda_pos, config.vespo_lambda_neg), 1e-4)
    phi = mx.stop_gradient(mx.exp(lam + k * log_w - lam * mx.exp(log_w)))
    phi = mx.where(mx.isfinite(phi), phi, 0.0)
    return -phi * x.advantages * x.log_probs, {"vespo/phi_seq_mean": tally(phi, x.mask)}


def gmpo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−exp(mean_t c)·A, c = ℓ−ℓo clipped to [−ε, ε_high] on the side that A makes tempting. (B, 1).

    The geometric mean of the clipped token ratios (Zhao et al. 2025, arXiv:2507.20673), over the tokens of high
    entropy where a quantile is set. The paper's ε is 0.4.
    """
    held = mx.clip(x.log_ratio, -config.epsilon, config.upper_epsilon)
    c = mx.where(x.advantages > 0, mx.minimum(x.log_ratio, held), mx.maximum(x.log_ratio, held))
    loss = -mx.exp(row_means(c, x.token_mask)) * x.advantages
    return loss, clip_tallies(x.log_ratio < -config.epsilon, x.log_ratio > config.upper_epsilon, x)


def clip_tallies(below: mx.array, above: mx.array, x: PolicyInputs) -> Tallies:
    """TRL's `clip_ratio/*`: how often clipping took the gradient away, overall and in the extreme row."""
    low = mx.logical_and(below, x.advantages < 0).astype(mx.float32)
    high = mx.logical_and(above, x.advantages > 0).astype(mx.float32)
    return {
        "clip_ratio/low_mean": tally(low, x.mask),
        "clip_ratio/high_mean": tally(high, x.mask),
        "clip_ratio/region_mean": tally(low + high, x.mask),
        "clip_ratio/low_min": nan_min(row_fractions(low, x.mask)),
        "clip_ratio/high_max": nan_max(row_fractions(high, x.mask)),
    }


Scale = mx.array | float
"""A number that may be lazy."""


def row_values(loss: mx.array, mask: mx.array) -> mx.array:
    """The loss of a row as it is, (B, 1), where it has one column; else its token mean."""
    return loss if loss.shape[1] == 1 else row_means(loss, mask)


def by_rows(rows: int, tokens: Scale, max_completion_length: int | None) -> Scale:
    """B."""
    return float(rows)


def by_tokens(rows: int, tokens: Scale, max_completion_length: int | None) -> Scale:
    """max(N, 1)."""
    return mx.maximum(tokens, 1.0)


def by_longest(rows: int, tokens: Scale, max_completion_length: int | None) -> Scale:
    """B · max_completion_length: a constant, so that no length is favoured (Liu et al. 2025, arXiv:2503.20783)."""
    if max_completion_length is None:
        raise ValueError("loss_type dr_grpo divides by max_completion_length, which is None; give the length limit")
    return float(rows * max_completion_length)


class Objective(NamedTuple):
    """How a loss type is put together: loss = Σ_rows reduce(policy term) / normalizer."""

    policy_term: PolicyTerm
    reduce: Callable[[mx.array, mx.array], mx.array]
    """Token losses (B, T) or (B, 1), mask (B, T) → (B, 1). `masked_sum`: long completions weigh more; `row_means`:
    every completion weighs the same."""
    normalizer: Callable[[int, Scale, int | None], Scale]
    """Rows B, tokens N, length limit of the whole batch → divisor."""
    takes_sampler_ratio: bool = False
    """The policy term uses ρ itself, so the loss is not multiplied by it."""
    takes_entropy_mask: bool = False
    """The policy term leaves out tokens of low entropy itself."""
    kl_has_ratio: bool = True
    """`use_bias_correction_kl` applies."""


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(clipped, row_means, by_rows),
    "bnpo": Objective(clipped, masked_sum, by_tokens),
    "dr_grpo": Objective(clipped, masked_sum, by_longest),
    "dapo": Objective(clipped, masked_sum, by_tokens),
    "luspo": Objective(clipped, masked_sum, by_rows),
    "cispo": Objective(cispo, masked_sum, by_tokens),
    "sapo": Objective(sapo, row_means, by_rows),
    "vespo": Objective(vespo, masked_sum, by_tokens, takes_sampler_ratio=True),
    "gmpo": Objective(gmpo, row_values, by_rows, takes_entropy_mask=True, kl_has_ratio=False),
}
"""Loss type → objective. They differ in what a completion weighs: as much as any other in grpo and sapo, by its
length in the others, most of all in luspo (Liu et al. 2026, arXiv:2602.05261), which is meant for sequence ratios."""
