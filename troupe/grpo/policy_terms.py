"""The policy term of each loss type: one function an algorithm, named as the field names it.

Shapes: B rows, T completion tokens; ratios and losses are (B, T) at token level and (B, 1) at sequence level. ℓ, ℓo, ℓr
and ℓs are the log-probs (B, T), in nats, of the current, old, reference and sampling policy; m the mask (B, T); A the
advantages (B, 1) or (B, T). All is float32. What stands where m = 0 never matters, unless a docstring says so.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.comparisons import masked_difference, masked_sum, row_means, upper_epsilon
from troupe.grpo.config import LossConfig
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
    sampling_log_probs: mx.array
    """ℓs (B, T); ℓo where the sampler's are not known."""
    chosen: mx.array | None
    """(B, T), 1 where the objective's `choice` takes a token; None where it has no choice."""


PolicyTerm = Callable[[PolicyInputs, LossConfig], tuple[mx.array, Tallies]]


def clipped(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−min(min(r, δ)·A, clip(r, 1−ε, 1+ε_high)·A).

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347) with the raised upper bound of DAPO (Yu et al.
    2025, arXiv:2503.14476) and the two-sided bound δ of INTELLECT-2 (2025, arXiv:2505.07291).
    """
    low, high = 1.0 - config.epsilon, 1.0 + upper_epsilon(config)
    bounded = x.ratio if config.delta is None else mx.minimum(x.ratio, config.delta)
    loss = -mx.minimum(bounded * x.advantages, mx.clip(x.ratio, low, high) * x.advantages)
    return loss, clip_tallies(bounded < low, bounded > high, x)


def cispo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−sg(min(r, ε_high))·A·ℓ: clips the weight of a token, never its gradient (MiniMax-M1 2025, arXiv:2506.13585)."""
    weight = mx.stop_gradient(mx.minimum(x.ratio, upper_epsilon(config)))
    was_clipped = mx.logical_and(x.ratio > upper_epsilon(config), x.advantages > 0).astype(mx.float32)
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
    held = mx.clip(x.log_ratio, -config.epsilon, upper_epsilon(config))
    c = mx.where(x.advantages > 0, mx.minimum(x.log_ratio, held), mx.maximum(x.log_ratio, held))
    loss = -mx.exp(row_means(c, x.token_mask)) * x.advantages
    return loss, clip_tallies(x.log_ratio < -config.epsilon, x.log_ratio > upper_epsilon(config), x)


def nll(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−ℓ, whatever the advantage: the cross-entropy of completions that were given and not sampled."""
    return -x.log_probs, {}


def rloo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A) with r = exp Σ_t(ℓ−ℓo)·m, the ratio of whole completions. (B, 1).

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740) as in TRL's RLOOTrainer, of which this is the loss; its baseline is
    `advantage = "rloo"`.
    """
    low, high = 1.0 - config.epsilon, 1.0 + upper_epsilon(config)
    ratio = mx.exp(masked_sum(x.log_ratio, x.token_mask))
    loss = -mx.minimum(ratio * x.advantages, mx.clip(ratio, low, high) * x.advantages)
    return loss, clip_tallies(ratio < low, ratio > high, x)


def dppo(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−(π/μ)·A + τ·log²(π/μ), without the first part where A > 0 and π − μ > δ_high, or A < 0 and π − μ < −δ_low.

    DPPO with the binary total variation (Qi et al. 2026, arXiv:2602.04879): what bounds a token is how far its
    probability has moved, not by which factor. With the penalty of Kimi K2.5 (2026, arXiv:2602.02276) and the defaults
    of prime-rl. μ is the policy that sampled, so that the correction ρ for it is a part of the ratio.
    """
    log_ratio = masked_difference(x.log_probs, x.sampling_log_probs, x.mask)
    moved = mx.stop_gradient(mx.exp(x.log_probs) - mx.exp(x.sampling_log_probs))
    above, below = moved > config.dppo_mask_high, moved < -config.dppo_mask_low
    dropped = mx.where(x.advantages > 0, above, below)
    loss = _without(dropped, log_ratio, x.advantages) + config.dppo_kl_tau * mx.square(log_ratio)
    return loss, clip_tallies(below, above, x)


def m2po(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−(π/μ)·A but for the tokens that `choices.by_second_moment` leaves out (Zheng et al. 2025, arXiv:2510.01161).

    μ is the policy that sampled, so that the correction ρ for it is a part of the ratio.
    """
    assert x.chosen is not None
    log_ratio = masked_difference(x.log_probs, x.sampling_log_probs, x.mask)
    loss = _without(x.chosen > 0, log_ratio, x.advantages)
    return loss, clip_tallies(x.chosen > 0, x.chosen > 0, x)


def clip_cov(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """`clipped`, but 0 for the tokens of `choices.by_clip_cov` (Cui et al. 2025, arXiv:2505.22617).

    A likely token of high advantage, or an unlikely one of low advantage, is what makes entropy collapse.
    """
    assert x.chosen is not None
    loss, tallies = clipped(x, config)
    return mx.where(x.chosen > 0, 0.0, loss), tallies | {"covariance/chosen": tally(x.chosen, x.mask)}


def kl_cov(x: PolicyInputs, config: LossConfig) -> tuple[mx.array, Tallies]:
    """−r·A, plus κ·|ℓ−ℓo| for the tokens of `choices.by_kl_cov` (Cui et al. 2025, arXiv:2505.22617)."""
    assert x.chosen is not None
    loss = -x.ratio * x.advantages
    penalty = mx.where(x.chosen > 0, config.ppo_kl_coef * mx.abs(x.log_ratio), 0.0)
    return loss + penalty, {"covariance/chosen": tally(x.chosen, x.mask)}


def _without(dropped: mx.array, log_ratio: mx.array, advantages: mx.array) -> mx.array:
    """−e^log_ratio·A, 0 where dropped, whatever stands there."""
    return mx.where(dropped, 0.0, -mx.exp(mx.where(dropped, 0.0, log_ratio)) * advantages)


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
