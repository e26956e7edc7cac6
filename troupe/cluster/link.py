"""Link: a worker's way to ask the run. It asks until it is answered, however often the server or the run begin anew."""

import time
from collections.abc import Callable

import anyio

from troupe.cluster.bus import Bus, BusState, NoAnswer, hub_subject
from troupe.cluster.wire import (
    Admitted,
    Answer,
    Ask,
    Declined,
    Hello,
    Incomplete,
    Over,
    Unknown,
    Whole,
    Wrong,
    decode_admitted,
    decode_answer,
    pieces_of,
)
from troupe.errors import RunError
from troupe.runtime.backoff import backoff_s
from troupe.runtime.frames import encode

HELLO_WAIT_S = 10.0
NOT_LET_IN = (
    "the run's server does not know this worker's key, or knows it no more; ask for a join file: "
    "troupe cluster invite OUT NAME"
)
AT_ONCE = 24
"""Asks under way, besides beats and those that wait for work: of more at once the run would leave some unanswered."""
LATER_S = 2.0
"""Before a worker that may be taken later asks again."""
_AT_ANY_TIME = {"beat", "bye"}
_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 2.0


class RunEndedError(Exception):
    """The run has ended: there is nothing to do any more."""


class DeclinedError(Exception):
    """The run takes nothing of this worker, or its server does not let it in; the text says why."""


class SessionGoneError(Exception):
    """The run does not know this worker's session, as after its own restart: say hello anew."""


class Link:
    """Belongs to one event loop; any number of asks may be under way."""

    def __init__(self, bus: Bus, run: str, *, tell: Callable[[str], None] = lambda text: None) -> None:
        """`tell` is given what a person should know: that the run does not answer, that it does again."""
        self.session = ""
        self.away_since_s: float | None = None
        """`time.monotonic` of the first ask that nobody answers; None while asks are answered."""
        self._bus, self._run, self._tell = bus, run, tell
        self._messages = 0
        self._places = anyio.Semaphore(AT_ONCE)

    @property
    def name(self) -> str:
        """The worker's."""
        return self._bus.name

    @property
    def connection(self) -> BusState:
        """To the run's server, now."""
        return self._bus.state

    async def hello(self, hello: Hello) -> Admitted:
        """Ask to be taken, for as long as it takes. DeclinedError, RunEndedError."""
        self.session = ""
        told = ""
        while True:
            answer = await self._answered("hello", Ask(body=encode(hello)), HELLO_WAIT_S)
            if isinstance(answer, Declined) and answer.later:
                if answer.reason != told:
                    told = answer.reason
                    self._tell(f"not taken yet: {told}; asking again")
                await anyio.sleep(LATER_S)
                continue
            admitted = decode_admitted(_body(answer))
            self.session = admitted.session
            return admitted

    async def ask(self, verb: str, body: bytes = b"", *, wait_s: float = HELLO_WAIT_S) -> bytes:
        """The answer to a verb; asked again where none has come after `wait_s`, so that it may be asked twice.

        RunEndedError, DeclinedError, SessionGoneError; RunError where the run says that this may not be asked.
        """
        if wait_s > HELLO_WAIT_S or verb in _AT_ANY_TIME:
            return await self._asked(verb, body, wait_s)
        async with self._places:
            return await self._asked(verb, body, wait_s)

    async def _asked(self, verb: str, body: bytes, wait_s: float) -> bytes:
        self._messages += 1
        pieces = pieces_of(body, session=self.session, message=self._messages)
        missing: tuple[int, ...] = tuple(range(len(pieces)))
        while True:
            for number in missing:
                answer = await self._answered(verb, pieces[number], wait_s)
                if not isinstance(answer, Incomplete):
                    return _body(answer)
                missing = answer.missing

    async def _answered(self, verb: str, frame: Ask, wait_s: float) -> Answer:
        data, nth = encode(frame), 0
        while True:
            try:
                reply = await self._bus.request(hub_subject(self._run, self.name, verb), data, timeout_s=wait_s)
            except NoAnswer as error:
                if error.why == "refused":
                    raise DeclinedError(NOT_LET_IN) from None
                nth += 1
                self._away(error)
                await anyio.sleep(backoff_s(nth, _PAUSE_S, _LONGEST_PAUSE_S))
                continue
            self._back()
            return decode_answer(reply)

    def _away(self, error: NoAnswer) -> None:
        if self.away_since_s is None:
            self.away_since_s = time.monotonic()
            why = {
                "nobody": "its server is there, the run itself is not",
                "untrusted": "what answers at its address has no certificate of this run",
            }.get(error.why, "it cannot be reached")
            self._tell(f"the run does not answer ({why}); waiting for it")

    def _back(self) -> None:
        if self.away_since_s is not None:
            seconds = time.monotonic() - self.away_since_s
            self.away_since_s = None
            self._tell(f"the run answers again, after {seconds:.0f} s")


def _body(answer: Answer) -> bytes:
    match answer:
        case Whole(body=body):
            return body
        case Over():
            raise RunEndedError
        case Declined(reason=reason):
            raise DeclinedError(reason)
        case Unknown():
            raise SessionGoneError
        case Wrong(reason=reason):
            raise RunError(f"the run cannot take what this worker says: {reason}")
        case Incomplete():
            raise RunError("the run asks for pieces of what is whole")
