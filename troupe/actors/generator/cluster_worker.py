"""ClusterWorker: what the run knows of one worker that generates: what it asked for, and what it has yet to read."""

from __future__ import annotations

import anyio

from troupe.actors.generator.cluster_wire import Observed, PartFrame
from troupe.actors.generator.parts import Part
from troupe.actors.generator.wire import pack_prompt
from troupe.cluster.roster import Worker
from troupe.cluster.wire import PULL_WAIT_S
from troupe.messages import Observation

ANSWER_S = PULL_WAIT_S - 2.0
"""An ask that waits for something is answered by then."""
_MOST_OBSERVATIONS = 256
"""In one frame."""


class Pull:
    """One ask for work, which may be asked again until its answer has come."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[Part] = []
        self.answered = anyio.Event()


class ClusterWorker:
    """One worker that generates, in one session."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.name = worker.name
        self.kin = False
        """Whether it may have parts."""
        self.pulls: dict[int, Pull] = {}
        """Those whose answer it may not have yet, by number."""
        self.newest_pull = 0
        self.scope: anyio.CancelScope | None = None
        """Of the pull that waits."""
        self._observations: list[Observation] = []
        self._first = 1
        """Number of the first of them."""
        self._came = anyio.Event()

    async def observe(self, observation: Observation) -> None:
        """As of `Member`: it reads this when it asks."""
        self._observations.append(observation)
        self._came.set()

    async def observed(self, after: int) -> Observed:
        """What there is behind those that it has, as soon as there is something, or nothing after a while."""
        while self._observations and self._first <= after:
            self._observations.pop(0)
            self._first += 1
        if not self._observations:
            self._came = anyio.Event()
            with anyio.move_on_after(ANSWER_S):
                await self._came.wait()
        return Observed(first=self._first, observations=tuple(self._observations[:_MOST_OBSERVATIONS]))


def frame_of(part: Part) -> PartFrame:
    """A part as a worker gets it."""
    size = len(part.prompts)
    packed = tuple(pack_prompt(prompt, round_size=size) for prompt in part.prompts)
    return PartFrame(name=part.name, version=part.version, prompts=packed)
