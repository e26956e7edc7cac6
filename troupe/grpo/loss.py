"""The GRPO loss: policy term → weights → reduction → KL → entropy bonus, over given log-probs.

The normalizer is an argument, so that the losses of the micro-batches of a batch add up to exactly the loss of the
batch. Names, formulas and defaults are those of TRL 1.16.

Shapes: B rows, T completion tokens, V the vocabulary. Everything is computed in float32; log-probs, entropies and KL in
nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.choices import Places, chosen_tokens, known_log_probs
from troupe.grpo.comparisons import (
    entropy_threshold,
    high_entropy_mask,
    importance_ratio,
    masked_difference,
    masked_sum,
    off_policy_mask,
    reference_kl,
)
from troupe.grpo.config import LossConfig
from troupe.grpo.objectives import OBJECTIVES, Scale
from troupe.grpo.policy_terms import PolicyInputs
from troupe.grpo.tallies import Tallies, averages, nan_max, nan_min, tally
from troupe.policy.network.routes import Routes


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
    """The normalizer of a batch of so many rows (where completions are several rows: of so many completions) and
    unmasked tokens.

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
    chosen: mx.array | None = None,
    entropy_coef: Scale | None = None,
    normalizer: Normalizer | None = None,
    max_completion_length: int | None = None,
) -> tuple[mx.array, dict[str, mx.array]]:
    """The loss () and TRL's metrics of it, each (); differentiate with respect to `per_token_logps` and `entropies`.

    `per_token_logps` (B, T) of the current policy; `old_per_token_logps` (B, T) of the policy at the start of the
    batch, None = the current one, without gradient; `advantages` (B,) or (B, T); `completion_mask` (B, T) of 0 and 1.
    `ref_per_token_logps` (B, T) is needed where beta ≠ 0, `entropies` (B, T) where the configuration uses them (and
    for the metric). `sampling_per_token_logps` (B, T), default the old ones, serve the off-policy mask, "dppo"
    and "m2po"; `importance_sampling_ratio` (B, T) or (B, 1) is ρ, see `comparisons.sampler_correction`.
    `entropy_threshold` (), `chosen` (B, T), which tokens the choice of the loss type takes (see `grpo.choices`), and
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
        chosen=chosen,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
        max_completion_length=max_completion_length,
    )
    return loss, averages(tallies)


def has_entropy_bonus(config: LossConfig) -> bool:
    """Whether the loss has an entropy bonus, be its weight 0 at the moment."""
    return config.entropy_coef != 0.0 or config.use_adaptive_entropy


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
    chosen: mx.array | None = None,
    entropy_coef: Scale | None = None,
    normalizer: Normalizer | None = None,
    max_completion_length: int | None = None,
    shares: mx.array | None = None,
    drawn: mx.array | None = None,
) -> tuple[mx.array, Tallies]:
    """As `grpo_loss`, with tallies for metrics, which add up over micro-batches; `shares` (B,) as `Batch.shares`, and
    `drawn` (B, T) as `choices.draws` makes it, by which tokens are chosen at random."""
    _check(per_token_logps, advantages, completion_mask, config, ref_per_token_logps, entropies)
    objective = OBJECTIVES[config.loss_type]
    new, mask = per_token_logps.astype(mx.float32), completion_mask.astype(mx.float32)
    old = mx.stop_gradient(new) if old_per_token_logps is None else old_per_token_logps
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    sampling = old if sampling_per_token_logps is None else sampling_per_token_logps
    log_ratio = masked_difference(new, old, mask)
    ratio = importance_ratio(log_ratio, mask, config.importance_sampling_level)
    kept = _entropy_mask(entropies, mask, config, entropy_threshold)
    known = known_log_probs(sampling, old)
    if objective.choice is not None and chosen is None:
        (chosen,) = chosen_tokens(objective.choice, [Places.of(new, old, known, A, mask, drawn)], config)
    x = PolicyInputs(new, log_ratio, ratio, A, mask, kept, importance_sampling_ratio, known, chosen)
    token_loss, tallies = objective.policy_term(x, config)
    if config.off_policy_mask_threshold is not None:
        token_loss = token_loss * off_policy_mask(new, sampling, A, mask, config.off_policy_mask_threshold)
    if config.top_entropy_quantile < 1.0 and not objective.takes_entropy_mask:
        token_loss = token_loss * kept
    if importance_sampling_ratio is not None and not objective.takes_sampler_ratio:
        token_loss = token_loss * importance_sampling_ratio

    if normalizer is None:
        rows, tokens = mask.shape[0], mx.sum(mask)
        normalizer = batch_normalizer(config, rows=rows, tokens=tokens, max_completion_length=max_completion_length)
    loss = mx.sum(objective.reduced(token_loss, mask, shares))
    if ref_per_token_logps is not None and config.beta != 0.0:
        kl = reference_kl(new, ref_per_token_logps, mask)
        kl = kl * ratio if config.use_bias_correction_kl and objective.kl_has_ratio else kl
        loss = loss + config.beta * mx.sum(objective.reduced(kl, mask, shares))
        tallies["kl"] = tally(kl, mask)
    loss = loss / normalizer.policy
    if entropies is not None:
        tallies["entropy"] = tally(entropies, mask)
        if has_entropy_bonus(config):
            tallies["policy_loss"] = mx.stack([loss, mx.array(0.0)])  # a sum over micro-batches, not a mean
            tallies |= {"controlled_entropy": tally(entropies, kept)} if config.use_adaptive_entropy else {}
            coef = config.entropy_coef if entropy_coef is None else entropy_coef
            loss = loss - _entropy_bonus(coef, entropies, kept, normalizer)
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


def routing_tallies(routes: Routes, part: float) -> tuple[mx.array, Tallies]:
    """What is added to the loss of a micro-batch that has this part of the batch's rows, () without gradient, and
    `aux_loss`, TRL's, and `router/flips`: in which part of tokens and layers the router finds other experts than the
    generator recorded."""
    tallies: Tallies = {}
    balance = mx.array(0.0)
    if routes.balance:
        value = routes.balance_loss
        balance, tallies["aux_loss"] = routes.balance * value, mx.stack([value * part, mx.array(part)])
    if routes.flips is not None:
        tallies["router/flips"] = routes.flips
    return balance, tallies


def _entropy_bonus(coef: Scale, entropies: mx.array, kept: mx.array, normalizer: Normalizer) -> mx.array:
    count = mx.maximum(mx.sum(kept), 1.0) if normalizer.entropy is None else normalizer.entropy
    return coef * mx.sum(masked_sum(entropies, kept)) / count


def _entropy_mask(
    entropies: mx.array | None, mask: mx.array, config: LossConfig, threshold: mx.array | None
) -> mx.array:
    """The mask (B, T) without the tokens that `top_entropy_quantile` leaves out."""
    if config.top_entropy_quantile == 1.0 or entropies is None:
        return mask
    if threshold is None:
        threshold = entropy_threshold(entropies, mask, config.top_entropy_quantile)
    return high_entropy_mask(entropies, mask, threshold)


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
    if entropies is None and (config.top_entropy_quantile < 1.0 or has_entropy_bonus(config)):
        raise ValueError("top_entropy_quantile below 1 and entropy_coef need entropies; give them or leave both alone")


class EntropyControl(NamedTuple):
    """Adaptive entropy control: the coefficient of the entropy bonus follows the entropy of the policy.

    After every update the coefficient rises by a fixed amount where the entropy is at or below its target, and falls by
    it elsewhere; the bonus counts only while the entropy last measured is at or below the target (He et al. 2025,
    "Skywork Open Reasoner 1", arXiv:2505.22312, by the rules of TRL 1.16). Both numbers stand in the flat state of the
    optimizer, as `entropy_coef` and `last_entropy`, each float32 ().
    """

    coef: float
    last_entropy: float
    """Mean token entropy of the batch of the last update, in nats; +inf before the first one."""

    def in_force(self, config: LossConfig) -> float:
        """The coefficient to weigh the bonus of the next update with."""
        if config.use_adaptive_entropy and not self.last_entropy <= config.entropy_target:
            return 0.0
        return self.coef

    def after_update(self, entropy: float, config: LossConfig) -> EntropyControl:
        """The controller after an update with a batch of this mean entropy; the same where it is switched off.

        The coefficient becomes min(c + Δ, c_max) where the entropy ≤ target, else max(c − Δ, c_min).
        """
        if not config.use_adaptive_entropy:
            return self
        if entropy <= config.entropy_target:
            return EntropyControl(min(self.coef + config.entropy_coef_delta, config.entropy_coef_max), entropy)
        return EntropyControl(max(self.coef - config.entropy_coef_delta, config.entropy_coef_min), entropy)

    def as_state(self, config: LossConfig) -> dict[str, mx.array]:
        """What the state of the optimizer keeps of it, evaluated; nothing where it is switched off."""
        if not config.use_adaptive_entropy:
            return {}
        state = {"entropy_coef": mx.array(self.coef), "last_entropy": mx.array(self.last_entropy)}
        mx.eval(state)
        return state


def entropy_control(state: Mapping[str, mx.array], config: LossConfig) -> EntropyControl:
    """The controller as the state of the optimizer has it; at its start where that says nothing of it."""
    if not config.use_adaptive_entropy or "entropy_coef" not in state:
        return EntropyControl(config.entropy_coef, math.inf)
    return EntropyControl(float(state["entropy_coef"]), float(state["last_entropy"]))


def selective_log_softmax(logits: mx.array, target_ids: mx.array) -> mx.array:
    """log p(a) = ℓ_a − log Σ_v exp ℓ_v, in nats, for the chosen ids a alone.

    `logits` (…, V); `target_ids` (…) integers in [0, V), or (…, K) for K ids a position. Returns float32 of the shape
    of `target_ids`.
    """
    logits = logits.astype(mx.float32)
    log_normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)
    if target_ids.ndim == logits.ndim:
        return mx.take_along_axis(logits, target_ids, axis=-1) - log_normalizer
    return (mx.take_along_axis(logits, target_ids[..., None], axis=-1) - log_normalizer)[..., 0]


def entropy_from_logits(logits: mx.array) -> mx.array:
    """H = −Σ_v p_v log p_v in nats, with p = softmax(ℓ).

    `logits` (…, V), finite or −inf (an excluded token). Returns float32 (…).
    """
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    # An excluded token contributes 0; clamping keeps 0 · −inf from making it NaN.
    return -mx.sum(mx.exp(log_probs) * mx.maximum(log_probs, mx.finfo(mx.float32).min), axis=-1)
