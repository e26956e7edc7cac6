"""Desk: where workers ask. It knows sessions, hands what is asked to whom it concerns, and bounds what one may ask.

Who asks is the name in the subject, which the message server enforces. What is malformed or not one's own to ask is an
offence; after `MOST_OFFENCES` of them the worker is put out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol, TypeAlias

import anyio

from troupe.cluster.wire import Answer, Ask, Declined, Incomplete, Over, Unknown, Whole, Wrong, decode_ask
from troupe.messages import Incident
from troupe.runtime.frames import MessageError, encode
from troupe.runtime.reporter import Reporter

Handler: TypeAlias = Callable[[str, bytes], Awaitable[bytes]]
"""Worker's name, body → body of the answer. Raises `OffenceError` for what may not be asked, `DeclineError` for who is
not taken, `MessageError` for what is no message."""

MOST_OFFENCES = 8
"""Of one worker in one start of a run."""
MOST_A_SECOND = 1000
"""Asks of one worker, after a burst; more have to wait, of which a bus lets in a few dozen."""
_BURST = 5000.0
_LONGEST_WAIT_S = 5.0
_MOST_UNFINISHED = 4
"""Bodies of one worker of which some pieces are missing."""
_MOST_NAMES = 1024


class OffenceError(Exception):
    """A worker has asked what it may not ask, or said what cannot be."""


class DeclineError(Exception):
    """A worker is not taken; `later`: it may ask again in a while."""

    def __init__(self, reason: str, *, later: bool = False) -> None:
        super().__init__(reason)
        self.later = later


class Serving(Protocol):
    """The part of a bus that the desk needs."""

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]: ...


class _Asker:
    """What is known of one name."""

    def __init__(self) -> None:
        self.session = ""
        self.put_out: str | None = None
        self.offences = 0
        self.allowance = _BURST
        self.asked_s = 0.0
        self.unfinished: dict[int, dict[int, bytes]] = {}
        """Number of a body → its pieces."""

    def wait_s(self, now_s: float) -> float:
        """How long one more ask has to wait."""
        self.allowance = min(self.allowance + (now_s - self.asked_s) * MOST_A_SECOND, _BURST) - 1
        self.asked_s = now_s
        return min(_LONGEST_WAIT_S, max(0.0, -self.allowance / MOST_A_SECOND))


class Desk:
    """Verbs → handlers. `register` before `open`; all on one event loop."""

    def __init__(self, run: str, report: Reporter, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`run`: the run's name in subjects."""
        self.over = False
        """Whether the run has ended: then everybody is told so."""
        self.told_over: set[str] = set()
        """Who has been told so."""
        self.told_at_hello: set[str] = set()
        """Of them, names that somebody asked to be taken as."""
        self.told = anyio.Event()
        """Set, and made anew, when somebody was."""
        self.offences: Counter[str] = Counter()
        """Worker → what it asked wrongly so far."""
        self.on_put_out: Callable[[str, str], None] = lambda worker, reason: None
        """Called with the worker and the reason."""
        self._prefix = f"{run}.hub."
        self._report = report
        self._clock = clock
        self._handlers: dict[str, Handler] = {}
        self._askers: dict[str, _Asker] = {}

    def register(self, verb: str, handler: Handler) -> None:
        """Have a verb answered. ValueError for one that is."""
        if verb in self._handlers:
            raise ValueError(f"the verb {verb} has a handler already")
        self._handlers[verb] = handler

    @asynccontextmanager
    async def open(self, bus: Serving) -> AsyncIterator[None]:
        """Answer for as long as the body runs."""
        async with bus.serve(f"{self._prefix}>", self.answer):
            yield

    def begin(self, worker: str, session: str) -> None:
        """From now on this is the worker's session; what an earlier one asks is answered with `Unknown`."""
        asker = self._askers[worker]
        asker.session = session
        asker.unfinished.clear()

    def put_out(self, worker: str, reason: str) -> bool:
        """Answer nothing of this worker's any more in this start of the run; whether it was still answered."""
        asker = self._askers.setdefault(worker, _Asker())
        if asker.put_out is not None:
            return False
        asker.put_out = reason
        self._tell("worker_put_out", f"worker {worker} was put out: {reason}")
        self.on_put_out(worker, reason)
        return True

    async def answer(self, subject: str, data: bytes) -> bytes:
        """The frame that answers a frame."""
        worker, _, verb = subject.removeprefix(self._prefix).partition(".")
        if not worker or (worker not in self._askers and len(self._askers) >= _MOST_NAMES):
            return encode(Wrong(reason="no such name"))
        asker = self._askers.setdefault(worker, _Asker())
        if asker.put_out is not None:
            return encode(Declined(reason=asker.put_out))
        if wait_s := asker.wait_s(self._clock()):
            await anyio.sleep(wait_s)
        try:
            return encode(await self._answer(worker, asker, verb, data))
        except (MessageError, OffenceError) as error:
            self._offend(worker, asker, f"{verb or 'a frame'}: {error}")
            return encode(Wrong(reason=str(error)))
        except DeclineError as error:
            return encode(Declined(reason=str(error), later=error.later))

    async def _answer(self, worker: str, asker: _Asker, verb: str, data: bytes) -> Answer:
        ask = decode_ask(data)
        if self.over:
            self.told_over.add(worker)
            if verb == "hello":
                self.told_at_hello.add(worker)
            self.told.set()
            self.told = anyio.Event()
            return Over()
        handler = self._handlers.get(verb)
        if handler is None:
            raise OffenceError(f"nobody here answers {verb[:40]!r}")
        if verb != "hello" and (not asker.session or ask.session != asker.session):
            return Unknown()
        body = self._joined(asker, ask)
        if isinstance(body, Incomplete):
            return body
        answer = await handler(worker, body)
        return Whole(body=answer)

    def _joined(self, asker: _Asker, ask: Ask) -> bytes | Incomplete:
        """The body, once all its pieces are there."""
        if ask.pieces == 1:
            return ask.body
        if ask.piece >= ask.pieces:
            raise OffenceError(f"piece {ask.piece} of {ask.pieces}")
        pieces = asker.unfinished.setdefault(ask.message, {})
        pieces[ask.piece] = ask.body
        while len(asker.unfinished) > _MOST_UNFINISHED:
            asker.unfinished.pop(next(iter(asker.unfinished)))
        missing = tuple(number for number in range(ask.pieces) if number not in pieces)
        if missing:
            return Incomplete(missing=missing)
        return b"".join(asker.unfinished.pop(ask.message)[number] for number in range(ask.pieces))

    def _offend(self, worker: str, asker: _Asker, what: str) -> None:
        asker.offences += 1
        self.offences[worker] += 1
        if asker.offences == 1:
            self._tell("worker_offence", f"worker {worker}: {what}")
        if asker.offences >= MOST_OFFENCES:
            self.put_out(worker, f"{asker.offences} times it asked what it may not; the last was: {what}")

    def _tell(self, kind: str, message: str) -> None:
        self._report.incident_nowait(Incident(actor=self._report.actor, kind=kind, message=message))
