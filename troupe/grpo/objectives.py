"""The formulas that a loss is made of: what compares two policies, metrics that add up, and the policy terms.

A policy term is one function an algorithm, and the table `OBJECTIVES` says how each becomes a loss. To add an
objective, write its function and its line there.

A *tally* is a mean in two parts, an array (2,) of total and count; under a name that ends in "min" or "max" it is the
extreme itself, an array (), NaN where there was nothing to look at. Tallies of micro-batches merge into exactly those
of the whole batch.

Shapes: B rows, T completion tokens; ratios and losses are (B, T) at token level and (B, 1) at sequence level. ℓ, ℓo, ℓr
and ℓs are the log-probs (B, T), in nats, of the current, old, reference and sampling policy; m the mask (B, T); A the
advantages (B, 1) or (B, T). All is float32. What stands where m = 0 never matters, unless a docstring says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

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


Tallies = dict[str, mx.array]


def tally(x: mx.array, mask: mx.array) -> mx.array:
    """Total and count of x over the unmasked tokens, or over the rows where x has one column. float32 (2,).

    As in TRL, a quantity of one value a row counts every row, the fully masked ones too.
    """
    if x.shape[1] == 1:
        return mx.stack([mx.sum(x), mx.array(float(x.shape[0]))])
    return mx.stack([mx.sum(mx.where(mask > 0, x, 0.0)), mx.sum(mask)])


def row_fractions(x: mx.array, mask: mx.array) -> mx.array:
    """The mean of x over the unmasked tokens of each row, (B,); NaN in a row without tokens."""
    return x[:, 0] if x.shape[1] == 1 else mx.sum(x * mask, axis=1) / mx.sum(mask, axis=1)


def nan_min(x: mx.array) -> mx.array:
    """The smallest number in x, NaN if there is none. ()."""
    smallest = mx.min(mx.where(mx.isnan(x), math.inf, x))
    return mx.where(mx.all(mx.isnan(x)), math.nan, smallest)


def nan_max(x: mx.array) -> mx.array:
    """The largest number in x, NaN if there is none. ()."""
    return -nan_min(-x)


def merge(parts: Sequence[Mapping[str, mx.array]]) -> Tallies:
    """The tallies of all parts together; the parts have the same names."""
    if len(parts) == 1:
        return dict(parts[0])
    merged: Tallies = {}
    for name in parts[0]:
        values = mx.stack([part[name] for part in parts])
        if name.endswith("min"):
            merged[name] = nan_min(values)
        elif name.endswith("max"):
            merged[name] = nan_max(values)
        else:
            merged[name] = mx.sum(values, axis=0)
    return merged


def averages(tallies: Mapping[str, mx.array]) -> Tallies:
    """Name → float32 () mean or extreme; the mean of nothing is 0."""
    return {name: value if value.ndim == 0 else value[0] / mx.maximum(value[1], 1.0) for name, value in tallies.items()}


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


def upper_epsilon(config: LossConfig) -> float:
    """ε_high, or ε where it is not set."""
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


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

    def reduced(self, loss: mx.array, mask: mx.array, shares: mx.array | None) -> mx.array:
        """`reduce`. Where a completion is several rows, each of the `shares` (B,) of its tokens, it weighs as one row
        of all these tokens would; (B, 1)."""
        values = self.reduce(loss, mask)
        return values if shares is None or self.reduce is masked_sum else values * shares[:, None]


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
