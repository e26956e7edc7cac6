"""One learner batch: `num_iterations` passes, each the gradient of the batch and one AdamW update.

The gradient is that of micro-batches that share one normalizer, so cutting a batch into more of them changes the memory
it takes and not its gradient. Log-probs come from an injected `PolicyLogProbs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.grpo.batch import Batch, micro_batches
from troupe.grpo.config import LearnerConfig
from troupe.grpo.log_probs import DifferentiatedByMlx, PolicyLogProbs
from troupe.grpo.loss import (
    batch_normalizer,
    entropy_control,
    has_entropy_bonus,
    loss_and_tallies,
    routing_tallies,
    sampler_tallies,
)
from troupe.grpo.objectives import Tallies, averages, entropy_threshold, high_entropy_mask, merge, sampler_correction
from troupe.grpo.optimizer import OptimizerState, adamw_update_in_place, clip_scale, global_norm
from troupe.policy.gradient.backward import side_by_side
from troupe.policy.gradient.parts import Gradients
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import Weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a learner batch made. Every array is evaluated."""

    weights: dict[str, mx.array]
    optimizer_state: OptimizerState
    metrics: dict[str, float]
    """TRL's names where TRL has them: `loss`, `grad_norm` (before clipping), `learning_rate`, `entropy`, `kl`,
    `clip_ratio/*`, `sampling/*`; and `nonfinite`, 1 where an update was skipped. Means over the passes."""
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
) -> StepResult:
    """Trains on one batch. `state` is used up: it is empty afterwards, and the result has the new one.

    `weights` and `state` (from `optimizer.adamw_init` or an earlier batch) are flat dicts of evaluated arrays; `lr` is
    one learning rate, or one for each of the `num_iterations` updates; `ref_weights` are needed where beta ≠ 0,
    `max_completion_length` for loss_type "dr_grpo". The old log-probs are those of `weights`, which stay as they are.
    A `log_probs_fn` without a gradient of its own is differentiated by MLX.
    An update whose loss or gradient norm is not finite is skipped, and with it the passes left. `on_part` is called
    when what comes before the passes (`prepare`) and each of them (`pass`) has been computed. With `streams` as many
    micro-batches are differentiated at a time, each on one of them, which is for processors with several cores; it
    changes no bit. Raises `ValueError` for an argument that is missing, or a learning rate outside [0, 1].
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
    )
    on_part("prepare")

    control = entropy_control(state, config)
    new_weights, new_state = dict(weights), dict(state)
    state.clear()
    adamw = _adamw_settings(config)
    passes: list[dict[str, float]] = []
    updated = True
    for pass_number, rate in enumerate(rates):
        grads, values = gradient.at(new_weights, control.in_force(config), pass_number)
        norm = global_norm(grads)
        values["grad_norm"] = norm
        figures: list[float] = mx.stack(list(values.values())).tolist()  # type: ignore[assignment] # one transfer
        numbers = dict(zip(values, figures, strict=True))
        passes.append(numbers)
        if not (updated := math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])):
            break
        scale = clip_scale(norm, config.max_grad_norm)
        adamw_update_in_place(new_weights, grads, new_state, lr=rate, grad_scale=scale, **adamw)
        control = control.after_update(numbers.get("controlled_entropy", math.inf), config)
        new_state |= control.as_state(config)
        on_part("pass")
    summary = _over_passes(passes) | {"learning_rate": rates[len(passes) - 1], "nonfinite": float(not updated)}
    if has_entropy_bonus(config):
        summary["entropy_coef"] = control.coef
    return StepResult(weights=new_weights, optimizer_state=new_state, metrics=summary, updated=updated)


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


def _over_passes(passes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean over the passes, or their extreme under a name that ends in "min" or "max"."""
    summary = {}
    for name in passes[0]:
        column = [numbers[name] for numbers in passes]
        if name.endswith("min"):
            summary[name] = min(column)
        elif name.endswith("max"):
            summary[name] = max(column)
        else:
            summary[name] = math.fsum(column) / len(column)
    return summary


def _with_gradient(
    log_probs: PolicyLogProbs | Callable[[Weights, Batch], tuple[mx.array, mx.array]],
) -> PolicyLogProbs:
    """As it is, or differentiated by MLX."""
    return cast(PolicyLogProbs, log_probs) if hasattr(log_probs, "gradients") else DifferentiatedByMlx(log_probs)


class _MicroBatch(NamedTuple):
    """A micro-batch with what stays the same over all passes; (B, T) each."""

    batch: Batch
    old: mx.array | None
    """Of the policy that sampled; None: of the only pass itself, which is the same where nothing is dropped."""
    ref: mx.array | None


