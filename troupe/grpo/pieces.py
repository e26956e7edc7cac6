"""Work on the device in pieces, and several such works side by side.

Whoever makes the pieces knows what is computed; whoever goes through them, when, how far ahead, and on which streams.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import mlx.core as mx

from troupe.grpo.tallies import Tallies

Value = TypeVar("Value")

Piece = tuple[Any, dict[str, mx.array]]
"""Arrays to begin with, and gradients that are complete. What was begun is awaited before more than one piece is on its
way; None: nothing to begin with, empty: await it at once."""
Differentiation = Generator[Piece, None, tuple[mx.array, Tallies]]


def side_by_side(
    works: Sequence[Generator[Piece, None, Value]], streams: Sequence[mx.Stream], values: list[Value]
) -> Iterator[dict[str, mx.array]]:
    """Goes through all works piece by piece, each on its stream where there are streams: the gradients as they are
    complete, and in `values`, in the order of the works, what each returns.

    While the device is at one piece of each the next is prepared, no more: it is kept busy and the memory low. All
    works have the same portions, and of each that of an earlier work comes first, or sums would depend on the streams.
    """
    found: dict[int, Value] = {}
    early: dict[int, dict[str, mx.array]] = {}
    given = [0] * len(works)
    begun: Any = ()
    while len(found) < len(works):
        pieces = []
        for place, work in enumerate(works):
            if place in found:
                continue
            piece, portion = None, early.pop(place, {})
            if not portion:
                try:
                    with mx.stream(streams[place]) if streams else nullcontext():
                        piece, portion = next(work)
                except StopIteration as end:
                    found[place] = end.value
                    continue
            if piece is not None:
                pieces.append(piece)
            if portion and place and given[place] == given[place - 1]:
                early[place] = portion
            elif portion:
                given[place] += 1
                yield portion
            del piece, portion
        if pieces:
            mx.async_eval(pieces)  # type: ignore[no-untyped-call]
            mx.eval(begun)
            begun = pieces
    values.extend(found[place] for place in range(len(works)))
