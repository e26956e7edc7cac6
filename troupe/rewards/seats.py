"""Seats: which runner scores which group while rewards are exchanged. Knows nothing of what runners do."""

from __future__ import annotations

import anyio

from troupe.rewards.breaker import Exchanged
from troupe.rewards.rounds import Rounds
from troupe.rewards.runners import Batch, Outcome, Round, Runner
from troupe.runtime import Reporter


class Seat:
    """One reward's place: the runner that has it now, and those that it was taken from and that still have work."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.scope = runner.name, runner.scope
        self.version = 0
        self.now = Sitting(runner)
        self.before: list[Sitting] = []
        self.changing = anyio.Lock()
        """Held while a successor gets ready, so that who was asked for last has the seat in the end."""

    def sitting_for(self, key: Round | None) -> Sitting:
        """Who scores a group: a round that is scored in one call stays with whom it began with."""
        if key is not None:
            for sitting in self.before:
                if sitting.rounds is not None and sitting.rounds.has_begun(key):
                    return sitting
        return self.now


class Sitting:
    """A runner while it has its seat, and after that until its last group is done."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.rounds = Rounds(runner) if runner.scope == "batch" else None
        self.calls = 0
        self._moved = anyio.Event()

    async def score(self, batch: Batch, report: Reporter) -> Outcome:
        """A group, in a call of its own or with the others of its round."""
        self.calls += 1
        try:
            if self.rounds is None or batch.round is None:
                return await self.runner.score(batch)
            try:
                return await self.rounds.score(batch, report)
            except Exchanged:
                self.rounds.leave(batch.round)
                raise
        finally:
            self.calls -= 1
            self.tell()

    def tell(self) -> None:
        """Something has ended."""
        self._moved.set()
        self._moved = anyio.Event()

    async def done(self) -> None:
        """Wait until nothing is under way."""
        while self.calls or (self.rounds is not None and self.rounds.open):
            await self._moved.wait()
