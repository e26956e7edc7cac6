"""Lanes: the fixed shares of a batch that are summed apart, so that the sum does not depend on who makes them.

The micro-batches of a batch are cut into L lanes of neighbours. Within a lane gradients are added in order, the sums of
lanes as a binary tree: with four, (0 + 1) + (2 + 3). A rank of R has the lanes from r·L/R on, which are a branch of the
tree, and what ranks have made is added by all alike. A lane without micro-batches, of a small batch, is left out.

Shapes: B rows of a micro-batch, T its completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, starmap

import mlx.core as mx

from troupe.grpo.batch import Batch
from troupe.grpo.ranks import Ranks
from troupe.grpo.tallies import Tallies, merge
from troupe.policy.gradient.parts import Gradients

GATHERED_AT_ONCE = 2**25
"""Numbers of a gradient that ranks give each other at a time."""


def in_lanes(micro_batches: int, lanes: int) -> int:
    """So many micro-batches, or a few more, so that each lane has as many as the others."""
    return lanes * math.ceil(micro_batches / lanes)


class Lanes:
    """What of a batch is this rank's, and how it comes together with what others have."""

    def __init__(self, parts: Sequence[Batch], lanes: int, ranks: Ranks) -> None:
        """`parts`: all micro-batches. ValueError where the ranks cannot share the lanes."""
        if ranks.size & (ranks.size - 1) or ranks.size > lanes:
            raise ValueError(f"{ranks.size} ranks cannot share {lanes} lanes; give a power of two up to {lanes}")
        self.parts = parts
        self._ranks, self._lanes = ranks, lanes
        size, longer = divmod(len(parts), lanes)
        edges = [i * size + min(i, longer) for i in range(lanes + 1)]
        self._filled = min(lanes, len(parts))
        """Lanes that have micro-batches: the first."""
        each = lanes // ranks.size
        self._ranges = [range(edges[r * each], edges[(r + 1) * each]) for r in range(ranks.size)]
        # who has none computes the first for nothing, so that all have something of one shape to give
        self._held = [numbers or range(1) for numbers in self._ranges]
        self.numbers = self._held[ranks.rank]
        """Of this rank's micro-batches."""
        ranges = starmap(range, pairwise(edges))
        self._lane = {number: lane for lane, numbers in enumerate(ranges) for number in numbers}

    @property
    def own(self) -> list[Batch]:
        """The micro-batches of this rank."""
        return [self.parts[number] for number in self.numbers]

    @property
    def lane_of_own(self) -> list[int]:
        """The lane of each of them."""
        return [self._lane[number] for number in self.numbers]

    def everywhere(self, own: Sequence[mx.array]) -> list[mx.array]:
        """(B, T) of each micro-batch of this rank → of each micro-batch of the batch."""
        if self._ranks.size == 1:
            return list(own)
        shapes = [[self.parts[number].completion_mask.shape for number in numbers] for numbers in self._held]
        most = max(sum(map(math.prod, of_rank)) for of_rank in shapes)
        flat = mx.concatenate([array.reshape(-1) for array in own])
        gathered = self._ranks.gather([mx.pad(flat, (0, most - flat.size))])
        found = []
        for numbers, of_rank, (line,) in zip(self._ranges, shapes, gathered, strict=True):
            edges = [0, *accumulate(map(math.prod, of_rank))]
            for _, shape, (start, stop) in zip(numbers, of_rank, pairwise(edges), strict=False):
                found.append(line[start:stop].reshape(shape))
        return found

    def sums(self) -> GradientSums:
        """To add this rank's gradients in."""
        return GradientSums(self.lane_of_own, keeps_dtype=len(self.parts) == 1 and self._lanes == 1)

    def total(self, sums: GradientSums, at_once: int = GATHERED_AT_ONCE) -> Gradients:
        """The gradient of the batch, of every rank's sums, which give each other so many numbers `at_once`;
        evaluated."""
        own = sums.total()
        if self._ranks.size == 1:
            return own
        present = sum(1 for numbers in self._ranges if numbers)
        parts: dict[str, list[mx.array]] = {name: [] for name in own}
        shapes = {name: own[name].shape for name in own}
        for portion in _portions(own, at_once):
            gathered = self._ranks.gather([own[name].reshape(-1)[part] for name, part in portion])
            added = [_as_tree(list(column)) for column in zip(*gathered[:present], strict=True)]
            mx.eval(added)
            for (name, part), array in zip(portion, added, strict=True):
                parts[name].append(array)
                if part.stop >= own[name].size:
                    del own[name]  # all of it has been given
                    parts[name] = [mx.concatenate(parts[name]).reshape(shapes[name])]
                    mx.eval(parts[name])
        return {name: array for name, (array,) in parts.items()}

    def merged(self, values: Sequence[tuple[mx.array, Tallies]]) -> tuple[mx.array, Tallies]:
        """Loss and tallies of each micro-batch of this rank → of the batch; a lane's first, then in the order of
        lanes."""
        if self._lanes == 1:
            return _merged(values)
        of_lanes: dict[int, list[tuple[mx.array, Tallies]]] = {}
        for lane, value in zip(self.lane_of_own, values, strict=True):
            of_lanes.setdefault(lane, []).append(value)
        merged = [_merged(lane) for lane in of_lanes.values()]
        names = sorted(merged[0][1])
        shapes = [(), *(merged[0][1][name].shape for name in names)]
        rows = mx.stack([_line([loss, *(tallies[name] for name in names)]) for loss, tallies in merged])
        rows = mx.pad(rows, [(0, self._lanes // self._ranks.size - len(merged)), (0, 0)])
        table = mx.concatenate([of_rank for (of_rank,) in self._ranks.gather([rows])])[: self._filled]
        edges = [0, *accumulate(map(math.prod, shapes))]
        columns = [table[:, a:b].reshape(-1, *shape) for shape, (a, b) in zip(shapes, pairwise(edges), strict=True)]
        lanes = [(columns[0][i], {n: c[i] for n, c in zip(names, columns[1:], strict=True)}) for i in range(len(table))]
        return _merged(lanes)


class GradientSums:
    """Gradients by name, added up as they come: those of each name in the order of the micro-batches."""

    def __init__(self, lanes: Sequence[int], *, keeps_dtype: bool) -> None:
        """`lanes`: that of each micro-batch. With `keeps_dtype` there is one, of which nothing is a sum."""
        self._lanes, self._keeps_dtype = lanes, keeps_dtype
        self._sums: dict[str, _TreeSum] = {}

    def add(self, portion: Gradients) -> list[mx.array]:
        """Add what is known of one micro-batch, the next of each name; emptied, so that sums take the memory of what
        they are made of. Returns what is to be computed."""
        begun = []
        for name in list(portion):
            grad = portion.pop(name)
            total = self._sums.setdefault(name, _TreeSum())
            # sums of low-precision gradients are kept in float32
            begun.append(total.add(self._lanes[total.count], grad if self._keeps_dtype else grad.astype(mx.float32)))
            del grad
        return begun

    @property
    def arrays(self) -> list[mx.array]:
        """All that is held."""
        return [array for total in self._sums.values() for array in total.arrays]

    def total(self) -> Gradients:
        """The sum of all; nothing is held any more."""
        sums, self._sums = self._sums, {}
        grads: Gradients = {}
        for name in list(sums):
            grads[name] = sums.pop(name).total()
            mx.eval(grads[name])
        return grads


class _TreeSum:
    """The sum of arrays of lanes: those of a lane in order, lanes as a binary tree. Lanes come in order."""

    def __init__(self) -> None:
        self.count = 0
        self.arrays: list[mx.array] = []
        """Sums of the branches that are complete, the largest first, and of the lane under way."""
        self._lane = 0
        self._done = 0

    def add(self, lane: int, x: mx.array) -> mx.array:
        """One more; the array that has it."""
        if self.count == 0:
            self._lane = lane
        elif lane == self._lane:
            x = self.arrays.pop() + x
        else:
            self._lane, self._done = lane, self._done + 1
            branches = self._done
            while branches % 2 == 0:
                right = self.arrays.pop()
                self.arrays[-1] = self.arrays[-1] + right
                branches //= 2
        self.arrays.append(x)
        self.count += 1
        return x

    def total(self) -> mx.array:
        """Of all lanes; used up."""
        while len(self.arrays) > 1:
            right = self.arrays.pop()
            self.arrays[-1] = self.arrays[-1] + right
        return self.arrays.pop()


def _as_tree(arrays: list[mx.array]) -> mx.array:
    while len(arrays) > 1:
        pairs = [arrays[i : i + 2] for i in range(0, len(arrays), 2)]
        arrays = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return arrays[0]


def _merged(values: Sequence[tuple[mx.array, Tallies]]) -> tuple[mx.array, Tallies]:
    return mx.sum(mx.stack([loss for loss, _ in values])), merge([tallies for _, tallies in values])


def _line(arrays: Sequence[mx.array]) -> mx.array:
    return mx.concatenate([array.astype(mx.float32).reshape(-1) for array in arrays])


def _portions(grads: Gradients, at_once: int) -> Iterator[list[tuple[str, slice]]]:
    """Names in order with parts of their arrays laid flat, so many numbers a portion."""
    portion: list[tuple[str, slice]] = []
    room = at_once
    for name in sorted(grads):
        size, start = grads[name].size, 0
        while start < size:
            stop = min(size, start + room)
            portion.append((name, slice(start, stop)))
            room -= stop - start
            start = stop
            if room == 0:
                yield portion
                portion, room = [], at_once
    if portion:
        yield portion
