"""Roster: which workers there are, what they offer, and when they were heard of last.

It answers `hello`, `beat` and `bye`. Each kind of work is a `Service`, which says how a worker of it goes on, reads in
beats what it has in hand, and is told when it is gone.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import anyio

from troupe.cluster.desk import DeclineError, Desk, OffenceError
from troupe.cluster.wire import (
    PROTOCOL,
    Admitted,
    Beat,
    Facts,
    Hello,
    Offer,
    Pulse,
    RunState,
    decode_beat,
    decode_bye,
    decode_hello,
)
from troupe.messages import Incident
from troupe.messages.members import MemberState, MemberStatus
from troupe.runtime.frames import encode
from troupe.runtime.reporter import Reporter

_MOST_TOLD = 1000
"""Incidents of a kind, in one start of the run."""
_WAITING_S = 10.0
"""After which somebody who may ask again, and has not, is gone."""
_CLOCKS = 64
"""Beats that the difference of two clocks is taken from."""


class Worker:
    """One admitted worker; the same as long as its session."""

    def __init__(self, name: str, hello: Hello, now_s: float) -> None:
        self.name = name
        self.session = secrets.token_hex(8)
        self.instance = hello.instance
        self.offers: tuple[Offer, ...] = hello.offers
        self.facts: Facts = hello.facts
        self.heard_s = now_s
        self.beat = Beat(clock_s=0.0)
        self.state: MemberState = "starting"
        self.detail = ""
        self.leases: dict[Offer, tuple[str, ...]] = {}
        """What it has, as each kind of work tells."""
        self._shifts: deque[float] = deque(maxlen=_CLOCKS)

    @property
    def here(self) -> bool:
        """Whether it may have work."""
        return self.state not in ("silent", "lost", "refused", "ended")

    @property
    def shift_s(self) -> float:
        """Seconds to add to its clock for that of this process; too late by the fastest frame's time on its way."""
        return min(self._shifts, default=0.0)

    def heard(self, beat: Beat, now_s: float, clock_s: float) -> None:
        """`now_s`: for its silence; `clock_s`: `time.perf_counter`, for its spans."""
        self.heard_s, self.beat = now_s, beat
        if math.isfinite(beat.clock_s):
            self._shifts.append(clock_s - beat.clock_s)


class Service(Protocol):
    """A kind of work that workers do."""

    offer: Offer

    def admit(self, worker: Worker, details: bytes) -> bytes:
        """Take a worker that offers this, or raise `DeclineError`; what it needs to know to go on."""

    def renew(self, worker: Worker, held: Sequence[str], pulled: int) -> Sequence[str]:
        """The worker is alive, and has these in hand, of what its pulls up to this number gave it; names to drop."""

    def state(self, worker: Worker) -> bytes:
        """What it is told with every beat."""

    def gone(self, worker: Worker, reason: str) -> None:
        """It has nothing in hand any more."""


