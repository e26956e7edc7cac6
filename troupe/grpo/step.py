"""One learner batch: `num_iterations` passes of micro-batched gradients, each ending in one AdamW update.

Knows no model: log-probs come from an injected function of weights and batch. Knows no actors, files or schedule of
the run either. All micro-batches of a batch share one normalizer, so cutting a batch into more of them changes the
memory it takes and not its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import mlx.core as mx

from troupe.grpo import ratios
from troupe.grpo import tallies as metrics
from troupe.grpo.batch import Batch, split
from troupe.grpo.config import LearnerConfig
from troupe.grpo.entropy import entropy_control
from troupe.grpo.loss import (
    Normalizer,
    batch_normalizer,
    loss_and_tallies,
    sampler_tallies,
)
from troupe.grpo.optimizer import OptimizerState, adamw_update_in_place, clip_scale, global_norm
from troupe.grpo.pieces import Differentiation, side_by_side

Weights = Mapping[str, mx.array]
LogProbsFn = Callable[[Weights, Batch], tuple[mx.array, mx.array]]
"""(weights, batch) → log-probs (B, T) of the completion ids and entropies (B, T), both float32, in nats, under the
temperature-scaled distribution. What stands on padding does not matter, as long as it is finite."""

BatchLoss = Callable[[mx.array, mx.array], tuple[mx.array, metrics.Tallies]]
"""Log-probs and entropies (B, T) → the loss () and tallies."""


@runtime_checkable
class LogProbs(Protocol):
    """A `LogProbsFn` that knows its own gradient; that of any other is MLX's."""

    def __call__(self, weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
        """See `LogProbsFn`."""

    def gradients(self, weights: Weights, batch: Batch, loss: BatchLoss) -> Differentiation:
        """Pieces of the work, with the gradients of `loss` by the weights, each once; returns what `loss` gives."""


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


class _Micro(NamedTuple):
    """A micro-batch with what stays the same over all passes; (B, T) each."""

    batch: Batch
    old: mx.array | None
    ref: mx.array | None


class _Fixed(NamedTuple):
    """What all micro-batches and passes share."""

    config: LearnerConfig
    log_probs_fn: LogProbsFn
    normalizer: Normalizer
    entropy_threshold: mx.array | None
    entropy_coef: float
    """Weight of the entropy bonus in force."""
    streams: Sequence[mx.Stream] = ()


def train_on_batch(
    weights: Weights,
    state: OptimizerState,
    batch: Batch,
    log_probs_fn: LogProbsFn,
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
    An update whose loss or gradient norm is not finite is skipped, and with it the passes left. `on_part` is called
    when what comes before the passes (`prepare`) and each of them (`pass`) has been computed. With `streams` as many
    micro-batches are differentiated at a time, each on one of them, which is for processors with several cores; it
    changes no bit. Raises `ValueError` for an argument that is missing, or a learning rate outside [0, 1].
    """
    rates = [float(lr)] * config.num_iterations if isinstance(lr, int | float) else list(lr)
    if len(rates) != config.num_iterations:
        raise ValueError(
            f"lr has {len(rates)} values for num_iterations = {config.num_iterations}; give one number, or one a pass"
        )
    if outside := [rate for rate in rates if not 0.0 <= rate <= 1.0]:  # also what keeps a finite update finite
        raise ValueError(f"the learning rate is {outside[0]}; give a number from 0 to 1")
    if config.beta != 0.0 and ref_weights is None:
        raise ValueError(f"beta is {config.beta} and there are no ref_weights; give them or set beta = 0")
    if config.mask_truncated_completions:
        batch = batch.without_truncated()
    micros, fixed = _prepare(weights, batch, log_probs_fn, config, ref_weights, max_completion_length)
    fixed = fixed._replace(streams=streams)
    on_part("prepare")

    control = entropy_control(state, config)
    new_weights, new_state = dict(weights), dict(state)
    state.clear()
    passes: list[dict[str, float]] = []
    updated = True
    for rate in rates:
        grads, values = _gradients(new_weights, micros, fixed._replace(entropy_coef=control.in_force(config)))
        norm = global_norm(grads)
        numbers = _floats(values | {"grad_norm": norm})
        passes.append(numbers)
        updated = math.isfinite(numbers["loss"]) and math.isfinite(numbers["grad_norm"])
        if not updated:
            break
        adamw_update_in_place(
            new_weights,
            grads,
            new_state,
            lr=rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            grad_scale=clip_scale(norm, config.max_grad_norm),
        )
        control = control.after_update(numbers.get("controlled_entropy", math.inf), config)
        new_state |= control.as_state(config)
        on_part("pass")
    summary = _over_passes(passes) | {"learning_rate": rates[len(passes) - 1], "nonfinite": float(not updated)}
    if config.has_entropy_bonus:
        summary["entropy_coef"] = control.coef
    return StepResult(weights=new_weights, optimizer_state=new_state, metrics=summary, updated=updated)


def _prepare(
    weights: Weights,
    batch: Batch,
    log_probs_fn: LogProbsFn,
    config: LearnerConfig,
    ref_weights: Weights | None,
    max_completion_length: int | None,
) -> tuple[list[_Micro], _Fixed]:
    """Cuts the batch, and computes once what the passes share: old and reference log-probs, entropy threshold."""
    parts = split(batch, config.gradient_accumulation_steps or 1)
    several_passes = config.num_iterations > 1
    some_entropies = config.top_entropy_quantile < 1.0
    micros, entropies = [], []
    for part in parts:
        old = ref = None
        if several_passes or (some_entropies and len(parts) > 1):
            old, part_entropies = log_probs_fn(weights, part)
            mx.eval(old, part_entropies)
            entropies.append(part_entropies)
        if config.beta != 0.0 and ref_weights is not None:
            ref, _ = log_probs_fn(ref_weights, part)
            mx.eval(ref)
        micros.append(_Micro(part, old if several_passes else None, ref))

    threshold = entropy_tokens = None
    if some_entropies and entropies:
        masks = mx.concatenate([part.completion_mask.reshape(-1) for part in parts])
        flat = mx.concatenate([part_entropies.reshape(-1) for part_entropies in entropies])
        threshold = ratios.entropy_threshold(flat, masks, config.top_entropy_quantile)
        entropy_tokens = mx.sum(ratios.high_entropy_mask(flat, masks, threshold))
    normalizer = batch_normalizer(
        config,
        rows=batch.num_rows,
        tokens=mx.sum(batch.completion_mask),
        entropy_tokens=entropy_tokens,
        max_completion_length=max_completion_length,
    )
    return micros, _Fixed(config, log_probs_fn, normalizer, threshold, config.entropy_coef)


def _gradients(
    weights: Weights, micros: Sequence[_Micro], fixed: _Fixed
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """The gradient of the whole batch, and `loss` and metrics, each (). As many micro-batches at a time as there are
    streams."""
    total: dict[str, mx.array] = {}
    values: list[tuple[mx.array, metrics.Tallies]] = []
    lanes = max(1, len(fixed.streams))
    for first in range(0, len(micros), lanes):
        works = [_differentiate(weights, micro, fixed) for micro in micros[first : first + lanes]]
        for portion in side_by_side(works, fixed.streams, values):
            for name in list(portion) if len(micros) > 1 else ():
                # sums of many low-precision gradients are kept in float32; popped, a sum takes the memory of the last
                grad = portion.pop(name).astype(mx.float32)
                portion[name] = total.pop(name) + grad if name in total else grad
                del grad
            mx.async_eval(portion)  # type: ignore[no-untyped-call]
            total |= portion
        mx.eval(total, values)
    loss = mx.sum(mx.stack([loss for loss, _ in values]))
    return total, {"loss": loss, **metrics.averages(metrics.merge([tallies for _, tallies in values]))}


def _differentiate(weights: Weights, micro: _Micro, fixed: _Fixed) -> Differentiation:
    """Loss and tallies of one micro-batch, and the gradients as they come."""
    log_probs_fn = fixed.log_probs_fn

    def loss(log_probs: mx.array, entropies: mx.array) -> tuple[mx.array, metrics.Tallies]:
        return _micro_loss(log_probs, entropies, micro, fixed)

    if isinstance(log_probs_fn, LogProbs):
        return log_probs_fn.gradients(weights, micro.batch, loss)

    def of_weights(weights: Weights) -> tuple[mx.array, metrics.Tallies]:
        return loss(*log_probs_fn(weights, micro.batch))

    return _whole(of_weights, weights)


def _whole(of_weights: Callable[[Weights], tuple[mx.array, metrics.Tallies]], weights: Weights) -> Differentiation:
    """The same in one piece, by MLX."""
    value, grads = mx.value_and_grad(of_weights)(weights)
    yield None, grads
    return value


def _micro_loss(
    log_probs: mx.array, entropies: mx.array, micro: _Micro, fixed: _Fixed
) -> tuple[mx.array, metrics.Tallies]:
    """The share of one micro-batch in the loss of the batch."""
    config, batch, mask = fixed.config, micro.batch, micro.batch.completion_mask
    if not config.has_entropy_bonus:
        entropies = mx.stop_gradient(entropies)
    old = mx.stop_gradient(log_probs) if micro.old is None else micro.old
    correction, sampling = None, {}
    if config.vllm_importance_sampling_correction:
        correction = ratios.sampler_correction(
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
        entropy_threshold=fixed.entropy_threshold,
        entropy_coef=fixed.entropy_coef,
        normalizer=fixed.normalizer,
    )
    return loss, tallies | sampling


def _floats(values: Mapping[str, mx.array]) -> dict[str, float]:
    """All values in one transfer from the device."""
    numbers: list[float] = mx.stack(list(values.values())).tolist()  # type: ignore[assignment]
    return dict(zip(values, numbers, strict=True))


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
