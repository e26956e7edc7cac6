"""The loss types: which policy term each has, what a completion weighs, and what all is divided by.

To add an objective, write its function in `policy_terms` and its line in `OBJECTIVES`.

Shapes: B rows, T completion tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.choices import Choice, by_clip_cov, by_kl_cov, by_second_moment
from troupe.grpo.comparisons import masked_sum, row_means
from troupe.grpo.policy_terms import (
    PolicyTerm,
    cispo,
    clip_cov,
    clipped,
    dppo,
    gmpo,
    kl_cov,
    m2po,
    nll,
    rloo,
    sapo,
    vespo,
)

SUPERVISED = "nll"
"""What supervised steps are learned by; nobody chooses it for others, so that it is no `LossType`."""
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
    choice: Choice | None = None
    """By which tokens of the whole batch are chosen that the policy term treats otherwise."""
    adds_rows: bool = False
    """The rows of one completion add up where the policy term has one value a row."""

    def reduced(self, loss: mx.array, mask: mx.array, shares: mx.array | None) -> mx.array:
        """`reduce`. Where a completion is several rows, each of the `shares` (B,) of its tokens, it weighs as one row
        of all these tokens would; (B, 1)."""
        values = self.reduce(loss, mask)
        adds_up = self.reduce is masked_sum or (self.adds_rows and loss.shape[1] == 1)
        return values if shares is None or adds_up else values * shares[:, None]


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
    "rloo": Objective(rloo, row_values, by_rows, takes_entropy_mask=True, adds_rows=True),
    "dppo": Objective(dppo, masked_sum, by_tokens, takes_sampler_ratio=True),
    "m2po": Objective(m2po, masked_sum, by_tokens, takes_sampler_ratio=True, choice=by_second_moment),
    "clip_cov": Objective(clip_cov, masked_sum, by_tokens, choice=by_clip_cov),
    "kl_cov": Objective(kl_cov, masked_sum, by_tokens, choice=by_kl_cov),
    SUPERVISED: Objective(nll, masked_sum, by_tokens),
}
"""Loss type → objective. They differ in what a completion weighs: as much as any other in grpo and sapo, by its
length in the others, most of all in luspo (Liu et al. 2026, arXiv:2602.05261), which is meant for sequence ratios."""
