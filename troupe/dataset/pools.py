"""Rows in pools, and which of them come next: all of it a function of the seed and of what came of the rows before.

Whoever walks through a pool meets each of its rows once, in an order that the seed fixes, before any of them comes
again: a row that comes into a pool is part of the walk after the one that is under way. Rows that were never seen come
first of the normal ones, in the order of the dataset's first epoch. A row that was drawn is away, and in no pool,
until something is recorded of it.
"""

import hashlib
import random
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import nsmallest
from typing import TypeAlias

import msgspec

from troupe.dataset.curriculum import CurriculumConfig, mean_rate, pool_of
from troupe.messages import Pool, RowRecord

POOLS: tuple[Pool, ...] = ("easy", "normal", "hard", "retired")
_DRAWN: tuple[Pool, ...] = ("easy", "normal", "hard")
_LAST_RESORT: tuple[Pool, ...] = ("normal", "hard", "easy")
"""The pools in the order in which they are drawn from where no pool that has rows has a weight."""

_Entry: TypeAlias = tuple[int, int, int]
"""Walk, place in it, row: the order of a pool. Of retired rows the step that they were seen in, 0, row."""


class Pools:
    """The rows of a dataset. Each pool is kept sorted, so that its state is what its records say, however it came."""

    def __init__(self, order: Sequence[int], config: CurriculumConfig, *, seed: int, shuffle: bool) -> None:
        """`order`: the rows as the first epoch has them."""
        self._config = config
        self._order = order
        self._seed = seed
        self._shuffle = shuffle
        self._place = dict(zip(order, range(len(order)), strict=True))
        self.records: dict[int, RowRecord] = {}
        """Row → what is known of it, of rows that were seen."""
        self.turns: dict[Pool, int] = dict.fromkeys(POOLS, 0)
        """The walk that each pool is at."""
        self.counts: dict[Pool, int] = dict.fromkeys(POOLS, 0) | {"normal": len(order)}
        """How many rows belong to each pool, those away included."""
        self.away: set[int] = set()
        """Rows that were drawn and have not come back."""
        self._unseen = [-place for place in reversed(range(len(order)))]
        """Places in the first epoch's order, negative: the next one stands last, where it is taken quickly."""
        self._pools: dict[Pool, list[_Entry]] = {pool: [] for pool in POOLS}

    def restore(self, records: Iterable[RowRecord], away: Iterable[int], turns: dict[Pool, int]) -> None:
        """Go on from what a checkpoint kept of pools that were like these at the beginning."""
        self.records = {record.row: record for record in records}
        self.away = set(away)
        self.turns |= turns
        gone = {self._place[row] for row in (*self.records, *self.away)}
        self._unseen = [-place for place in reversed(range(len(self._order))) if place not in gone]
        for pool in POOLS:
            here = [r for r in self.records.values() if r.pool == pool and r.row not in self.away]
            self._pools[pool] = sorted(map(self._entry, here))
        belong = Counter(record.pool for record in self.records.values())
        self.counts = {pool: belong[pool] for pool in POOLS}
        self.counts["normal"] += len(self._order) - len(self.records)

    def pool(self, row: int) -> Pool:
        """Where a row belongs."""
        return self.records[row].pool if row in self.records else "normal"

    def record(self, row: int, rate: float | None, step: int) -> None:
        """A group of a row ended with a step, with this pass rate; None where it has none. The row comes back."""
        before = self.records.get(row) or RowRecord(row=row, pool="normal", turn=0, visits=0, rates=(), step=step)
        self._take_out(row)
        self.away.discard(row)
        rates, visits = before.rates, before.visits
        if rate is not None:
            rates, visits = (*rates, rate)[-self._config.window :], visits + 1
        pool = pool_of(rates, visits, self._config)
        self._put(RowRecord(row=row, pool=pool, turn=before.turn, visits=visits, rates=rates, step=step))

    def recall(self, step: int) -> None:
        """Rows whose retirement is over when a step is chosen are easy again."""
        every, retired = self._config.revisit_every, self._pools["retired"]
        if self._config.retire_at is None:  # any more: a resume may have it so
            every = 0
        if every is None:
            return
        while retired and retired[0][0] + every <= step:  # the one that was seen last longest ago
            row = retired[0][2]
            self._take_out(row)
            self._put(msgspec.structs.replace(self.records[row], pool="easy"))

    def draw(self, count: int, step: int) -> list[int]:
        """The rows of a step, in their places, which are away then; none twice where there are enough."""
        dice = _dice("rows", self._seed, step)
        drawn: list[int] = []
        while len(drawn) < count and (pool := self._pool(dice, self._size)) is not None:
            drawn.append(self._next(pool))
        if len(drawn) < count:
            drawn += self._least_mastered(count - len(drawn))
        self.away.update(drawn)
        if len(drawn) < count:  # fewer rows than places, or all of them under way
            drawn += self._any(dice, count - len(drawn), without=drawn)
        return drawn

    def replacements(self, count: int, step: int, shown: Collection[int]) -> list[int]:
        """Rows that may take the place of others in a step, which stay in their pools; none of those that are `shown`
        there and none twice, as long as there are others in pools."""
        dice = _dice("replacements", self._seed, step)
        taken, chosen = set(shown), list[int]()
        of_pools = Counter(self.pool(row) for row in taken - self.away)
        while len(chosen) < count:
            pool = self._pool(dice, lambda pool: self._size(pool) - of_pools[pool])
            if pool is None:
                return chosen + self._any(dice, count - len(chosen), without=taken)
            while (row := self._at(pool, int(dice.random() * self._size(pool)))) in taken:
                pass
            taken.add(row)
            of_pools[pool] += 1
            chosen.append(row)
        return chosen

    def _pool(self, dice: random.Random, size: Callable[[Pool], int]) -> Pool | None:
        """A pool by lot, by how many rows it has and what each of them weighs; None where all are empty."""
        shares = [(pool, size(pool) * self._config.weight_of(pool)) for pool in _DRAWN]
        point = dice.random() * sum(share for _, share in shares)
        for pool, share in shares:
            if point < share:
                return pool
            point -= share
        return next((pool for pool in _LAST_RESORT if size(pool)), None)

    def _size(self, pool: Pool) -> int:
        return len(self._pools[pool]) + (len(self._unseen) if pool == "normal" else 0)

    def _at(self, pool: Pool, index: int) -> int:
        """A row of a pool, by its place in it."""
        if pool == "normal" and index < len(self._unseen):
            return self._order[-self._unseen[index]]
        return self._pools[pool][index - (len(self._unseen) if pool == "normal" else 0)][2]

    def _next(self, pool: Pool) -> int:
        """The next row of a walk, which leaves its pool."""
        if pool == "normal" and self._unseen:
            return self._order[-self._unseen.pop()]
        turn, _, row = self._pools[pool].pop(0)
        self.turns[pool] = turn
        return row

    def _least_mastered(self, count: int) -> list[int]:
        """Retired rows, those of the lowest pass rate first, of these the ones that were not seen for longest."""
        retired = [self.records[row] for _, _, row in self._pools["retired"]]
        window = self._config.window
        chosen = nsmallest(count, retired, key=lambda r: (mean_rate(r.rates, window), r.step, r.row))
        for record in chosen:
            self._take_out(record.row)
        return [record.row for record in chosen]

    def _any(self, dice: random.Random, count: int, without: Collection[int]) -> list[int]:
        """Rows of all, whatever pool they are in: none of some and none twice, before all have been there."""
        chosen: list[int] = []
        left: list[int] = []
        kept = set(without)
        while len(chosen) < count:
            if not left:
                left = [row for row in range(len(self._order)) if row not in kept] or list(range(len(self._order)))
                kept = set()
            chosen.append(left.pop(int(dice.random() * len(left))))
        return chosen

    def _take_out(self, row: int) -> None:
        """Of the pool that it is in, where it is in any."""
        if row in self.away:
            return
        record = self.records.get(row)
        if record is None:
            self._unseen.pop(bisect_left(self._unseen, -self._place[row]))
            return
        entries = self._pools[record.pool]
        entries.pop(bisect_left(entries, self._entry(record)))

    def _put(self, record: RowRecord) -> None:
        """Into its pool, to be met in the walk after this one."""
        record = msgspec.structs.replace(record, turn=self.turns[record.pool] + 1)
        self.counts[self.pool(record.row)] -= 1
        self.counts[record.pool] += 1
        self.records[record.row] = record
        insort(self._pools[record.pool], self._entry(record))

    def _entry(self, record: RowRecord) -> _Entry:
        if record.pool == "retired":
            return record.step, 0, record.row
        place = record.row
        if self._shuffle:
            place = _hashed("walk", self._seed, record.pool, record.turn, record.row)
        return record.turn, place, record.row


def _hashed(*words: object) -> int:
    """sha256("troupe.curriculum/WORD/WORD…") as a big-endian integer, its first eight bytes."""
    text = "/".join(map(str, ("troupe.curriculum", *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _dice(*words: object) -> random.Random:
    """Python promises to keep its `random()`."""
    return random.Random(_hashed(*words))