class BatchGradient:
    """The gradient of a batch, once for each of its passes.

    What the passes share is computed first: old and reference log-probs, the normalizer, the entropy threshold.
    """

    def __init__(
        self,
        weights: Weights,
        batch: Batch,
        log_probs: PolicyLogProbs,
        config: LearnerConfig,
        *,
        ref_weights: Weights | None,
        max_completion_length: int | None,
        streams: Sequence[mx.Stream],
    ) -> None:
        """`weights`: those of the old log-probs. The other arguments are those of `train_on_batch`."""
        self._log_probs = log_probs
        self._config = config
        self._streams = streams
        self._rows = batch.num_rows
        self._micros: list[_MicroBatch] = []
        parts = micro_batches(batch.with_shares(), config.gradient_accumulation_steps or 1, max_completion_length)
        keeps_old = config.num_iterations > 1 or log_probs.has_dropout
        some_entropies = config.top_entropy_quantile < 1.0
        entropies = []
        for part in parts:
            old = ref = None
            if keeps_old or (some_entropies and len(parts) > 1):
                old, part_entropies = log_probs(weights, part, **self._routes(part))
                mx.eval(old, part_entropies)
                entropies.append(part_entropies)
            if config.beta != 0.0 and ref_weights is not None:
                ref, _ = log_probs(ref_weights, part, **self._routes(part))
                mx.eval(ref)
            self._micros.append(_MicroBatch(part, old if keeps_old else None, ref))

        self._entropy_threshold = entropy_tokens = None
        if some_entropies and entropies:
            masks = mx.concatenate([part.completion_mask.reshape(-1) for part in parts])
            flat = mx.concatenate([part_entropies.reshape(-1) for part_entropies in entropies])
            self._entropy_threshold = entropy_threshold(flat, masks, config.top_entropy_quantile)
            entropy_tokens = mx.sum(high_entropy_mask(flat, masks, self._entropy_threshold))
        self._normalizer = batch_normalizer(
            config,
            rows=batch.num_samples,
            tokens=mx.sum(batch.completion_mask),
            entropy_tokens=entropy_tokens,
            max_completion_length=max_completion_length,
        )

    def at(self, weights: Weights, entropy_coef: float, pass_number: int) -> tuple[Gradients, Tallies]:
        """The gradient by `weights`, and `loss` and metrics, each (); as many micro-batches at a time as there are
        streams. `entropy_coef`: the weight of the entropy bonus in force. `pass_number`: from 0."""
        total: Gradients = {}
        values: list[tuple[mx.array, Tallies]] = []
        lanes = max(1, len(self._streams))
        for first in range(0, len(self._micros), lanes):
            works = []
            for micro in self._micros[first : first + lanes]:
                batch, routes = replace(micro.batch, pass_number=pass_number), self._routes(micro.batch, balances=True)
                loss = partial(self._loss, micro, entropy_coef, routes.get("routes"))
                works.append(self._log_probs.gradients(weights, batch, loss, **routes))
            for portion in side_by_side(works, self._streams, values):
                for name in list(portion) if len(self._micros) > 1 else ():
                    # sums of low-precision gradients are kept in float32; popped, a sum takes the memory of the last
                    grad = portion.pop(name).astype(mx.float32)
                    portion[name] = total.pop(name) + grad if name in total else grad
                    del grad
                mx.async_eval(portion)  # type: ignore[no-untyped-call]
                total |= portion
            mx.eval(total, values)
        total_loss = mx.sum(mx.stack([loss for loss, _ in values]))
        return total, {"loss": total_loss, **averages(merge([tallies for _, tallies in values]))}

    def _routes(self, batch: Batch, *, balances: bool = False) -> dict[str, Routes]:
        """`routes` for one pass over a micro-batch, where the settings ask for anything of experts."""
        config = self._config
        if config.router_aux_loss_coef == 0.0 and config.router_replay == "off":
            return {}
        balance = config.router_aux_loss_coef * batch.num_rows / self._rows if balances else 0.0
        routes = self._log_probs.routes(batch, follows=config.router_replay == "on", balance=balance)
        if routes is None:
            raise ValueError("router_aux_loss_coef and router_replay are for networks with experts; leave them out")
        return {"routes": routes}

    def _loss(
        self,
        micro: _MicroBatch,
        entropy_coef: float,
        routes: Routes | None,
        log_probs: mx.array,
        entropies: mx.array,
    ) -> tuple[mx.array, Tallies]:
        """The share of one micro-batch in the loss of the batch."""
        config, batch, mask = self._config, micro.batch, micro.batch.completion_mask
        if not has_entropy_bonus(config):
            entropies = mx.stop_gradient(entropies)
        old = mx.stop_gradient(log_probs) if micro.old is None else micro.old
        correction, sampling = None, {}
        if config.vllm_importance_sampling_correction:
            correction = sampler_correction(
                old,
                batch.sampling_log_probs,
                mask,
                config.vllm_importance_sampling_mode,
                config.vllm_importance_sampling_clip_min,
                config.vllm_importance_sampling_clip_max,
            )
            sampling = sampler_tallies(old, batch.sampling_log_probs, correction, mask)
        loss, tallies = loss_and_tallies(
            log_probs,
            old,
            batch.advantages,
            mask,
            config,
            ref_per_token_logps=micro.ref,
            entropies=entropies,
            sampling_per_token_logps=batch.sampling_log_probs,
            importance_sampling_ratio=correction,
            entropy_threshold=self._entropy_threshold,
            entropy_coef=entropy_coef,
            normalizer=self._normalizer,
            shares=batch.shares,
        )
        if routes is None:
            return loss, tallies | sampling
        balance, routing = routing_tallies(routes, batch.num_rows / self._rows)
        return loss + balance, tallies | sampling | routing


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
