"""The GRPO loss: policy term → weights → reduction → KL → entropy bonus, over given log-probs.

The normalizer is an argument, so that the losses of the micro-batches of a batch add up to exactly the loss of the
batch. Names, formulas and defaults are those of TRL 1.16.

Shapes: B rows, T completion tokens. Everything is computed in float32; log-probs, entropies and KL in nats.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from troupe.grpo import ratios
from troupe.grpo.config import LossConfig
from troupe.grpo.objectives import OBJECTIVES, PolicyInputs, Scale
from troupe.grpo.tallies import Tallies, averages, nan_max, nan_min, tally


class Normalizer(NamedTuple):
    """What sums are divided by. One for the whole batch makes the losses of its micro-batches add up."""

    policy: Scale
    """Divides the sum of the reduced rows, the KL term included."""
    entropy: Scale | None
    """Divides the sum of the token entropies in the entropy bonus: a number of tokens. None is those of the rows at
    hand that `top_entropy_quantile` leaves."""


def batch_normalizer(
    config: LossConfig,
    *,
    rows: int,
    tokens: Scale,
    entropy_tokens: Scale | None = None,
    max_completion_length: int | None = None,
) -> Normalizer:
    """The normalizer of a batch of so many rows and unmasked tokens.

    `entropy_tokens`: those of them that `top_entropy_quantile` leaves, needed for the micro-batches of an entropy
    bonus where that is below 1. `max_completion_length` is the length limit of generation, needed for "dr_grpo"
    alone; `ValueError` where it is missing there.
    """
    if entropy_tokens is None and config.top_entropy_quantile == 1.0:
        entropy_tokens = tokens
    return Normalizer(
        policy=OBJECTIVES[config.loss_type].normalizer(rows, tokens, max_completion_length),
        entropy=None if entropy_tokens is None else mx.maximum(entropy_tokens, 1.0),
    )


def grpo_loss(
    per_token_logps: mx.array,
    old_per_token_logps: mx.array | None,
    advantages: mx.array,
    completion_mask: mx.array,
    config: LossConfig,
    *,
    ref_per_token_logps: mx.array | None = None,
    entropies: mx.array | None = None,
    sampling_per_token_logps: mx.array | None = None,
    importance_sampling_ratio: mx.array | None = None,
    entropy_threshold: mx.array | None = None,
    entropy_coef: Scale | None = None,
    normalizer: Normalizer | None = None,
    max_completion_length: int | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss () and TRL's metrics of it, each (); differentiate with respect to `per_token_logps` and `entropies`.

    `per_token_logps` (B, T) of the current policy; `old_per_token_logps` (B, T) of the policy at the start of the
    batch, None = the current one, without gradient; `advantages` (B,) or (B, T); `completion_mask` (B, T) of 0 and 1.
    `ref_per_token_logps` (B, T) is needed where beta ≠ 0, `entropies` (B, T) where the configuration uses them (and
    for the metric). `sampling_per_token_logps` (B, T), default the old ones, serve the off-policy mask;
    `importance_sampling_ratio` (B, T) or (B, 1) is ρ, see `ratios.sampler_correction`. `entropy_threshold` () and
    `normalizer` are those of these rows alone unless given; `max_completion_length` is read for the latter.
    `entropy_coef` is the weight of the entropy bonus in force, default `config.entropy_coef`; where it is adaptive, the
    metric `controlled_entropy` is what its controller goes by.
    Raises `ValueError` for an argument that is missing or has another shape.
    """
    loss, tallies = loss_and_tallies(
        per_token_logps,
        old_per_token_logps,
        advantages,
        completion_mask,
        config,
        ref_per_token_logps=ref_per_token_logps,
        entropies=entropies,
        sampling_per_token_logps=sampling_per_token_logps,
        importance_sampling_ratio=importance_sampling_ratio,
        entropy_threshold=entropy_threshold,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
        max_completion_length=max_completion_length,
    )
    return loss, averages(tallies)


