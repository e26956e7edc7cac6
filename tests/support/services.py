"""Workers that run rewards and environments for a run, over a message server in memory: real desk, roster, calls and
links; processes are real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio

from tests.support.fake_bus import FakeBroker
from troupe.cluster.bus import HUB
from troupe.cluster.call_wire import DONE, PULL, Done, Orders, Pull, decode_orders
from troupe.cluster.calls import Calls
from troupe.cluster.desk import Desk
from troupe.cluster.link import Link
from troupe.cluster.roster import Roster
from troupe.cluster.services import OwnCode, Serving
from troupe.cluster.wire import BEAT_S, Beat, Facts, Hello, Offer
from troupe.messages import Incident
from troupe.rewards.processes.calls import Loaded
from troupe.run.worker.session import Worker
from troupe.runtime.elsewhere import ServiceKind
from troupe.runtime.frames import encode
from troupe.runtime.reporter import Reporter

Serve = Callable[[Link], Awaitable[None]]


class Site:
    """A run's side, and the workers that have joined it."""

    def __init__(self, lease_s: float) -> None:
        self.broker = FakeBroker()
        self.calls = Calls(patience_s=0.2)
        self.incidents: list[Incident] = []
        self.said: list[str] = []
        """By workers."""
        report = _Listening("cluster", self.incidents)
        self.desk = Desk(self.broker.run, report)
        self.roster = Roster(self.desk, report, lease_s=lease_s)
        self.calls.join(self.desk, self.roster)
        self._workers: dict[str, asyncio.Task[None]] = {}

    def kinds(self) -> list[str]:
        """Of the incidents so far."""
        return [incident.kind for incident in self.incidents]

    def join(self, name: str, own: OwnCode, *kinds: ServiceKind) -> None:
        """A worker begins that offers rewards, or these."""
        works = [Serving(kind, own, tell=self.said.append) for kind in kinds or ("rewards",)]
        self._begin(name, Worker(self._link(name), works, Facts(), tell=self.said.append).run())

    def join_as(self, name: str, serve: Serve, details: Mapping[Offer, bytes]) -> None:
        """One begins that offers this and does what `serve` does."""

        async def work() -> None:
            link = self._link(name)
            await link.hello(Hello(instance=name, offers=tuple(details), details=details))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_beat, link)
                await serve(link)

        self._begin(name, work())

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._workers[name] = asyncio.get_running_loop().create_task(work)

    def _link(self, name: str) -> Link:
        return Link(self.broker.bus(name), self.broker.run)

    def processes(self, name: str) -> int:
        """That a worker has, as the run sees it."""
        return sum(len(status.leases) for status in self.roster.statuses() if status.name == name)

    def pull_cable(self, name: str) -> None:
        """Nothing comes through to or from a worker any more."""
        self.broker.cut.add(name)

    def kill(self, name: str) -> None:
        """A worker ends without a word."""
        self._workers[name].cancel()

    async def leave(self, *names: str) -> None:
        """Workers end."""
        for name in names or list(self._workers):
            task = self._workers.pop(name)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


class Liar:
    """A worker that begins all that it is asked for and answers what it likes."""

    def __init__(
        self,
        *answers: bytes,
        kind: ServiceKind = "rewards",
        loaded: bytes = encode(Loaded()),
        first: Sequence[bytes] = (),
    ) -> None:
        """Every frame gets the `answers`, but for those that get one of `first` each. `loaded`: what is said to a
        process that begins."""
        self.begun = 0
        self._answers, self._kind, self._loaded, self._first = answers, kind, loaded, list(first)
        self._told: dict[str, int] = {}

    async def __call__(self, link: Link) -> None:
        number = 0
        got: dict[str, int] = {}
        while True:
            ask = encode(Pull(kind=self._kind, number=number, sessions=got))
            orders: Orders = decode_orders(await link.ask(PULL, ask))
            number += 1
            for begin in orders.begin:
                if begin.session not in got:
                    self.begun += 1
                    got[begin.session] = self._told[begin.session] = 0
                    await self._tell(link, begin.session, self._loaded)
            for piece in orders.pieces:
                got[piece.session] = piece.number + 1
                for answer in [self._first.pop(0)] if self._first else self._answers:
                    await self._tell(link, piece.session, answer)
            for name in orders.end:
                got.pop(name, None)

    async def _tell(self, link: Link, session: str, frame: bytes) -> None:
        self._told[session] += 1
        done = Done(kind=self._kind, session=session, number=self._told[session] - 1, frame=frame)
        await link.ask(DONE, encode(done))


class _Listening(Reporter):
    def __init__(self, actor: str, incidents: list[Incident]) -> None:
        super().__init__(actor)
        self._heard = incidents

    def incident_nowait(self, incident: Incident) -> None:
        self._heard.append(incident)


@asynccontextmanager
async def at_site(lease_s: float = 4.0) -> AsyncIterator[Site]:
    """A run that workers may join; everything of it ends with the block."""
    site = Site(lease_s)
    async with site.desk.open(site.broker.bus(HUB)), anyio.create_task_group() as tasks:
        tasks.start_soon(site.roster.watch)
        try:
            yield site
        finally:
            with anyio.CancelScope(shield=True):
                await site.leave()
            tasks.cancel_scope.cancel()


async def _beat(link: Link) -> None:
    while True:
        await link.ask("beat", encode(Beat(clock_s=0.0)), wait_s=BEAT_S)
        await anyio.sleep(BEAT_S / 2)
