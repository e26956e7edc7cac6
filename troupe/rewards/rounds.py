"""Rounds: the groups of a round gathered for rewards that score them all in one call."""

from __future__ import annotations

import anyio

from troupe.messages import Slot
from troupe.rewards.outcomes import Batch, Outcome, Round, joined
from troupe.rewards.runners import Runner
from troupe.runtime.reporter import Reporter


class Rounds:
    """Groups come one by one, each in a task of its own that waits for its scores. The one whose group makes the round
    whole makes the call; where it is cancelled, another one does.

    Outcomes are kept until every group of the round is *settled*: a group that is scored once more after a fault gets
    what its neighbours have got already.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._gathered: dict[Round, _Gathered] = {}

    @property
    def open(self) -> bool:
        """Whether there is a round that has begun and is not settled."""
        return bool(self._gathered)

    def has_begun(self, key: Round | None) -> bool:
        """Whether a group of the round has come, and not all are settled."""
        return key in self._gathered

    async def score(self, batch: Batch, report: Reporter) -> Outcome:
        """The group's part of its round's outcome; `report` gets a span of the wait for the others."""
        key, gid = batch.round, batch.gid
        assert key is not None
        assert gid is not None
        gathered = self._gathered.setdefault(key, _Gathered())
        gathered.groups[gid] = batch
        gathered.wake()
        while gid not in gathered.outcomes:
            if gathered.calling or len(gathered.groups) < key.size:
                with report.span("wait for the round", step=key.step, gid=gid, kind="wait"):
                    await gathered.changed.wait()
                continue
            gathered.calling = True
            try:
                await self._call(gathered)
            finally:
                gathered.calling = False
                gathered.wake()
        return gathered.outcomes[gid]

    def settled(self, key: Round, gid: int) -> None:
        """The group was sent on with its scores: it will not come again."""
        gathered = self._gathered.get(key)
        if gathered is not None:
            gathered.settled.add(gid)
            if len(gathered.settled) >= key.size:
                del self._gathered[key]

    def leave(self, key: Round | None) -> None:
        """Another reward takes over the round, whose call was not made."""
        if key is not None:
            self._gathered.pop(key, None)

    async def _call(self, gathered: _Gathered) -> None:
        batches = sorted(gathered.groups.values(), key=_slot)
        outcome = await self._runner.score(joined(batches))
        parts = outcome.split([batch.size for batch in batches])
        for batch, part in zip(batches, parts, strict=True):
            assert batch.gid is not None
            gathered.outcomes[batch.gid] = part


class _Gathered:
    """What is there of a round."""

    def __init__(self) -> None:
        self.groups: dict[int, Batch] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.settled: set[int] = set()
        self.calling = False
        self.changed = anyio.Event()

    def wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


def _slot(batch: Batch) -> Slot:
    assert batch.slot is not None
    return batch.slot
