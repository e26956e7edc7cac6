"""Ranks: processes that learn the same batch together, each a share of its rows."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx


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
