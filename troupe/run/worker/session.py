"""A worker's sessions with the run: hello, then beats beside the work, until the run ends or knows it no more."""

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio

from troupe.cluster.bus import NoAnswer
from troupe.cluster.link import NOT_LET_IN, DeclinedError, Link, RunEndedError, SessionGoneError
from troupe.cluster.wire import (
    BEAT_S,
    Admitted,
    Beat,
    Bye,
    Facts,
    Hello,
    RunState,
    decode_pulse,
)
from troupe.cluster.work import Work
from troupe.errors import RunError
from troupe.runtime.frames import FrameError, encode
from troupe.runtime.roles import decisive_fault

_BYE_S = 0.7
_DOING_CHARS = 200


class Worker:
    """Everything that one worker does for one run."""

    def __init__(
        self, link: Link, works: Sequence[Work], facts: Facts, *, tell: Callable[[str], None] = lambda text: None
    ) -> None:
        """`tell` is given what a person should know."""
        self.state: RunState | None = None
        """As the run said last; None before it has."""
        self._link, self._works, self._facts, self._tell = link, works, facts, tell
        self._instance = secrets.token_hex(8)

    @property
    def link(self) -> Link:
        return self._link

    @property
    def works(self) -> Sequence[Work]:
        return self._works

    async def run(self) -> None:
        """Work until the run has ended, through as many sessions as it takes.

        Raises:
            DeclinedError: the run takes nothing of this worker.
            TroupeError: this machine cannot do what it has offered.
        """
        while True:
            try:
                await self._session()
            except RunEndedError:
                return
            except SessionGoneError:
                self._tell("the run has begun anew; joining it again")

    async def bye(self) -> bool:
        """Tell the run that this worker goes; whether it could be told at once."""
        with anyio.move_on_after(_BYE_S, shield=True), suppress(Exception):  # whatever the run has to say to that
            await self._link.ask("bye", encode(Bye(reason="it was asked to end")), wait_s=_BYE_S)
            return True
        return False

    async def _session(self) -> None:
        self.state = None
        hello = Hello(
            instance=self._instance,
            offers=tuple(work.offer for work in self._works),
            facts=self._facts,
            details={work.offer: work.details() for work in self._works},
        )
        admitted = await self._link.hello(hello)
        self._heard(admitted.state)
        self._tell(f"joined the run as {self._link.name}")
        try:
            async with anyio.create_task_group() as tasks:
                for work in self._works:
                    tasks.start_soon(self._serve, work, admitted)
                tasks.start_soon(self._beat)
        except Exception as error:
            fault = decisive_fault(error)
            if isinstance(fault, FrameError):
                raise RunError(f"the run says what this worker does not understand: {fault}") from None
            if isinstance(fault, NoAnswer):  # from what is stored, where waiting would not help
                raise DeclinedError(NOT_LET_IN) from None
            raise fault from None

    async def _serve(self, work: Work, admitted: Admitted) -> None:
        if work.offer in admitted.details:
            await work.serve(self._link, admitted.details[work.offer])
        else:
            self._tell(f"the run has no work for who offers {work.offer}")

    async def _beat(self) -> None:
        while True:
            pulse = decode_pulse(await self._link.ask("beat", encode(self._beat_now()), wait_s=2 * BEAT_S))
            self._heard(pulse.state)
            for work in self._works:
                work.pulse(pulse.state, pulse.details.get(work.offer, b""), pulse.drop.get(work.offer, ()))
            await anyio.sleep(BEAT_S)

    def _beat_now(self) -> Beat:
        paces = [work.tokens_per_second for work in self._works if work.tokens_per_second is not None]
        versions = [work.version for work in self._works if work.version is not None]
        return Beat(
            clock_s=time.perf_counter(),
            held={work.offer: tuple(work.held) for work in self._works},
            pulled={work.offer: work.pulled for work in self._works},
            tokens_per_second=sum(paces) if paces else None,
            version=max(versions, default=None),
            doing="; ".join(work.doing for work in self._works if work.doing)[:_DOING_CHARS],
        )

    def _heard(self, state: RunState) -> None:
        if state != self.state and "paused" in (state, self.state):
            self._tell("the run is paused" if state == "paused" else "the run goes on")
        self.state = state
        if state == "ended":
            raise RunEndedError