class Roster:
    """The workers of a run; one event loop."""

    def __init__(
        self,
        desk: Desk,
        report: Reporter,
        *,
        lease_s: float = 15.0,
        run_state: Callable[[], RunState] = lambda: "running",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clock`: for silence."""
        self.lease_s = lease_s
        self.run_state = run_state
        self._desk = desk
        self._report = report
        self._clock = clock
        self._told: Counter[str] = Counter()
        self._services: dict[Offer, Service] = {}
        self._workers: dict[str, Worker] = {}
        self._waiting: dict[str, float] = {}
        """Name that another has → when somebody asked for it last."""
        desk.register("hello", self._hello)
        desk.register("beat", self._beat)
        desk.register("bye", self._bye)
        desk.on_put_out = lambda name, reason: self._end(name, "refused", reason)

    def add(self, service: Service) -> None:
        """Have a kind of work done by workers that offer it."""
        self._services[service.offer] = service

    def remove(self, service: Service) -> None:
        """Nobody does this any more."""
        self._services.pop(service.offer, None)

    def worker(self, name: str) -> Worker:
        """The newest of this name. `OffenceError` where there is none."""
        worker = self._workers.get(name)
        if worker is None:
            raise OffenceError(f"no worker {name} is known")
        return worker

    def here(self, offer: Offer) -> list[Worker]:
        """Those who may have such work."""
        return [worker for worker in self._workers.values() if worker.here and offer in worker.offers]

    def everybody_here(self) -> list[Worker]:
        """Those who may have work of any kind."""
        return [worker for worker in self._workers.values() if worker.here]

    def statuses(self) -> tuple[MemberStatus, ...]:
        """Every worker of this start, by name."""
        return tuple(self._status(self._workers[name]) for name in sorted(self._workers))

    def tell(self, kind: str, message: str) -> None:
        """Report an incident, of each kind no more than can still be read."""
        self._told[kind] += 1
        if self._told[kind] > _MOST_TOLD:
            return
        if self._told[kind] == _MOST_TOLD:
            message += "; no more of this kind are told"
        self._report.incident_nowait(Incident(actor=self._report.actor, kind=kind, message=message))

    def refuse(self, worker: Worker, reason: str) -> None:
        """It may not have work in this session; `DeclineError` tells it so."""
        self._end(worker.name, "refused", reason)
        self.tell("worker_refused", f"worker {worker.name} was refused: {reason}")

    async def say_over(self) -> None:
        """The run has ended: wait until everybody here has heard it, and who waits for a name that another has."""
        self._desk.over, now_s = True, self._clock()
        waiting = {name for name, asked_s in self._waiting.items() if now_s - asked_s < _WAITING_S}
        while not (
            {worker.name for worker in self.everybody_here()} <= self._desk.told_over
            and waiting <= self._desk.told_at_hello
        ):
            await self._desk.told.wait()

    async def watch(self) -> None:
        """Notice who is silent, until cancelled."""
        while True:
            await anyio.sleep(min(1.0, self.lease_s / 4))
            now_s = self._clock()
            for worker in list(self._workers.values()):
                if worker.here and now_s - worker.heard_s > self.lease_s:
                    self._end(worker.name, "silent", f"nothing was heard of it for {self.lease_s:g} s")

    async def _hello(self, name: str, body: bytes) -> bytes:
        hello = decode_hello(body)
        if hello.protocol != PROTOCOL:
            raise DeclineError(
                f"it speaks version {hello.protocol} of the protocol and the run {PROTOCOL}: install one Troupe"
            )
        now_s, old = self._clock(), self._workers.get(name)
        if old is not None and old.here and old.instance != hello.instance:
            self._waiting[name] = now_s
            raise DeclineError(
                f"another worker is here as {name}, or was until a moment ago; a second one needs a name of its own: "
                "troupe cluster invite",
                later=True,
            )
        unserved = [offer for offer in hello.offers if offer not in self._services]
        if not hello.offers or len(unserved) == len(hello.offers):
            raise DeclineError(f"this run has no work for who offers {', '.join(hello.offers) or 'nothing'}")
        if old is not None and old.here:
            self._end(name, "lost", "it has begun anew")
        worker = Worker(name, hello, now_s)
        details: dict[Offer, bytes] = {}
        for offer in hello.offers:
            if offer in self._services:
                details[offer] = self._services[offer].admit(worker, hello.details.get(offer, b""))
        self._workers[name] = worker
        self._waiting.pop(name, None)
        self._desk.begin(name, worker.session)
        return encode(Admitted(session=worker.session, state=self.run_state(), lease_s=self.lease_s, details=details))

    async def _beat(self, name: str, body: bytes) -> bytes:
        beat, worker = decode_beat(body), self.worker(name)
        worker.heard(beat, self._clock(), time.perf_counter())
        if worker.state in ("silent", "lost"):
            worker.state, worker.detail = "idle", ""
        drop: dict[Offer, tuple[str, ...]] = {}
        details: dict[Offer, bytes] = {}
        for offer in worker.offers:
            if (service := self._services.get(offer)) is not None:
                held = beat.held.get(offer, ())
                drop[offer] = tuple(service.renew(worker, held, beat.pulled.get(offer, 0)))
                details[offer] = service.state(worker)
        return encode(Pulse(state=self.run_state(), drop=drop, details=details))

    async def _bye(self, name: str, body: bytes) -> bytes:
        bye = decode_bye(body)
        self._end(name, "ended", bye.reason or "it said goodbye")
        return b""

    def _end(self, name: str, state: MemberState, reason: str) -> None:
        """A worker has nothing in hand any more."""
        worker = self._workers.get(name)
        if worker is None or not worker.here:
            return
        worker.state, worker.detail, worker.leases = state, reason, {}
        for offer in worker.offers:
            if (service := self._services.get(offer)) is not None:
                service.gone(worker, reason)
        if state in ("silent", "lost"):
            self.tell("worker_lost", f"worker {name}: {reason}; what it had goes to others")

    def _status(self, worker: Worker) -> MemberStatus:
        return MemberStatus(
            name=worker.name,
            kind="worker",
            state=worker.state,
            offers=worker.offers,
            leases=tuple(name for names in worker.leases.values() for name in names),
            tokens_per_second=worker.beat.tokens_per_second,
            last_beat_s=round(self._clock() - worker.heard_s, 1),
            version=worker.beat.version,
            device=worker.facts.device,
            detail=worker.detail or worker.beat.doing,
        )
