"""Actor: one typed mailbox, one `handle(message)`, an end that follows from the end of its mailbox.

An actor owns its state alone and touches others only by sending messages into the channels it was given. When its
mailbox ends it sends what is left, closes its channels, and so the end travels down the run by itself.

A message is in the actor's hand until it has been handled. When an actor fails, another one of its kind goes on with
the same mailbox and channels (`troupe.runtime.roles`), and is given what was in hand once more: whatever must not
happen twice, or be forgotten, is kept in an object that outlives the actor.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import anyio
from anyio.abc import TaskGroup

from troupe.messages import Incident, MemberStatus
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class Actor(ABC):
    """Base of all actors.

    Subclasses implement `handle`, and where they need it `start`, `finish` and `stop`. Work that must not hold up
    the mailbox is started in `self.tasks`, which is waited for before the actor finishes.
    """

    name: ClassVar[str]
    leaves_last: ClassVar[bool] = False
    """Whether a run that is cut short goes on for this actor until all others have ended, as they may still report."""
    acknowledges: ClassVar[bool] = False
    """Whether the actor itself says when it is done with a message (`self.inbox.done(message)`), because the work goes
    on after `handle` has returned. What it never says so of is given to its successor, should it fail."""
    tasks: TaskGroup

    def __init__(
        self, inbox: Mailbox, outputs: Sequence[Channel[Any] | Broadcast[Any]] = (), report: Reporter | None = None
    ) -> None:
        self.inbox = inbox
        self.outputs = tuple(outputs)
        self.report = report or Reporter(self.name)

    async def start(self) -> None:
        """Acquire what the actor needs; messages are read only afterwards."""

    @abstractmethod
    async def handle(self, message: Any) -> None:
        """Act on one message. Messages come one at a time, in order of arrival."""

    async def finish(self) -> None:
        """The mailbox has ended and all tasks are done: send what is left."""

    async def stop(self) -> None:
        """Release what `start` acquired; runs on every way out, and is not cancelled.

        When it fails, that is an incident, not a fault: the work was done, or another fault is told already.
        """

    @property
    def made(self) -> int:
        """How much of the work in hand is done, in a unit that the actor names; 0 where that is not known."""
        return 0

    @property
    def activity(self) -> str:
        """What it is at, in words, where its spans do not say it well enough; the same as long as it is the same."""
        return ""

    @property
    def progress(self) -> str:
        """How far it is with that, in words; empty where that is not known."""
        return ""

    def members(self) -> Sequence[MemberStatus]:
        """Who does this actor's work in processes of their own, here or elsewhere."""
        return ()

    @property
    def needs(self) -> str:
        """What must come from outside before the work goes on, as in `waiting for …`; empty: nothing."""
        return ""

    async def run(self) -> None:
        """Run from `start` to the end of the mailbox.

        The channels close only when the actor has come to its end: after a fault somebody else may go on with
        them, and nobody downstream takes a fault for a regular end.
        """
        try:
            await self.start()
            async with anyio.create_task_group() as self.tasks:
                await self._handle_all()
            await self.finish()
        finally:
            with anyio.CancelScope(shield=True):
                await self._stop()
        for channel in self.outputs:
            if not channel.closed:
                channel.close()
        self.report.close()

    async def _handle_all(self) -> None:
        while True:
            try:
                message = await self._take()
            except anyio.EndOfStream:
                return
            await self.handle(message)
            if not self.acknowledges:
                self.inbox.done(message)
            del message  # not kept until the next one comes: a snapshot holds gigabytes

    async def _take(self) -> Any:
        if len(self.inbox):
            return await self.inbox.take()
        with self.report.span("idle", kind="wait"):
            return await self.inbox.take()

    async def _stop(self) -> None:
        try:
            await self.stop()
        except Exception as error:
            message = f"{self.name} failed when it stopped: {type(error).__name__}: {error}; its work was not touched"
            self.report.incident_nowait(Incident(actor=self.name, kind="stop_failed", message=message))
