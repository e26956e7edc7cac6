"""One learner batch: `num_iterations` passes, each the gradient of the batch and one AdamW update.

The gradient is that of micro-batches that share one normalizer, so cutting a batch into more of them changes the memory
it takes and not its gradient. Log-probs come from an injected `PolicyLogProbs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from troupe.grpo.batch import Batch
from troupe.grpo.batch_gradient import BatchGradient
from troupe.grpo.config import LearnerConfig
from troupe.grpo.log_probs import DifferentiatedByMlx, PolicyLogProbs
from troupe.grpo.loss import EntropyControl, entropy_control, has_entropy_bonus
from troupe.grpo.moved import Moved
from troupe.grpo.optimizer import OptimizerState, adamw_update_in_place, clip_scale, global_norm
from troupe.grpo.ranks import Ranks, check_alike
from troupe.policy.network.tensors import Weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a learner batch made. Every array is evaluated."""

    weights: dict[str, mx.array]
    optimizer_state: OptimizerState
    metrics: dict[str, float]
    """TRL's names where TRL has them: `loss`, `grad_norm` (before clipping), `learning_rate`, `entropy`, `kl`,
    `clip_ratio/*`, `sampling/*`; `nonfinite`, 1 where an update was skipped; and `weights/moved`, which part of the
    16-bit weights is another after all passes. Means over the passes."""
    updated: bool
    """Whether every pass made its update."""


def train_on_batch(
    weights: Weights,
    state: OptimizerState,
    batch: Batch,
    log_probs_fn: PolicyLogProbs | Callable[[Weights, Batch], tuple[mx.array, mx.array]],
    config: LearnerConfig,
    *,
    lr: float | Sequence[float],
    ref_weights: Weights | None = None,
    max_completion_length: int | None = None,
    on_part: Callable[[str], None] = lambda name: None,
    streams: Sequence[mx.Stream] = (),
    seed: int = 0,
    ranks: Ranks | None = None,
) -> StepResult:
    """Trains on one batch. `state` is used up: it is empty afterwards, and the result has the new one.

    `weights` and `state` (from `optimizer.adamw_init` or an earlier batch) are flat dicts of evaluated arrays; `lr` is
    one learning rate, or one for each of the `num_iterations` updates; `ref_weights` are needed where beta ≠ 0,
    `max_completion_length` for loss_type "dr_grpo". The old log-probs are those of `weights`, which stay as they are.
    A `log_probs_fn` without a gradient of its own is differentiated by MLX. An update whose loss or gradient norm is
    not finite is skipped, and with it the passes left. `on_part` is called when what comes before the passes
    (`prepare`) and each of them (`pass`) has been computed. With `streams` as many micro-batches are differentiated at
    a time, each on one of them, which is for processors with several cores; it changes no bit. `seed`: of the run, for
    what a loss type draws at random. `ranks`: the processes that do the same with the same arguments at the same time,
    each with its share of the lanes; None: this one does all. Raises `ValueError` for an argument that is missing or a
    learning rate outside [0, 1], `RunError` where ranks differ.
    """
    rates = _checked_rates(lr, config, ref_weights)
    gradient = BatchGradient(
        weights,
        batch.without_truncated() if config.mask_truncated_completions else batch,
        _with_gradient(log_probs_fn),
        config,
        ref_weights=ref_weights,
        max_completion_length=max_completion_length,
        streams=streams,
        seed=seed,
        ranks=ranks,
        on_part=on_part,
    )
    on_part("prepare")
    control, adamw, before = entropy_control(state, config), _adamw_settings(config), Moved(weights)
    new_weights, new_state = dict(weights), dict(state)
    state.clear()
    passes, updated = list[dict[str, float]](), True
    for pass_number, rate in enumerate(rates):
        grads, values = gradient.at(new_weights, control.in_force(config), pass_number)
        values["grad_norm"] = norm = global_norm(grads)
        passes.append(numbers := _numbers(values))
        if not (updated := all(math.isfinite(numbers[name]) for name in ("loss", "grad_norm"))):
            break
        scale = clip_scale(norm, config.max_grad_norm)
        adamw_update_in_place(new_weights, grads, new_state, lr=rate, grad_scale=scale, **adamw)
        control = control.after_update(numbers.get("controlled_entropy", math.inf), config)
        new_state |= control.as_state(config)
        on_part("pass")
    check_alike(ranks, new_weights)
    metrics = _summary(passes, rates, control, config, updated=updated) | before.figures(new_weights)
    return StepResult(weights=new_weights, optimizer_state=new_state, metrics=metrics, updated=updated)


