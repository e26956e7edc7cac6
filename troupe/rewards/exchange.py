"""Seats: which runner scores which group while rewards are exchanged. Knows nothing of what runners do."""

from __future__ import annotations

import anyio

from troupe.rewards.calling import Exchanged
from troupe.rewards.rounds import Rounds
from troupe.rewards.runners import Batch, Outcome, Round, Runner
from troupe.runtime.reporter import Reporter


class Seat:
    """One reward's place: the runner that has it now, and those that it was taken from and that still have work."""

    def __init__(self, runner: Runner, spec: str | None) -> None:
        self.name, self.scope = runner.name, runner.scope
        self.now = Sitting(runner, spec)
        self.before: list[Sitting] = []
        """Those that still have work, the oldest first."""
        self.changing = anyio.Lock()
        """Held while a successor gets ready, so that who was asked for last has the seat in the end."""
        self._history = [(0, 0, spec)]

    def sitting_for(self, key: Round | None, step: int | None) -> Sitting:
        """Who scores a group of a step: a round that is scored in one call stays with whom it began with."""
        if key is not None:
            for sitting in self.before:
                if sitting.rounds is not None and sitting.rounds.has_begun(key):
                    return sitting
        candidates = (self.now, *reversed(self.before)) if step is not None else ()
        sitting = next((one for one in candidates if one.first_step <= (step or 0)), self.now)
        return self.now if sitting.runner.breaker.why is not None else sitting  # none waits for one that was replaced

    def take(self, sitting: Sitting) -> None:
        """Another one has the seat now; who had it must be kept in `before` as long as it has work. Where the new one
        does not work the run waits for yet another, and goes on."""
        sitting.runner.breaker.proven = True
        self.now = sitting
        self._history.append((sitting.first_step, sitting.version, sitting.spec))

    def standing(self, step: int) -> tuple[int, str | None]:
        """How often the seat was taken over up to a step, and the text that names who has it then."""
        return next((version, spec) for first, version, spec in reversed(self._history) if first <= step)


class Sitting:
    """A runner while it has its seat, and after that until its last group is done."""

    def __init__(self, runner: Runner, spec: str | None, *, version: int = 0, first_step: int = 0) -> None:
        """`spec`: the text that names the reward; None where it was given in Python. `version`: how often the seat was
        taken over before. `first_step`: groups of earlier steps are not scored by it."""
        self.runner, self.spec, self.version, self.first_step = runner, spec, version, first_step
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
