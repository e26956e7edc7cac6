"""Actor: one typed mailbox, one `handle(message)`, an end that follows from the end of its mailbox.

An actor owns its state alone and touches others only by sending messages into the channels it was given. When its
mailbox ends it sends what is left, closes its channels, and so the end travels down the play by itself.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import anyio
from anyio.abc import TaskGroup

from troupe.messages import Incident, Span
from troupe.runtime.mailbox import Broadcast, Channel, Mailbox


class Reporter:
    """An actor's way to tell what it does: incidents, which are never lost, and spans, which may be.

    Both are optional, so that an actor can be played alone in a test or a script.
    """

    def __init__(
        self, actor: str, incidents: Channel[Incident] | None = None, spans: Channel[Span] | None = None
    ) -> None:
        self.actor = actor
        self._incidents = incidents
        self._spans = spans

    async def incident(self, incident: Incident) -> None:
        """Report a fault that does not stop the run; waits for room."""
        if self._incidents is not None:
            await self._incidents.send(incident)

    @contextmanager
    def span(self, name: str, *, step: int | None = None, gid: int | None = None) -> Iterator[None]:
        """Time the body as one piece of work on the actor's track; never waits."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            if self._spans is not None:
                self._spans.send_nowait(
                    Span(
                        actor=self.actor,
                        name=name,
                        start_s=start_s,
                        end_s=time.perf_counter(),
                        step=step,
                        gid=gid,
                    )
                )

    def close(self) -> None:
        """Close both channels."""
        for channel in (self._incidents, self._spans):
            if channel is not None:
                channel.close()


class Actor(ABC):
    """Base of all actors.

    Subclasses implement `handle`, and where they need it `start`, `finish` and `stop`. Work that must not hold up
    the mailbox is started in `self.tasks`, which is waited for before the actor finishes.
    """

    name: ClassVar[str]
    leaves_last: ClassVar[bool] = False
    """Whether a play that is cut short goes on for this actor until all others have ended, as they may still report."""
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
        """Release what `start` acquired; runs on every way out, and is not cancelled."""

    async def run(self) -> None:
        """Play the part from `start` to the end of the mailbox.

        The channels close only when the part was played to its end: after a fault somebody else may go on with
        them, and nobody downstream takes a fault for a regular end.
        """
        try:
            await self.start()
            async with anyio.create_task_group() as self.tasks:
                async for message in self.inbox:
                    await self.handle(message)
                    del message  # not kept until the next one comes: a snapshot holds gigabytes
            await self.finish()
        finally:
            with anyio.CancelScope(shield=True):
                await self.stop()
        for channel in self.outputs:
            if not channel.closed:
                channel.close()
        self.report.close()
