"""The gradient of a learner batch: that of its micro-batches, which share what only the whole batch tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.batch import Batch, micro_batches
from troupe.grpo.choices import Places, chosen_tokens, draws, known_log_probs
from troupe.grpo.comparisons import entropy_threshold, high_entropy_mask, sampler_correction
from troupe.grpo.config import LearnerConfig
from troupe.grpo.echo import echo_loss, observation_weights
from troupe.grpo.lanes import Lanes, in_lanes
from troupe.grpo.log_probs import PolicyLogProbs
from troupe.grpo.loss import batch_normalizer, has_entropy_bonus, loss_and_tallies, routing_tallies, sampler_tallies
from troupe.grpo.objectives import OBJECTIVES
from troupe.grpo.ranks import OneRank, Ranks
from troupe.grpo.tallies import Tallies, averages, tally
from troupe.policy.gradient.backward import side_by_side
from troupe.policy.gradient.parts import Gradients
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import Weights


class _MicroBatch(NamedTuple):
    """A micro-batch with what stays the same over all passes; (B, T) each."""

    batch: Batch
    old: mx.array | None
    """Of the policy that sampled; None: of the only pass itself, which is the same where nothing is dropped."""
    ref: mx.array | None
    chosen: mx.array | None = None
    """Tokens that the loss type chooses in a pass."""
    drawn: mx.array | None = None
    """What it chooses them by, where the micro-batch is the whole batch."""


class BatchGradient:
    """The gradient of a batch, once for each of its passes.

    What the passes share is computed first: old and reference log-probs, the normalizer, the entropy threshold. Where
    several ranks learn, each computes what belongs to its lanes, and all come to the same gradient.
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
        seed: int = 0,
        ranks: Ranks | None = None,
        on_part: Callable[[str], None] = lambda name: None,
    ) -> None:
        """`weights`: those of the old log-probs. `on_part`: called where there are several ranks when this one has made
        its share of a gradient (`gradient`), and when all are added (`gather`). The other arguments are those of
        `train_on_batch`."""
        self._log_probs = log_probs
        self._config = config
        self._streams = streams
        self._seed = seed
        self._choice = OBJECTIVES[config.loss_type].choice
        self._rows = batch.num_rows
        if self._choice is not None and batch.keys is None:
            batch = replace(batch, keys=tuple((row, row) for row in range(batch.num_rows)))
        self._micros: list[_MicroBatch] = []
        number = in_lanes(config.gradient_accumulation_steps or 1, config.lanes)
        whole = replace(batch.with_shares(), echo=observation_weights(batch) if config.echo_alpha else None)
        parts = micro_batches(whole, number, max_completion_length)
        self._lanes = Lanes(parts, config.lanes, OneRank() if ranks is None else ranks)
        self._on_part = on_part if ranks is not None and ranks.size > 1 else lambda name: None
        keeps_old = config.num_iterations > 1 or log_probs.has_dropout
        some_entropies = config.top_entropy_quantile < 1.0
        entropies = []
        for part in self._lanes.own:
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
            everywhere = self._lanes.everywhere(entropies)
            flat = mx.concatenate([part_entropies.reshape(-1) for part_entropies in everywhere])
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
        sums = self._lanes.sums()
        values: list[tuple[mx.array, Tallies]] = []
        at_once = max(1, len(self._streams))
        micros = self._chosen(weights, pass_number)
        for first in range(0, len(micros), at_once):
            works = []
            for micro in micros[first : first + at_once]:
                batch, routes = replace(micro.batch, pass_number=pass_number), self._routes(micro.batch, balances=True)
                loss = partial(self._loss, micro, entropy_coef, routes.get("routes"))
                works.append(self._log_probs.gradients(weights, batch, loss, **routes))
            for portion in side_by_side(works, self._streams, values):
                mx.async_eval(sums.add(portion))  # type: ignore[no-untyped-call]
            mx.eval(sums.arrays, values)
        self._on_part("gradient")
        loss_of_all, tallies = self._lanes.merged(values)
        total = self._lanes.total(sums)
        self._on_part("gather")
        return total, {"loss": loss_of_all, **averages(tallies)}

    def _chosen(self, weights: Weights, pass_number: int) -> list[_MicroBatch]:
        """The micro-batches with what the loss type chooses of the whole batch by these weights, or what it is drawn by
        where one micro-batch is the whole, whose own log-probs then do."""
        if self._choice is None:
            return self._micros
        lanes, micros = self._lanes, self._micros
        drawn = [self._draws(part, pass_number) for part in lanes.parts]
        if len(lanes.parts) == 1 and not self._log_probs.has_dropout:
            return [micros[0]._replace(drawn=drawn[0])]
        now: list[mx.array] = []
        for micro in micros:
            new = micro.old
            if pass_number > 0 or new is None:
                new, _ = self._log_probs(weights, micro.batch, **self._routes(micro.batch))
            mx.eval(new)
            now.append(new)
        before = [new if micro.old is None else micro.old for micro, new in zip(micros, now, strict=True)]
        places = []
        columns = lanes.parts, lanes.everywhere(now), lanes.everywhere(before), drawn
        for part, new, old, numbers in zip(*columns, strict=True):
            sampling = known_log_probs(part.sampling_log_probs, old)
            places.append(Places.of(new, old, sampling, part.advantages, part.completion_mask, numbers))
            mx.eval(places[-1])
        chosen = chosen_tokens(self._choice, places, self._config)
        return [micro._replace(chosen=chosen[number]) for micro, number in zip(micros, lanes.numbers, strict=True)]

    def _draws(self, batch: Batch, pass_number: int) -> mx.array:
        assert batch.keys is not None
        rows = [own for _, own in batch.keys]
        return draws(rows, batch.completion_mask.shape[1], seed=self._seed, pass_number=pass_number)

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
        margins: mx.array | None = None,
    ) -> tuple[mx.array, Tallies]:
        """The share of one micro-batch in the loss of the batch. `margins` (B, T): how far tokens lie below the
        likeliest, where that is told."""
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
            chosen=micro.chosen,
            drawn=micro.drawn,
            entropy_coef=entropy_coef,
            normalizer=self._normalizer,
            shares=batch.shares,
        )
        if margins is not None:
            tallies["mean_token_accuracy"] = tally(margins >= 0.0, mask)
        if batch.echo is not None:
            foreseeing, echo = echo_loss(log_probs, batch.echo, config.echo_alpha)
            loss, tallies = loss + foreseeing, tallies | echo
        if routes is None:
            return loss, tallies | sampling
        balance, routing = routing_tallies(routes, batch.num_rows / self._rows)
        return loss + balance, tallies | sampling | routing
