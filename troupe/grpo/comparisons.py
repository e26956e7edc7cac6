"""What compares policies, and masks of tokens: the formulas that policy terms and losses share.

Shapes: B rows, T completion tokens; ratios and losses are (B, T) at token level and (B, 1) at sequence level. ℓ, ℓo, ℓr
and ℓs are the log-probs (B, T), in nats, of the current, old, reference and sampling policy; m the mask (B, T); A the
advantages (B, 1) or (B, T). All is float32. What stands where m = 0 never matters, unless a docstring says so.
"""

import math

import mlx.core as mx

from troupe.grpo.config import CorrectionMode, Level, LossConfig


def masked_difference(a: mx.array, b: mx.array, mask: mx.array) -> mx.array:
    """a − b, (B, T). Where masked it is held within ±20 and has no gradient, so that nothing there can overflow."""
    difference = a - b
    return mx.where(mask > 0, difference, mx.stop_gradient(mx.clip(difference, -20.0, 20.0)))


def masked_sum(x: mx.array, mask: mx.array) -> mx.array:
    """Σ_t x over the unmasked tokens: (B, 1)."""
    return mx.sum(mx.where(mask > 0, x, 0.0), axis=1, keepdims=True)


def row_means(x: mx.array, mask: mx.array) -> mx.array:
    """Σ_t x·m / max(Σ_t m, 1): (B, 1); 0 for a row without tokens."""
    return masked_sum(x, mask) / mx.maximum(mx.sum(mask, axis=1, keepdims=True), 1.0)


def importance_ratio(log_ratio: mx.array, mask: mx.array, level: Level) -> mx.array:
    """The ratio of the current to the old policy, from log_ratio = ℓ − ℓo.

    "token" (Shao et al. 2024, arXiv:2402.03300): e^(ℓ−ℓo), (B, T). "sequence" (GSPO, Zheng et al. 2025,
    arXiv:2507.18071): the geometric mean of the token ratios, exp(Σ(ℓ−ℓo)·m / max(Σm, 1)), (B, 1).
    """
    return mx.exp(log_ratio if level == "token" else row_means(log_ratio, mask))


def reference_kl(log_probs: mx.array, ref_log_probs: mx.array, mask: mx.array) -> mx.array:
    """The non-negative estimate k = e^d − d − 1 with d = ℓr − ℓ of KL(π ‖ π_ref) (Schulman 2020, "k3"). (B, T)."""
    d = masked_difference(ref_log_probs, log_probs, mask)
    return mx.exp(d) - d - 1.0


def off_policy_mask(
    log_probs: mx.array, sampling_log_probs: mx.array, advantages: mx.array, mask: mx.array, threshold: float
) -> mx.array:
    """1 where A ≥ 0 or mean_t(ℓs − ℓ) ≤ threshold, else 0: drops bad rows that the policy has moved away from.

    Off-policy sequence masking (DeepSeek-V3.2, arXiv:2512.02556). A sampling log-prob of NaN counts as no difference.
    Shape of the advantages.
    """
    difference = mx.stop_gradient(sampling_log_probs - log_probs)
    drift = row_means(mx.where(mx.isnan(difference), 0.0, difference), mask)
    return mx.logical_or(advantages >= 0, drift <= threshold).astype(mx.float32)


def entropy_threshold(entropies: mx.array, mask: mx.array, top_quantile: float) -> mx.array:
    """The entropy () that the `top_quantile` part of the unmasked tokens reaches, in nats; +inf without any token.

    The (1 − top_quantile) quantile with linear interpolation between neighbouring order statistics.
    """
    flat = mx.sort(mx.where(mask > 0, entropies, math.inf).reshape(-1))
    count = mx.sum(mask > 0).astype(mx.float32)
    rank = mx.maximum(count - 1.0, 0.0) * (1.0 - top_quantile)
    below = mx.floor(rank)
    low, high = flat[below.astype(mx.int32)], flat[mx.ceil(rank).astype(mx.int32)]
    # The guard keeps inf − inf out where no token is left.
    return low + (rank - below) * mx.where(high > low, high - low, 0.0)


def high_entropy_mask(entropies: mx.array, mask: mx.array, threshold: mx.array) -> mx.array:
    """m where H ≥ threshold, else 0 (Wang et al. 2025, arXiv:2506.01939). (B, T)."""
    return mask * (entropies >= threshold)


def sampler_correction(
    old_log_probs: mx.array,
    sampling_log_probs: mx.array,
    mask: mx.array,
    mode: CorrectionMode,
    clip_min: float | None,
    clip_max: float | None,
) -> mx.array:
    """ρ = π_old / π_sampler, for tokens whose sampler differs from the learner (other kernels, or older weights).

    "token_…": e^(ℓo−ℓs), (B, T), 1 where masked. "sequence_…": exp Σ(ℓo−ℓs)·m, (B, 1). "…_truncate" clamps ρ to
    [clip_min, clip_max]; "…_mask" sets a ρ outside to 0. None is no bound. A sampling log-prob of NaN counts as no
    difference. No gradient passes.
    """
    difference = mx.stop_gradient(old_log_probs - sampling_log_probs)
    difference = mx.where(mx.logical_or(mask == 0, mx.isnan(difference)), 0.0, difference)
    if mode.startswith("sequence"):
        difference = mx.sum(difference, axis=1, keepdims=True)
    ratio = mx.exp(difference)
    low = -math.inf if clip_min is None else clip_min
    high = math.inf if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return mx.clip(ratio, low, high)
    return mx.where(mx.logical_and(ratio >= low, ratio <= high), ratio, 0.0)


def upper_epsilon(config: LossConfig) -> float:
    """ε_high, or ε where it is not set."""
    return config.epsilon if config.epsilon_high is None else config.epsilon_high
