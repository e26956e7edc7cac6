"""Where log-probs come from: what a batch's gradient asks of a policy, and a plain function in its place."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Protocol, TypeVar

import mlx.core as mx

from troupe.grpo.batch import Batch
from troupe.policy.gradient.backward import Chunk
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import Weights

Extra = TypeVar("Extra")


class PolicyLogProbs(Protocol):
    """The log-probs of a policy's completions, and the gradient of what is computed from them."""

    @property
    def has_dropout(self) -> bool:
        """Whether gradients are those of a network of which something is dropped, otherwise in each pass over a batch;
        log-probs alone are those of the whole."""

    def routes(self, batch: Batch, *, follows: bool, balance: float = 0.0) -> Routes | None:
        """Which experts the tokens of one pass go to, as `Routes` has it; None where the network has no experts."""

    def __call__(self, weights: Weights, batch: Batch, /, routes: Routes | None = None) -> tuple[mx.array, mx.array]:
        """Log-probs (B, T) of the completion ids and entropies (B, T), both float32, in nats, under the
        temperature-scaled distribution. What stands on padding does not matter, as long as it is finite."""

    def gradients(
        self,
        weights: Weights,
        batch: Batch,
        loss: Callable[..., tuple[mx.array, Extra]],
        routes: Routes | None = None,
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """The gradients of `loss`, of log-probs and entropies, by the weights, each once; returns what `loss` gives. A
        third argument, where it is given, says how far tokens lie below the likeliest, (B, T).
        Neither here nor above are `routes` given to what makes none."""


class DifferentiatedByMlx:
    """A plain function of weights and batch as `PolicyLogProbs`, its gradient in one chunk."""

    has_dropout = False

    def __init__(self, function: Callable[[Weights, Batch], tuple[mx.array, mx.array]]) -> None:
        self._function = function

    def routes(self, batch: Batch, *, follows: bool, balance: float = 0.0) -> Routes | None:
        """None: nothing is known of a network."""
        return None

    def __call__(self, weights: Weights, batch: Batch, /, routes: Routes | None = None) -> tuple[mx.array, mx.array]:
        """What the function gives."""
        return self._function(weights, batch)

    def gradients(
        self,
        weights: Weights,
        batch: Batch,
        loss: Callable[[mx.array, mx.array], tuple[mx.array, Extra]],
        routes: Routes | None = None,
    ) -> Generator[Chunk, None, tuple[mx.array, Extra]]:
        """By `mx.value_and_grad`."""
        value, grads = mx.value_and_grad(lambda weights: loss(*self._function(weights, batch)))(weights)
        yield None, grads
        result: tuple[mx.array, Extra] = value
        return result
