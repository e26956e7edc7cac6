"""What learning computes of each token, kept for people: entropies, and how far the policy is from who sampled it.

Nothing is computed for it that is not computed anyway, and nothing that is learned changes by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple, TypeVar

import mlx.core as mx

from troupe.actors.learner.rows import rows_of
from troupe.grpo import Batch
from troupe.grpo.log_probs import PolicyLogProbs
from troupe.messages import ScoredGroup, TokenFigures
from troupe.policy import Weights
from troupe.policy.gradient.backward import Chunk
from troupe.policy.network.dropout import completion_key
from troupe.policy.network.routes import Routes

Extra = TypeVar("Extra")


class _Rows(NamedTuple):
    """Of some rows of a batch, by the key of each."""

    keys: Sequence[tuple[int, int]]
    entropies: mx.array
    ratios: mx.array


class Watched:
    """The `PolicyLogProbs` of a policy, which keeps what it says of each token until it is collected."""

    def __init__(self, log_probs: PolicyLogProbs) -> None:
        self._log_probs = log_probs
        self._first: list[_Rows] = []
        """Of the first pass over a batch."""
        self._last: list[_Rows] = []
        """Of the last one."""
        self._pass = 0

    @property
    def has_dropout(self) -> bool:
        """As the policy's."""
        return self._log_probs.has_dropout

    def routes(self, batch: Batch, *, follows: bool, balance: float = 0.0) -> Routes | None:
        """As the policy's."""
        return self._log_probs.routes(batch, follows=follows, balance=balance)

    def __call__(self, weights: Weights, batch: Batch, /, routes: Routes | None = None) -> tuple[mx.array, mx.array]:
        """As the policy's."""
        return self._log_probs(weights, batch, **({} if routes is None else {"routes": routes}))

    def gradients(
        self,
        weights: Weights,
        batch: Batch,
        loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]],
        routes: Routes | None = None,
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """As the policy's; what the loss is computed from is kept."""

        def watched(log_probs: mx.array, entropies: mx.array) -> tuple[mx.array, tuple[Extra, mx.array, mx.array]]:
            value, extra = loss(log_probs, entropies)
            return value, (extra, mx.stop_gradient(log_probs), mx.stop_gradient(entropies))

        given = {} if routes is None else {"routes": routes}
        value, (extra, log_probs, entropies) = yield from self._log_probs.gradients(weights, batch, watched, **given)
        if batch.keys is not None:
            self._keep(batch, _Rows(batch.keys, entropies, mx.exp(log_probs - batch.sampling_log_probs)))
        return value, extra

    def _keep(self, batch: Batch, rows: _Rows) -> None:
        if batch.pass_number == 0:
            self._first.append(rows)
        if batch.pass_number != self._pass:
            self._pass, self._last = batch.pass_number, []
        self._last.append(rows)

    def collect(self, groups: Sequence[ScoredGroup]) -> dict[int, tuple[TokenFigures | None, ...]]:
        """Gid → (G,) what was kept of the completions of groups; None where nothing was. It is forgotten then."""
        entropies = {key: row for rows in self._first for key, row in _by_key(rows.keys, rows.entropies)}
        ratios = {key: row for rows in self._last for key, row in _by_key(rows.keys, rows.ratios)}
        self._first, self._last, self._pass = [], [], 0
        found: dict[int, list[TokenFigures | None]] = {
            group.group.prompt.gid: [None] * len(group.group.rollouts) for group in groups
        }
        for row in rows_of([group.group for group in groups]):
            gid = groups[row.group].group.prompt.gid
            key = completion_key(gid, row.sample, row.number)
            if key not in entropies or key not in ratios:
                continue
            T = len(row.rollout.token_ids)
            before = found[gid][row.sample] or TokenFigures(entropies=(math.nan,) * T, ratios=(math.nan,) * T)
            found[gid][row.sample] = TokenFigures(
                entropies=_with(before.entropies, row.start, row.stop, entropies[key]),
                ratios=_with(before.ratios, row.start, row.stop, ratios[key]),
            )
        return {gid: tuple(samples) for gid, samples in found.items()}


def _by_key(keys: Sequence[tuple[int, int]], values: mx.array) -> list[tuple[int, list[float]]]:
    rows: list[list[float]] = values.tolist()  # type: ignore[assignment]
    return [(own, row) for (_, own), row in zip(keys, rows, strict=True)]


def _with(values: tuple[float, ...], start: int, stop: int, some: Sequence[float]) -> tuple[float, ...]:
    """The values with others from `start` to `stop`; behind these `some` is padding."""
    return (*values[:start], *some[: stop - start], *values[stop:])