def loss_and_tallies(
    per_token_logps: mx.array,
    old_per_token_logps: mx.array | None,
    advantages: mx.array,
    completion_mask: mx.array,
    config: LossConfig,
    *,
    ref_per_token_logps: mx.array | None = None,
    entropies: mx.array | None = None,
    sampling_per_token_logps: mx.array | None = None,
    importance_sampling_ratio: mx.array | None = None,
    entropy_threshold: mx.array | None = None,
    entropy_coef: Scale | None = None,
    normalizer: Normalizer | None = None,
    max_completion_length: int | None = None,
) -> tuple[mx.array, Tallies]:
    """As `grpo_loss`, with tallies (see `troupe.grpo.tallies`) for metrics, which add up over micro-batches."""
    _check(per_token_logps, advantages, completion_mask, config, ref_per_token_logps, entropies)
    objective = OBJECTIVES[config.loss_type]
    new = per_token_logps.astype(mx.float32)
    old = mx.stop_gradient(new) if old_per_token_logps is None else old_per_token_logps
    mask = completion_mask.astype(mx.float32)
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio = ratios.masked_difference(new, old, mask)
    ratio = ratios.importance_ratio(log_ratio, mask, config.importance_sampling_level)
    kept = _entropy_mask(entropies, mask, config, entropy_threshold)
    x = PolicyInputs(new, log_ratio, ratio, A, mask, kept, importance_sampling_ratio)

    token_loss, tallies = objective.policy_term(x, config)
    if config.off_policy_mask_threshold is not None:
        sampling = old if sampling_per_token_logps is None else sampling_per_token_logps
        token_loss = token_loss * ratios.off_policy_mask(new, sampling, A, mask, config.off_policy_mask_threshold)
    if config.top_entropy_quantile < 1.0 and not objective.takes_entropy_mask:
        token_loss = token_loss * kept
    if importance_sampling_ratio is not None and not objective.takes_sampler_ratio:
        token_loss = token_loss * importance_sampling_ratio

    if normalizer is None:
        normalizer = batch_normalizer(
            config, rows=mask.shape[0], tokens=mx.sum(mask), max_completion_length=max_completion_length
        )
    loss = mx.sum(objective.reduce(token_loss, mask))
    if ref_per_token_logps is not None and config.beta != 0.0:
        kl = ratios.reference_kl(new, ref_per_token_logps, mask)
        kl = kl * ratio if config.use_bias_correction_kl and objective.kl_has_ratio else kl
        loss = loss + config.beta * mx.sum(objective.reduce(kl, mask))
        tallies["kl"] = tally(kl, mask)
    loss = loss / normalizer.policy
    if entropies is not None:
        tallies["entropy"] = tally(entropies, mask)
        if config.has_entropy_bonus:
            tallies["policy_loss"] = mx.stack([loss, mx.array(0.0)])  # a sum over micro-batches, not a mean
            if config.use_adaptive_entropy:
                tallies["controlled_entropy"] = tally(entropies, kept)
            coef = config.entropy_coef if entropy_coef is None else entropy_coef
            count = mx.maximum(mx.sum(kept), 1.0) if normalizer.entropy is None else normalizer.entropy
            loss = loss - coef * mx.sum(ratios.masked_sum(entropies, kept)) / count
    return loss, {name: mx.stop_gradient(value) for name, value in tallies.items()}


def sampler_tallies(old_log_probs: mx.array, sampling_log_probs: mx.array, ratio: mx.array, mask: mx.array) -> Tallies:
    """TRL's `sampling/*`: how far the sampler's log-probs lie from the learner's, and the correction ρ for it."""
    difference = mx.abs(old_log_probs - sampling_log_probs)
    known = mask * mx.logical_not(mx.isnan(difference))
    difference = mx.where(known > 0, difference, 0.0)
    per_row = ratio.shape[1] == 1
    counted = ratio if per_row else mx.where(mask > 0, ratio, float("nan"))
    tallies = {
        "sampling/sampling_logp_difference/mean": tally(difference, known),
        "sampling/sampling_logp_difference/max": mx.max(difference),
        "sampling/importance_sampling_ratio/min": nan_min(counted),
        "sampling/importance_sampling_ratio/mean": tally(ratio, mask),
        "sampling/importance_sampling_ratio/max": nan_max(counted),
    }
    return {name: mx.stop_gradient(value) for name, value in tallies.items()}


def _entropy_mask(
    entropies: mx.array | None, mask: mx.array, config: LossConfig, threshold: mx.array | None
) -> mx.array:
    """The mask (B, T) without the tokens that `top_entropy_quantile` leaves out."""
    if config.top_entropy_quantile == 1.0 or entropies is None:
        return mask
    if threshold is None:
        threshold = ratios.entropy_threshold(entropies, mask, config.top_entropy_quantile)
    return ratios.high_entropy_mask(entropies, mask, threshold)


def _check(
    per_token_logps: mx.array,
    advantages: mx.array,
    completion_mask: mx.array,
    config: LossConfig,
    ref_per_token_logps: mx.array | None,
    entropies: mx.array | None,
) -> None:
    shape = per_token_logps.shape
    if len(shape) != 2:
        raise ValueError(f"per_token_logps has the shape {shape}; give (B, T)")
    if completion_mask.shape != shape:
        raise ValueError(
            f"completion_mask has the shape {completion_mask.shape}, the log-probs {shape}; make them equal"
        )
    if advantages.shape not in (shape[:1], shape):
        raise ValueError(f"advantages has the shape {advantages.shape}; give {shape[:1]} or {shape}")
    if config.beta != 0.0 and ref_per_token_logps is None:
        raise ValueError(f"beta is {config.beta} and there are no ref_per_token_logps; give them or set beta = 0")
    if config.needs_entropies and entropies is None:
        raise ValueError("top_entropy_quantile below 1 and entropy_coef need entropies; give them or leave both alone")
