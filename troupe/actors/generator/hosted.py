"""Generators within a process that learns: the same as in processes of their own, on weights that are there already.

A rank of the learner has each version the moment that it has learned it; a generator beside it needs no file. What it
is told and tells are the frames of `wire.py`, over a pair of queues.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

import anyio
import anyio.lowlevel

from troupe.actors.generator.process import GeneratorProcess
from troupe.actors.generator.wire import Refused, Setup, decode_in_process
from troupe.errors import TroupeError
from troupe.policy import Base, Weights
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import encode
from troupe.runtime.process import ChildEnded


class Line:
    """One end of a connection within a process, as `Connection` has it; nothing waits for room."""

    def __init__(self) -> None:
        """Made by `pair`."""
        self.why = ""
        """Why the other side has closed, where that needs words."""
        self._frames: deque[bytes] = deque()
        self._came = anyio.Event()
        self._closed = False
        self._other: Line

    @classmethod
    def pair(cls) -> tuple[Line, Line]:
        """Two ends."""
        one, two = cls(), cls()
        one._other, two._other = two, one
        return one, two

    async def send(self, frame: bytes) -> None:
        """BrokenResourceError where either side has closed."""
        if self._closed or self._other._closed:
            raise anyio.BrokenResourceError(self.why or "the connection is closed")
        self._other._frames.append(frame)
        self._other._came.set()
        await anyio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        """The next frame; EndOfStream where none will come."""
        while not self._frames:
            if self._closed or self._other._closed:
                raise anyio.EndOfStream
            self._came = anyio.Event()
            await self._came.wait()
        return self._frames.popleft()

    def close(self, why: str = "") -> None:
        """What was sent is still read by the other side, and then the end. Safe to call twice."""
        self._other.why = self._other.why or why
        self._closed = True
        for line in (self, self._other):
            line._came.set()


class HostedChild:
    """As a `ChildProcess`, without a process of its own."""

    def __init__(self, end: Line, pid: int) -> None:
        self.pid = pid
        self.ended = anyio.Event()
        """Set when nobody speaks to it any more."""
        self._end = end

    async def send(self, frame: bytes) -> None:
        """One frame."""
        await self._end.send(frame)

    async def receive(self) -> bytes:
        """The next frame; ChildEnded where none will come."""
        try:
            return await self._end.receive()
        except anyio.EndOfStream:
            raise ChildEnded(f"the generator beside the learner ended: {self._end.why or 'it was closed'}") from None

    def kill(self) -> None:
        """It ends at its next token."""
        self._end.close()
        self.ended.set()

    async def aclose(self) -> None:
        """As `kill`: nothing is left that would have to be waited for."""
        self.kill()


class GeneratorHost:
    """Where generators of this process run, one at a time."""

    def __init__(self, board: PolicyBoard[Weights], base: Base, device: DeviceThread) -> None:
        """`board`: where what is learned here is published. `base`: what that completes. `device`: the thread that
        decodes."""
        self._board, self._base, self._device = board, base, device
        self._opened: deque[Line] = deque()
        self._open = anyio.Event()

    def open(self) -> Line:
        """To speak to one that begins when the one before has ended."""
        ours, theirs = Line.pair()
        self._opened.append(theirs)
        self._open.set()
        return ours

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            while not self._opened:
                self._open = anyio.Event()
                await self._open.wait()
            await self._serve(self._opened.popleft())

    async def _serve(self, end: Line) -> None:
        why = ""
        try:
            setup = decode_in_process(await end.receive())
            assert isinstance(setup, Setup)
            await GeneratorProcess(end, setup, board=self._board, base=self._base, device=self._device).run()
        except anyio.EndOfStream:
            pass
        except TroupeError as error:
            with suppress(anyio.BrokenResourceError):
                await end.send(encode(Refused(kind=type(error).__name__, message=str(error))))
            with suppress(anyio.EndOfStream):
                while True:
                    await end.receive()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            end.close(why)
