"""The gradient of one learner batch, from micro-batches that share one normalizer.

So cutting a batch into more of them changes the memory it takes and not its gradient. Log-probs come from an injected
`PolicyLogProbs`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import mlx.core as mx

from troupe.grpo import ratios
from troupe.grpo.batch import Batch, split
from troupe.grpo.config import LearnerConfig
from troupe.grpo.loss import Normalizer, batch_normalizer, loss_and_tallies, sampler_tallies
from troupe.grpo.tallies import Tallies, averages, merge
from troupe.policy.gradient.chunks import Chunk, Gradients, side_by_side
from troupe.policy.network.qwen3 import Weights

Extra = TypeVar("Extra")


class PolicyLogProbs(Protocol):
    """The log-probs of a policy's completions, and the gradient of what is computed from them."""

    def __call__(self, weights: Weights, batch: Batch, /) -> tuple[mx.array, mx.array]:
        """Log-probs (B, T) of the completion ids and entropies (B, T), both float32, in nats, under the
        temperature-scaled distribution. What stands on padding does not matter, as long as it is finite."""

    def gradients(
        self, weights: Weights, batch: Batch, loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]]
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """The gradients of `loss`, of log-probs and entropies, by the weights, each once; returns what `loss` gives."""


class DifferentiatedByMlx:
    """A plain function of weights and batch as `PolicyLogProbs`, its gradient in one chunk."""

    def __init__(self, function: Callable[[Weights, Batch], tuple[mx.array, mx.array]]) -> None:
        self._function = function

    def __call__(self, weights: Weights, batch: Batch, /) -> tuple[mx.array, mx.array]:
        """What the function gives."""
        return self._function(weights, batch)

    def gradients(
        self, weights: Weights, batch: Batch, loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]]
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """By `mx.value_and_grad`."""
        value, grads = mx.value_and_grad(lambda weights: loss(*self._function(weights, batch)))(weights)
        yield None, grads
        result: tuple[mx.array, Extra] = value
        return result


class _MicroBatch(NamedTuple):
    """A micro-batch with what stays the same over all passes; (B, T) each."""

    batch: Batch
    old: mx.array | None
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
        self._micros: list[_MicroBatch] = []
        parts = split(batch, config.gradient_accumulation_steps or 1)
        several_passes = config.num_iterations > 1
        some_entropies = config.top_entropy_quantile < 1.0
        entropies = []
        for part in parts:
            old = ref = None
            if several_passes or (some_entropies and len(parts) > 1):
                old, part_entropies = log_probs(weights, part)
                mx.eval(old, part_entropies)
                entropies.append(part_entropies)
            if config.beta != 0.0 and ref_weights is not None:
                ref, _ = log_probs(ref_weights, part)
                mx.eval(ref)
            self._micros.append(_MicroBatch(part, old if several_passes else None, ref))

        self._entropy_threshold = entropy_tokens = None
        if some_entropies and entropies:
            masks = mx.concatenate([part.completion_mask.reshape(-1) for part in parts])
            flat = mx.concatenate([part_entropies.reshape(-1) for part_entropies in entropies])
            self._entropy_threshold = ratios.entropy_threshold(flat, masks, config.top_entropy_quantile)
            entropy_tokens = mx.sum(ratios.high_entropy_mask(flat, masks, self._entropy_threshold))
        self._normalizer: Normalizer = batch_normalizer(
            config,
            rows=batch.num_rows,
            tokens=mx.sum(batch.completion_mask),
            entropy_tokens=entropy_tokens,
            max_completion_length=max_completion_length,
        )

    def at(self, weights: Weights, entropy_coef: float) -> tuple[Gradients, Tallies]:
        """The gradient by `weights`, and `loss` and metrics, each (); as many micro-batches at a time as there are
        streams. `entropy_coef`: the weight of the entropy bonus in force."""
        total: Gradients = {}
        values: list[tuple[mx.array, Tallies]] = []
        lanes = max(1, len(self._streams))
        for first in range(0, len(self._micros), lanes):
            works = [
                self._log_probs.gradients(weights, micro.batch, partial(self._loss, micro, entropy_coef))
                for micro in self._micros[first : first + lanes]
            ]
            for portion in side_by_side(works, self._streams, values):
                for name in list(portion) if len(self._micros) > 1 else ():
                    # sums of low-precision gradients are kept in float32; popped, a sum takes the memory of the last
                    grad = portion.pop(name).astype(mx.float32)
                    portion[name] = total.pop(name) + grad if name in total else grad
                    del grad
                mx.async_eval(portion)  # type: ignore[no-untyped-call]
                total |= portion
            mx.eval(total, values)
        loss = mx.sum(mx.stack([loss for loss, _ in values]))
        return total, {"loss": loss, **averages(merge([tallies for _, tallies in values]))}

    def _loss(
        self, micro: _MicroBatch, entropy_coef: float, log_probs: mx.array, entropies: mx.array
    ) -> tuple[mx.array, Tallies]:
        """The share of one micro-batch in the loss of the batch."""
        config, batch, mask = self._config, micro.batch, micro.batch.completion_mask
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
            entropy_threshold=self._entropy_threshold,
            entropy_coef=entropy_coef,
            normalizer=self._normalizer,
        )
        return loss, tallies | sampling
