"""The chunks that a gradient is computed in, and several gradients computed side by side.

Whoever makes the chunks knows what is computed; whoever goes through them, when, how far ahead, and on which streams.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, TypeVar

import mlx.core as mx

Value = TypeVar("Value")
Gradients = dict[str, mx.array]

Chunk: TypeAlias = tuple[Any, Gradients]
"""Arrays to begin with, and gradients that are complete. What was begun is awaited before more than one chunk is on its
way; None: nothing to begin with, empty: await it at once."""


def side_by_side(
    works: Sequence[Generator[Chunk, None, Value]], streams: Sequence[mx.Stream], values: list[Value]
) -> Iterator[Gradients]:
    """Goes through all works chunk by chunk, each on its stream where there are streams: the gradients as they are
    complete, and in `values`, in the order of the works, what each returns.

    While the device is at one chunk of each the next is prepared, no more: it is kept busy and the memory low. All
    works have the same portions, and of each that of an earlier work comes first, or sums would depend on the streams.
    """
    found: dict[int, Value] = {}
    early: dict[int, Gradients] = {}
    given = [0] * len(works)
    begun: Any = ()
    while len(found) < len(works):
        beginning = []
        for place, work in enumerate(works):
            if place in found:
                continue
            arrays, portion = None, early.pop(place, {})
            if not portion:
                try:
                    with mx.stream(streams[place]) if streams else nullcontext():
                        arrays, portion = next(work)
                except StopIteration as end:
                    found[place] = end.value
                    continue
            if arrays is not None:
                beginning.append(arrays)
            if portion and place and given[place] == given[place - 1]:
                early[place] = portion
            elif portion:
                given[place] += 1
                yield portion
            del arrays, portion
        if beginning:
            mx.async_eval(beginning)  # type: ignore[no-untyped-call]
            mx.eval(begun)
            begun = beginning
    values.extend(found[place] for place in range(len(works)))
