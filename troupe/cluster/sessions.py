"""One process on a worker, as the run sees it: what was said to it and has not arrived yet, what it has answered."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Callable
from typing import Protocol

import anyio

from troupe.cluster.call_wire import MOST_BYTES, PIECE_BYTES, Done, Piece
from troupe.runtime.elsewhere import Service
from troupe.runtime.frames import FrameError

SILENT_S = 6.0
"""Without a word of a worker, after which a call that gets no answer has not failed by itself."""
ACCEPTED_S = 1.0
"""In which a worker that is there has what is said to it."""
_EXIT_CODES = range(-64, 256)


class Place(Protocol):
    """A worker, to a session that it was given."""

    @property
    def heard_s(self) -> float:
        """When it was heard of last."""

    def said(self) -> None:
        """There is something to fetch."""

    def ended(self, session: Session, grace_s: float) -> None:
        """The run needs the process no more."""

    def accused(self, session: Session, why: str) -> None:
        """It has answered what it must not."""


class _Nowhere:
    """Where a session is that waits."""

    heard_s = math.inf

    def said(self) -> None:
        pass

    def ended(self, session: Session, grace_s: float) -> None:
        pass

    def accused(self, session: Session, why: str) -> None:
        pass


NOWHERE = _Nowhere()


class Session:
    """A `DistantChild`. It is made waiting for a worker, and may go back to that until the worker has begun it."""

    def __init__(self, service: Service, clock: Callable[[], float]) -> None:
        self.service = service
        self.name = ""
        """Another one at every worker that it is given to."""
        self.worker = ""
        """Empty while it waits for one."""
        self.has_begun = False
        self.given_s = 0.0
        """When it was given to the worker."""
        self.moved = anyio.Event()
        """Set when it was given to a worker, has begun or was lost."""
        self.place: Place = NOWHERE
        self._clock = clock
        self._out: deque[Piece] = deque()
        self._said = self._arrived = self._answers = 0
        self._said_s = 0.0
        self._owed = 1  # that it is loaded
        self._in: deque[bytes] = deque()
        self._news = anyio.Event()
        self._code: int | None = None
        self._how = ""
        self._was_away = False

    @property
    def returncode(self) -> int | None:
        """None while it runs, or is to run."""
        return self._code

    @property
    def is_away(self) -> bool:
        """Whether its worker is lost, or has not been heard of lately."""
        return self._was_away if self._code is not None else self._is_silent()

    async def send(self, frame: bytes) -> None:
        """Have a frame fetched by the worker."""
        if len(frame) > MOST_BYTES:
            raise FrameError(f"a frame of {len(frame):,} bytes is over the limit of {MOST_BYTES:,} for workers")
        if self._code is not None:
            raise anyio.BrokenResourceError(self.how_it_ended())
        if not self._out:
            self._said_s = self._clock()
        starts = range(0, max(1, len(frame)), PIECE_BYTES)
        for start in starts:
            is_last = start == starts[-1]
            self._out.append(Piece(self.name, self._said, frame[start : start + PIECE_BYTES], is_last))
            self._said += 1
        self._owed += 1
        self.place.said()

    async def receive(self) -> bytes:
        """The next frame. EndOfStream where it has ended."""
        while not self._in:
            if self._code is not None:
                raise anyio.EndOfStream(self.how_it_ended())
            await self._news.wait()
        return self._in.popleft()

    def kill(self) -> None:
        """Have the worker kill it."""
        self._end(0.0)

    async def aclose(self, grace_s: float | None = None) -> None:
        """Have the worker end it; not waited for."""
        self._end(1.0 if grace_s is None else grace_s)

    def how_it_ended(self) -> str:
        """For an error message."""
        return self._how or f"the process on worker {self.worker} is running"

    def accuse(self, why: str) -> None:
        """It has answered what it must not; it is ended."""
        self.place.accused(self, why)
        self.kill()

    def pieces(self, most: int) -> list[Piece]:
        """The first that have not arrived."""
        return list(self._out)[:most]

    def arrived(self, number: int) -> None:
        """So many pieces have arrived."""
        if self._arrived < number <= self._said:
            while self._out and self._out[0].number < number:
                self._out.popleft()
            self._arrived, self._said_s = number, self._clock()

    def answered(self, done: Done) -> None:
        """The worker tells of an answer, or of its end; for a second time, too."""
        if self._code is not None or done.number < self._answers:
            return
        if done.number > self._answers:
            self.accuse("an answer came out of turn")
            return
        self._answers += 1
        if done.frame is None:
            code = done.code if done.code in _EXIT_CODES else 1
            self._over(code, f"the process on worker {self.worker} ended: {done.how or f'code {code}'}")
            return
        self._owed -= 1
        if self._owed < 0 or len(done.frame) > MOST_BYTES:
            self.accuse("an answer came that nobody asked for" if self._owed < 0 else "an answer is too long")
            return
        self._in.append(done.frame)
        self._tell()

    def lost(self, reason: str) -> None:
        """It went with its worker."""
        if self._code is None:
            self._over(-signal.SIGKILL, f"the process on worker {self.worker} was lost: {reason}", was_away=True)

    def back(self) -> None:
        """It waits for a worker once more, for the one that had it had not begun."""
        self.worker, self.name, self.place = "", "", NOWHERE
        self.move()

    def move(self) -> None:
        """Wake who waits for it to begin."""
        self.moved.set()
        self.moved = anyio.Event()

    def _is_silent(self) -> bool:
        now_s = self._clock()
        if now_s - self.place.heard_s > SILENT_S:
            return True
        return bool(self._out) and now_s - self._said_s > ACCEPTED_S

    def _end(self, grace_s: float) -> None:
        if self._code is None:
            self._over(-signal.SIGKILL, f"the process on worker {self.worker} was ended", was_away=self._is_silent())
            self.place.ended(self, grace_s)

    def _over(self, code: int, how: str, *, was_away: bool = False) -> None:
        self._code, self._how, self._was_away = code, how, was_away
        self._out.clear()
        self._tell()
        self.move()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()
