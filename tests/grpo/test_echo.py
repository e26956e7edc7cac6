"""ECHO by its formula, in float64; however the batch is cut; and beside what TRL's loss masks."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.trl import assert_close
from troupe.actors.learner.rank_wire import pack_batch, unpack_batch
from troupe.grpo import Batch, LearnerConfig, make_batch
from troupe.grpo.batch_gradient import BatchGradient
from troupe.grpo.log_probs import DifferentiatedByMlx

ALPHA = 0.05
# which tokens of four completions are the policy's own; the third observes nothing, the last is two rows
OWN = [[1, 1, 0, 0, 0, 1], [1, 0, 1], [1, 1, 1, 1], [1, 0, 0], [0, 1, 1, 0, 1]]
SAMPLES = [0, 1, 2, 3, 3]
T = max(map(len, OWN))


def batch_of(**settings: Any) -> Batch:
    return make_batch(
        [[1], [1], [2], [3], [3, 4]],
        [[row] * len(own) for row, own in enumerate(OWN)],
        [[0.0] * len(own) for own in OWN],
        [1.0, -1.0, 0.5, 0.0, 0.0],
        pad_id=0,
        sampled=[[bool(own) for own in row] for row in OWN],
        samples=SAMPLES,
        **settings,
    )


def gradient_of(batch: Batch, logps: mx.array, **settings: Any) -> tuple[mx.array, dict[str, mx.array]]:
    def statistics(weights: Any, part: Batch) -> tuple[mx.array, mx.array]:
        rows = mx.array([completion[0] for completion in part.completions])  # the first id says which row it is
        columns = part.completion_mask.shape[1]
        return weights["logps"][rows, :columns], mx.zeros((part.num_rows, columns))

    config = LearnerConfig(vllm_importance_sampling_correction=False, **settings)
    gradient = BatchGradient(
        {"logps": logps}, batch, DifferentiatedByMlx(statistics), config,
        ref_weights=None, max_completion_length=T, streams=(),
    )  # fmt: skip
    grads, values = gradient.at({"logps": logps}, 0.0, 0)
    return grads["logps"], values


def by_formula(logps: np.ndarray[Any, Any]) -> float:
    """1/N Σᵢ 1/|Oᵢ| Σ −log π over observed tokens, as the paper has it."""
    means = []
    for sample in sorted(set(SAMPLES)):
        nats = [
            -logps[row, t] for row, own in enumerate(OWN) if SAMPLES[row] == sample for t, o in enumerate(own) if not o
        ]
        if nats:
            means.append(np.mean(nats))
    return float(np.mean(means))


@pytest.mark.parametrize("cut", [{}, {"gradient_accumulation_steps": 3}, {"lanes": 2}])
def test_it_adds_the_formula_and_its_gradient(cut: dict[str, Any]) -> None:
    logps = np.random.default_rng(5).normal(-1.5, 0.6, (len(OWN), T))
    plain, without = gradient_of(batch_of(), mx.array(logps.astype(np.float32)), **cut)
    grads, values = gradient_of(batch_of(), mx.array(logps.astype(np.float32)), echo_alpha=ALPHA, **cut)
    assert_close((values["loss"] - without["loss"]).item(), ALPHA * by_formula(logps), 1e-6)
    slopes, step = np.zeros_like(logps), 1e-5
    for place in np.ndindex(logps.shape):
        moved = logps.copy()
        moved[place] += step
        slopes[place] = ALPHA * (by_formula(moved) - by_formula(logps)) / step
    assert_close(grads - plain, mx.array(slopes.astype(np.float32)), 1e-6)
    observed = [-logps[row, t] for row, own in enumerate(OWN) for t, o in enumerate(own) if not o]
    assert_close(values["echo/loss"].item(), float(np.mean(observed)), 1e-5)


def test_nothing_observed_adds_nothing() -> None:
    batch = make_batch([[1]], [[0, 0]], [[0.0, 0.0]], [1.0], pad_id=0)
    logps = mx.array([[-1.0, -2.0]])
    plain, _ = gradient_of(batch, logps)
    grads, values = gradient_of(batch, logps, echo_alpha=ALPHA)
    assert grads.tolist() == plain.tolist()
    assert "echo/loss" not in values


@pytest.mark.parametrize("observes", [True, False])
def test_ranks_are_given_what_was_observed(observes: bool) -> None:
    batch = batch_of() if observes else make_batch([[1]], [[0]], [[0.0]], [1.0], pad_id=0)
    there = unpack_batch(pack_batch(batch))
    assert (there.observed is None) == (batch.observed is None) == (not observes)
    if batch.observed is not None and there.observed is not None:
        assert there.observed.tolist() == batch.observed.tolist()
