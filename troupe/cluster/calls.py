"""Calls: rewards and environments on workers, the run's side. Processes are begun at workers that offer what they load,
and spoken to from here as those on this machine are (`sessions.py`).

What a worker has is lost with it, and begun anew at another by whoever needs it: what was asked is asked again only
where the reward or environment may be asked twice. As long as nobody offers a thing, whoever needs it waits.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence

import anyio

from troupe.cluster.call_wire import (
    DONE,
    MOST_SESSIONS,
    PIECES_A_TIME,
    PULL,
    WAIT_S,
    Begin,
    Offered,
    Orders,
    Piece,
    Pull,
    decode_done,
    decode_offered,
    decode_pull,
)
from troupe.cluster.desk import Desk
from troupe.cluster.roster import Roster, Worker
from troupe.cluster.sessions import SILENT_S, Session
from troupe.cluster.wire import Offer
from troupe.rewards.loading import is_own
from troupe.runtime.elsewhere import Service, ServiceKind
from troupe.runtime.frames import encode
from troupe.runtime.machine import VERSION

KINDS: tuple[ServiceKind, ...] = ("rewards", "environments")
PATIENCE_S = 3.0
"""That nobody may offer a thing before it is said that the run waits."""
BEGUN_S = 10.0
"""In which a worker that is there begins what it was given."""
MOST_STRIKES = 3
"""Times that a worker may fail to load a thing, or answer what it must not, before it is asked for that no more."""
_FLAGS = {"rewards": "--offers rewards --reward", "environments": "--offers environments --environment"}


class _Machine:
    """A worker that offers rewards, or environments, as long as its session."""

    def __init__(self, worker: Worker, kind: ServiceKind, offered: Offered, clock: Callable[[], float]) -> None:
        self.worker, self.kind, self.offered = worker, kind, offered
        self.sessions: dict[str, Session] = {}
        self.ending: dict[str, float] = {}
        """Those that it has to end → in how many seconds."""
        self.strikes: Counter[bytes] = Counter()
        """By service."""
        self.why: dict[bytes, str] = {}
        self.asked_s = clock()
        self.newest = -1
        self.changed = anyio.Event()

    @property
    def heard_s(self) -> float:
        return max(self.asked_s, self.worker.heard_s)

    def show_state(self) -> None:
        """Say what it does, unless it generates as well, of which others tell."""
        if self.worker.here and "generate" not in self.worker.offers:
            self.worker.state = "working" if any(self.worker.leases.values()) else "idle"

    def wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def objection(self, service: Service) -> str | None:
        """Why it cannot have this; None where it can. Empty where there is nothing to say: it is not here, or offers
        nothing like it."""
        offered, key = self.offered, encode(service)
        if service.kind != self.kind or not self.worker.here:
            return ""
        if offered.troupe != VERSION:
            return f"has Troupe {offered.troupe}, and the run {VERSION}"
        for code, there in [(code, offered.code) for code in service.named.values()] + [
            (code, offered.tools) for code in service.tools
        ]:
            if code not in there and (service.kind != "rewards" or not is_own(code.name)):
                same = any(other.name == code.name for other in there)
                return f"has another {code.name}: its file differs from the run's" if same else ""
        if self.strikes[key] >= MOST_STRIKES:
            return f"has failed at it {MOST_STRIKES} times, the last time: {self.why[key]}"
        return None

    def orders(self, pull: Pull) -> Orders:
        """What it is to do, who says that it has this in hand."""
        begin: list[Begin] = []
        pieces: list[Piece] = []
        for name, session in self.sessions.items():
            if name in pull.sessions:
                pieces += session.pieces(PIECES_A_TIME - len(pieces))
            elif not session.has_begun:
                begin.append(Begin(name, session.service))
        end = {name: self.ending.get(name, 0.0) for name in pull.sessions if name not in self.sessions}
        return Orders(begin=tuple(begin), pieces=tuple(pieces), end=end)


class _At:
    """A `sessions.Place`."""

    def __init__(self, machine: _Machine, calls: Calls) -> None:
        self._machine, self._calls = machine, calls

    @property
    def heard_s(self) -> float:
        return self._machine.heard_s

    def said(self) -> None:
        self._machine.wake()

    def ended(self, session: Session, grace_s: float) -> None:
        self._calls.over(self._machine, session, grace_s)

    def accused(self, session: Session, why: str) -> None:
        self._calls.strike(self._machine, session.service, why)


class _Kind:
    """A `roster.Service`."""

    def __init__(self, offer: ServiceKind, calls: Calls) -> None:
        self.offer: Offer = offer
        self._kind, self._calls = offer, calls

    def admit(self, worker: Worker, details: bytes) -> bytes:
        self._calls.admit(worker, self._kind, decode_offered(details))
        return b""

    def renew(self, worker: Worker, held: Sequence[str], pulled: int) -> Sequence[str]:
        self._calls.alive(worker, self._kind)
        return ()

    def state(self, worker: Worker) -> bytes:
        return b""

    def gone(self, worker: Worker, reason: str) -> None:
        self._calls.gone(worker, self._kind, reason)


class Calls:
    """An `Elsewhere`; one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, patience_s: float = PATIENCE_S) -> None:
        """`clock`: the roster's; `patience_s`: as `PATIENCE_S`."""
        self._clock, self._patience_s = clock, patience_s
        self._tell: Callable[[str, str], None] = lambda kind, message: None
        self._machines: dict[tuple[str, ServiceKind], _Machine] = {}
        self._waiting: list[Session] = []
        self._epoch, self._count = secrets.token_hex(4), 0

    def join(self, desk: Desk, roster: Roster) -> None:
        """Serve workers that ask there. Once; before, nobody is to be had."""
        self._tell = roster.tell
        desk.register(PULL, self._pull)
        desk.register(DONE, self._done)
        for kind in KINDS:
            roster.add(_Kind(kind, self))

    def admit(self, worker: Worker, kind: ServiceKind, offered: Offered) -> None:
        """A worker offers this."""
        before = self._machines.get((worker.name, kind))
        if before is not None:
            self.gone(before.worker, kind, "it has begun anew")
        self._machines[worker.name, kind] = _Machine(worker, kind, offered, self._clock)

    def alive(self, worker: Worker, kind: ServiceKind) -> None:
        """A worker was heard of."""
        if (machine := self._machines.get((worker.name, kind))) is not None and machine.worker is worker:
            machine.show_state()

    def gone(self, worker: Worker, kind: ServiceKind, reason: str) -> None:
        """What a worker had is lost."""
        machine = self._machines.get((worker.name, kind))
        if machine is None or machine.worker is not worker:
            return
        for session in list(machine.sessions.values()):
            self._take_from(machine, session)
            if session.has_begun:
                session.lost(reason)
            else:
                session.back()
                self._waiting.insert(0, session)
        self._place()

    async def open(self, service: Service, waits: Callable[[str | None], None]) -> Session:
        """A process at a worker, where it has begun to load this."""
        session = Session(service, self._clock)
        self._waiting.append(session)
        self._place()
        try:
            while not session.has_begun:
                with anyio.move_on_after(self._patience_s) as scope:
                    await session.moved.wait()
                if scope.cancelled_caught:
                    self._check(session)
                    if (why := self._why(service)) is not None and not session.worker:
                        waits(why)
        except BaseException:
            if session in self._waiting:
                self._waiting.remove(session)
            session.kill()
            raise
        waits(None)
        return session

    def _check(self, session: Session) -> None:
        """Take a process back from a worker that does not begin it."""
        machine = self._machines.get((session.worker, session.service.kind))
        if machine is not None and not session.has_begun and self._clock() - session.given_s > BEGUN_S:
            self.strike(machine, session.service, f"it was not begun within {BEGUN_S:g} s")
            self._take_from(machine, session)
            session.back()
            self._waiting.insert(0, session)
        self._place()

    def _place(self) -> None:
        """Give what waits to workers, to those who have the least."""
        for session in list(self._waiting):
            fit = [
                machine
                for machine in self._machines.values()
                if self._clock() - machine.heard_s <= SILENT_S
                and len(machine.sessions) < MOST_SESSIONS
                and machine.objection(session.service) is None
            ]
            if not fit:
                continue
            machine = min(fit, key=lambda each: len(each.sessions))
            self._waiting.remove(session)
            self._give(machine, session)

    def _give(self, machine: _Machine, session: Session) -> None:
        self._count += 1
        session.name, session.worker = f"{self._epoch}.{self._count}", machine.worker.name
        session.given_s = self._clock()
        session.place = _At(machine, self)
        machine.sessions[session.name] = session
        self._show(machine)
        machine.wake()

    def _take_from(self, machine: _Machine, session: Session) -> None:
        machine.sessions.pop(session.name, None)
        self._show(machine)

    def over(self, machine: _Machine, session: Session, grace_s: float) -> None:
        """Have a process ended that nobody needs any more."""
        self._take_from(machine, session)
        machine.ending[session.name] = grace_s
        machine.wake()
        self._place()

    def strike(self, machine: _Machine, service: Service, why: str) -> None:
        """A worker has failed at a thing."""
        key = encode(service)
        machine.strikes[key] += 1
        machine.why[key] = why
        name, count = machine.worker.name, machine.strikes[key]
        more = "; it is not asked for that any more" if count == MOST_STRIKES else ""
        self._tell("worker_offence", f"worker {name}, {service.label}: {why}{more}")

    def _show(self, machine: _Machine) -> None:
        machine.worker.leases[machine.kind] = tuple(
            f"{session.service.label} ({name})" for name, session in machine.sessions.items()
        )
        machine.show_state()

    def _why(self, service: Service) -> str | None:
        """Why nobody can have this; None where somebody can."""
        objections: list[str] = []
        for (name, _), machine in self._machines.items():
            objection = machine.objection(service)
            if objection is None:
                return None
            if objection:
                objections.append(f"worker {name} {objection}")
        named = " ".join(code.name for code in service.code)
        return (
            f"no worker that is here offers {service.label}; start one with troupe worker --join FILE "
            f"{_FLAGS[service.kind]} {named}{''.join(f'; {each}' for each in objections)}"
        )

    def _machine(self, name: str, kind: ServiceKind) -> _Machine | None:
        machine = self._machines.get((name, kind))
        if machine is not None:
            machine.asked_s = self._clock()
        return machine

    async def _pull(self, name: str, body: bytes) -> bytes:
        pull = decode_pull(body)
        machine = self._machine(name, pull.kind)
        if machine is None or pull.number < machine.newest:
            return encode(Orders())
        machine.newest = pull.number
        for session_name, session in list(machine.sessions.items()):
            if session_name in pull.sessions:
                session.arrived(pull.sessions[session_name])
                if not session.has_begun:
                    session.has_begun = True
                    session.move()
            elif session.has_begun:
                self._take_from(machine, session)
                session.lost("its worker does not have it any more")
        for ended in machine.ending.keys() - pull.sessions.keys():
            del machine.ending[ended]
        self._place()
        orders = machine.orders(pull)
        with anyio.move_on_after(WAIT_S):
            while orders.are_none and pull.number == machine.newest:
                await machine.changed.wait()
                orders = machine.orders(pull)
        return encode(orders)

    async def _done(self, name: str, body: bytes) -> bytes:
        done = decode_done(body)
        machine = self._machine(name, done.kind)
        session = None if machine is None else machine.sessions.get(done.session)
        if machine is not None and session is not None:
            session.answered(done)
            if session.returncode is not None and session.name in machine.sessions:
                self._take_from(machine, session)
                self._place()
        return b""