def _numbers(values: Mapping[str, mx.array]) -> dict[str, float]:
    """In one transfer."""
    figures: list[float] = mx.stack(list(values.values())).tolist()  # type: ignore[assignment]
    return dict(zip(values, figures, strict=True))


def _adamw_settings(config: LearnerConfig) -> dict[str, Any]:
    betas = config.adam_beta1, config.adam_beta2
    return {"betas": betas, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}


def _checked_rates(lr: float | Sequence[float], config: LearnerConfig, ref_weights: Weights | None) -> list[float]:
    """The learning rate of each pass; ValueError where arguments do not fit."""
    rates = [float(lr)] * config.num_iterations if isinstance(lr, int | float) else list(lr)
    if len(rates) != config.num_iterations:
        raise ValueError(
            f"lr has {len(rates)} values for num_iterations = {config.num_iterations}; give one number, or one a pass"
        )
    if outside := [rate for rate in rates if not 0.0 <= rate <= 1.0]:  # also what keeps a finite update finite
        raise ValueError(f"the learning rate is {outside[0]}; give a number from 0 to 1")
    if config.beta != 0.0 and ref_weights is None:
        raise ValueError(f"beta is {config.beta} and there are no ref_weights; give them or set beta = 0")
    return rates


def _summary(
    passes: Sequence[Mapping[str, float]],
    rates: Sequence[float],
    control: EntropyControl,
    config: LearnerConfig,
    *,
    updated: bool,
) -> dict[str, float]:
    """The mean over the passes, or their extreme under a name that ends in "min" or "max"; and where the entropy bonus
    is left by them."""
    summary = {"entropy_coef": control.coef} if has_entropy_bonus(config) else {}
    for name in passes[0]:
        column = [numbers[name] for numbers in passes]
        if name.endswith("min"):
            summary[name] = min(column)
        elif name.endswith("max"):
            summary[name] = max(column)
        else:
            summary[name] = math.fsum(column) / len(column)
    return {**summary, "learning_rate": rates[len(passes) - 1], "nonfinite": float(not updated)}


def _with_gradient(
    log_probs: PolicyLogProbs | Callable[[Weights, Batch], tuple[mx.array, mx.array]],
) -> PolicyLogProbs:
    """As it is, or differentiated by MLX."""
    return cast(PolicyLogProbs, log_probs) if hasattr(log_probs, "gradients") else DifferentiatedByMlx(log_probs)


def sync_reference(
    reference: Mapping[str, mx.array], policy: Mapping[str, mx.array], alpha: float
) -> dict[str, mx.array]:
    """π_ref ← α·π + (1 − α)·π_ref for every weight (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656, "soft update").

    `reference` and `policy` have the same names and shapes; the result has the dtypes of the reference and is computed
    in float32, lazily. α = 1 makes it the policy, α = 0 leaves it. Raises `ValueError` where the names differ.
    """
    if reference.keys() != policy.keys():
        odd = sorted(reference.keys() ^ policy.keys())
        raise ValueError(
            f"reference and policy do not have the same weights ({odd[0]} is in one alone); give one model twice"
        )
    return {
        name: (alpha * policy[name].astype(mx.float32) + (1.0 - alpha) * old.astype(mx.float32)).astype(old.dtype)
        for name, old in reference.items()
    }
