"""What is kept of tokens: each at its place, whatever rows, micro-batches and passes it went through."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from tests.support.episodes import acted, played
from troupe.actors.learner.batch import assemble
from troupe.actors.learner.token_figures import Watched
from troupe.grpo import Batch, LearnerConfig
from troupe.grpo.log_probs import DifferentiatedByMlx
from troupe.messages import ScoredGroup
from troupe.policy import Weights

FORKED = acted(2, 1, 2, 0, 3, rows=[(5, (7, 8, 9))])
"""Eight tokens in two rows, of which the fourth was read."""
PLAIN = acted(4, first_id=30)
GROUP = played([FORKED, PLAIN], scores=[1.0, 0.0])


def said(weights: Weights, batch: Batch) -> tuple[mx.array, mx.array]:
    """Log-probs that grow with the weight; the entropy of a token is its id."""
    ids = batch.completion_ids.astype(mx.float32)
    return weights["w"] - 1.0 + 0.0 * ids, ids


def learned(groups: Sequence[ScoredGroup], *passes: float, micros: Sequence[Sequence[int]]) -> Watched:
    """One pass for each weight."""
    batch = assemble(groups, LearnerConfig(), weights={"r": 1.0}, pad_id=0).batch
    watched = Watched(DifferentiatedByMlx(said))
    for number, weight in enumerate(passes):
        for rows in micros:
            part = replace(batch.select(rows), pass_number=number)
            work = watched.gradients({"w": mx.array(weight)}, part, lambda x, _: (mx.sum(x), {"extra": mx.array(7)}))
            _, extra = result_of(work)
            assert extra["extra"].item() == 7, "what the loss gives besides comes through"
    return watched


def result_of(work: Generator[Any, None, Any]) -> Any:
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


@pytest.mark.parametrize("micros", [[[0, 1, 2]], [[2, 0], [1]]])
def test_every_token_has_its_own(micros: list[list[int]]) -> None:
    found = learned([GROUP], 0.0, 0.5, micros=micros).collect([GROUP])
    assert list(found) == [GROUP.group.prompt.gid]
    for figures, rollout in zip(found[GROUP.group.prompt.gid], (FORKED, PLAIN), strict=True):
        assert figures is not None
        assert figures.entropies == tuple(map(float, rollout.token_ids))
        expected = [math.exp(0.5 - 1.0 - log_prob) for log_prob in rollout.log_probs]
        assert list(figures.ratios) == pytest.approx(expected), "of the last pass"


def test_what_was_not_learned_from_has_none_and_nothing_is_left_over() -> None:
    watched = learned([GROUP], 0.0, micros=[[0]])
    [forked, plain] = watched.collect([GROUP])[GROUP.group.prompt.gid]
    assert plain is None
    assert forked is not None
    assert [math.isnan(value) for value in forked.entropies] == [False] * 5 + [True] * 3
    assert watched.collect([GROUP]) == {GROUP.group.prompt.gid: (None, None)}
