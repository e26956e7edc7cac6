"""The daemon's end of one trainer: its process, the requests that it has not answered yet, and whether it is alive."""

import itertools
from collections.abc import Callable
from typing import Protocol

import anyio

from troupe.daemon.control.protocol import Reply, Request
from troupe.daemon.logs import LOGGER
from troupe.daemon.trainer import frames
from troupe.daemon.trainer.frames import Answer, Ask, ToDaemon, ToTrainer
from troupe.messages import GetStatus, Refused
from troupe.records.standing import Silence
from troupe.runtime.frames import FrameError, encode

ANSWER_S = 5.0
"""That a trainer may take to answer before the daemon answers for it."""
CHECKED_S = 75.0
"""The same where something is looked at first, which takes a minute at the most."""
GONE = (anyio.EndOfStream, anyio.BrokenResourceError, FrameError)
"""What is raised where a trainer is not there any more, or does not make sense."""
_LOOKS = 6
"""Times that a trainer is asked for a sign of life before it is given up: one long absence of the daemon itself, which
was stopped in its terminal, say, must not count as the trainer's."""
_OFF_S = 60.0


class Child(Protocol):
    """A trainer's process, as ChildProcess has it."""

    @property
    def pid(self) -> int: ...
    async def send(self, frame: bytes) -> None: ...
    async def receive(self) -> bytes: ...
    def kill(self) -> None: ...
    async def aclose(self, grace_s: float | None = None) -> None: ...


class Link:
    """A trainer, as the daemon speaks with it."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.speaks = True
        """Whether it prints its steps and incidents itself."""
        self.silence: Silence | None = None
        """What kept it from answering, where it was killed for that and its guardian knew."""
        self.verdict: str | None = None
        """Why it was killed, where it gave no sign of life."""
        self._heard = False
        self._numbers = itertools.count()
        self._answers: dict[int, Reply | None] = {}
        self._answered = anyio.Event()

    async def send(self, message: ToTrainer) -> None:
        """Send one frame."""
        await self.child.send(encode(message))

    async def receive(self) -> ToDaemon:
        """Its next frame; one of GONE where none will come."""
        message = frames.decode_in_daemon(await self.child.receive())
        self._heard = True
        return message

    async def ask(self, request: Request, within_s: float = ANSWER_S) -> Reply | None:
        """Its answer; None where it gives none in time."""
        number = next(self._numbers)
        self._answers[number] = None
        try:
            with anyio.move_on_after(within_s):
                await self.send(Ask(number=number, request=request))
                while self._answers[number] is None:
                    await self._answered.wait()
            return self._answers[number]
        except GONE:
            return Refused(message="the trainer has just ended; ask again")
        finally:
            del self._answers[number]

    def settle(self, answer: Answer) -> None:
        """Give an answer to who asked."""
        if answer.number in self._answers:  # who asked may have gone
            self._answers[answer.number] = answer.reply
        self._wake()

    def hang_up(self) -> None:
        """Nobody will answer any more."""
        for number, reply in self._answers.items():
            if reply is None:
                self._answers[number] = Refused(message="the trainer ended before it answered; ask again")
        self._wake()

    async def watch(self, limit_s: Callable[[], float], silence: Callable[[], Silence | None] = lambda: None) -> None:
        """Kill it when it has told and answered nothing for `limit_s()` seconds, which may change; 0: never.
        `silence()`: why, as its guardian says."""
        silent_s = 0.0
        while True:
            limit = limit_s()
            if not limit:
                await anyio.sleep(_OFF_S)
                continue
            look_s = limit / _LOOKS
            self._heard = False
            await anyio.sleep(look_s / 2)
            if not self._heard:
                await self.ask(GetStatus(), look_s / 2)
            silent_s = 0.0 if self._heard else silent_s + look_s
            if silent_s >= 0.999 * limit:
                self.verdict = (
                    f"the trainer (pid {self.child.pid}) gave no sign of life for {silent_s:.0f} s "
                    f"(daemon.kill_after_s is {limit:g}) and was killed"
                )
                self.silence = silence()
                if self.silence is not None:
                    self.verdict += f": {self.silence.reason}"
                LOGGER.error(self.verdict)
                self.child.kill()
                return

    def _wake(self) -> None:
        self._answered.set()
        self._answered = anyio.Event()
