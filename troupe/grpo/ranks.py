"""Ranks: processes that learn the same batch together, each a share of its rows."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from troupe.errors import RunError
from troupe.grpo.optimizer import UPDATED_AT_ONCE


class Ranks(Protocol):
    """This process among those that learn together."""

    @property
    def rank(self) -> int:
        """Number of this one, from 0."""

    @property
    def size(self) -> int:
        """How many there are; a power of two."""

    def gather(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """Every rank's arrays, in the order of ranks; all ranks call it alike, with arrays of the same shapes and
        dtypes."""


class OneRank:
    """A process that learns alone."""

    rank = 0
    size = 1

    def gather(self, arrays: Sequence[mx.array]) -> list[list[mx.array]]:
        """The arrays themselves."""
        return [list(arrays)]


def check_alike(ranks: Ranks | None, weights: Mapping[str, mx.array]) -> None:
    """Raise RunError unless all ranks have the same weights, to the bit; None is one rank."""
    if ranks is None or ranks.size == 1:
        return
    digests: list[Any] = [of_rank.item() for (of_rank,) in ranks.gather([digest(weights)])]
    if odd := [rank for rank, value in enumerate(digests) if value != digests[0]]:
        raise RunError(
            f"the learner's rank {odd[0]} has come to other weights than rank 0 (digests {digests[odd[0]]:08x} and "
            f"{digests[0]:08x}); nothing of this step was published. Resume the run; if it happens again, a card may "
            "be faulty"
        )


def digest(weights: Mapping[str, mx.array]) -> mx.array:
    """A number (1,) uint32 of all bits of the weights, in which a change of any one weight shows. Evaluated."""
    total = mx.zeros((1,), mx.uint32)
    for name in sorted(weights):
        flat = weights[name].reshape(-1)
        for start in range(0, flat.size, UPDATED_AT_ONCE):
            total = total * 3 + _weighed(flat[start : start + UPDATED_AT_ONCE])
            mx.async_eval(total)  # type: ignore[no-untyped-call]
    mx.eval(total)
    return total


def _weighed(x: mx.array) -> mx.array:
    """The sum of the bits of each number times an odd one, modulo 2³²: in whatever order, it is the same."""
    bits = mx.view(x, mx.uint16 if x.dtype.size == 2 else mx.uint32).astype(mx.uint32)
    return mx.sum(bits * (2 * mx.arange(x.size).astype(mx.uint32) + 1))
