"""Metrics: takes every report of the run and hands it to the sinks and to those who listen."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import anyio
import msgspec

from troupe.messages import (
    Answered,
    CheckpointWritten,
    Evaluated,
    GroupClosed,
    Incident,
    MemberStatus,
    Settle,
    Span,
    Update,
)
from troupe.records.diagnosis.watch import Diagnosis
from troupe.records.members import cluster_figures
from troupe.records.sinks.sinks import Sinks
from troupe.runtime.actor import Actor
from troupe.runtime.broadcast import Broadcast
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.spans import StepTimes

Heard: TypeAlias = Update | GroupClosed | Incident
"""What listeners may ask for."""
_LETS_OTHERS_FIRST_S = 0.005
"""Reports come in while the next step is being set going: they are looked at when the device is at work again, and
together, as each awakening costs more than a report."""


class Tally(msgspec.Struct, kw_only=True):
    """What the Metrics actor has counted so far; read when the run is over."""

    closed_groups: Counter[str] = msgspec.field(default_factory=Counter)
    """Groups by the state in which they closed."""
    incidents: Counter[str] = msgspec.field(default_factory=Counter)
    """Incidents by kind."""
    switched_off_sinks: dict[str, str] = msgspec.field(default_factory=dict)
    """Sink → why it was switched off."""
    diagnosis: Diagnosis = msgspec.field(default_factory=lambda: Diagnosis({}))
    """What the figures so far say is wrong."""


class Metrics(Actor):
    """Receives Update, GroupClosed, Incident, CheckpointWritten, Answered, Evaluated, Span and Settle; broadcasts the
    first three, of which a slow listener keeps the newest.

    It adds to each Update what only it can see: how long the queues are, where the time of the step went, and what all
    figures so far say is wrong. Nothing here waits: sinks have threads of their own. One that fails or hangs is
    switched off, or tried again later, which is an incident, and training goes on. Sinks and tally outlive the actor.
    """

    name = "metrics"
    leaves_last = True

    def __init__(
        self,
        inbox: Mailbox,
        *,
        sinks: Sinks,
        listeners: Broadcast[Heard],
        tally: Tally,
        watched: Sequence[Mailbox] = (),
        reporters: Sequence[Reporter] = (),
        members: Callable[[], Iterable[MemberStatus]] = tuple,
        closes: bool = True,
        report: Reporter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`watched`: mailboxes whose queues are told. `reporters`: of the actors, to see what they are at. `members`:
        who does their work elsewhere. `closes`: whether sinks and listeners are closed at the end; not where there is
        more to tell after it."""
        super().__init__(inbox, [listeners] if closes else [], report)
        self._closes = closes
        self._listeners = listeners
        self._sinks = sinks
        self._tally = tally
        self._watched = watched
        self._reporters = reporters
        self._members = members
        self._clock = clock
        self._times = StepTimes(clock())

    async def start(self) -> None:
        """Have the sinks opened, unless an actor before has."""
        self._sinks.open()

    async def handle(
        self, message: Update | GroupClosed | Incident | CheckpointWritten | Answered | Evaluated | Span | Settle
    ) -> None:
        """Count, pass on, and give to every sink; or have what they were given put on the disk."""
        if isinstance(message, Span):
            self._times.add(message)
            self._sinks.write(message)
            return
        if isinstance(message, Evaluated):
            self._tally.diagnosis.add_evaluation(message.version, message.metrics)
        if isinstance(message, Answered | Evaluated):
            self._sinks.write(message)
            return
        if isinstance(message, Settle):
            self._sinks.settle(message.version)
            return
        self._take_writes()
        for incident in self._sinks.news():
            self._note(incident)
            self._sinks.write(incident)
        if isinstance(message, Update):
            message = self._complete(message)
        if isinstance(message, Heard):
            self._listeners.send_nowait(message)
        self._sinks.write(message)
        self._count(message)  # last: a message whose handling fails comes once more

    def _complete(self, update: Update) -> Update:
        metrics = update.metrics | self._queues() | self._step_times() | cluster_figures(self._members())
        diagnosis = self._tally.diagnosis
        diagnosis.add(update.step, metrics)
        return msgspec.structs.replace(update, metrics=metrics | diagnosis.metrics, findings=diagnosis.findings)

    async def _take(self) -> Any:
        if len(self.inbox):
            return await self.inbox.take()
        message = await self.inbox.take()
        await anyio.sleep(_LETS_OTHERS_FIRST_S)
        return message

    async def finish(self) -> None:
        """Everything was told: have it written."""
        if not self._closes:
            return
        for incident in await self._sinks.close():
            self._note(incident)

    def _count(self, message: object) -> None:
        if isinstance(message, GroupClosed):
            self._tally.closed_groups[message.state] += 1
        elif isinstance(message, Incident):
            self._tally.incidents[message.kind] += 1

    def _note(self, incident: Incident) -> None:
        self._count(incident)
        self._tally.switched_off_sinks.update(self._sinks.switched_off)
        self._listeners.send_nowait(incident)

    def _take_writes(self) -> None:
        """What the sinks' threads did meanwhile counts as this actor's work."""
        for write in self._sinks.writes():
            name = f"write {write.sink}"
            span = Span(actor=self.name, name=name, start_s=write.start_s, end_s=write.end_s, lane=write.lane)
            self._times.add(span)
            self._sinks.write(span)

    def _step_times(self) -> dict[str, float]:
        """Where the time since the last Update went."""
        doing = [span for reporter in self._reporters for span in reporter.doing]
        return self._times.end_step(self._clock(), doing)

    def _queues(self) -> dict[str, float]:
        """Depth of every watched channel now, the seconds its messages have waited so far, and what was dropped."""
        figures = {}
        for mailbox in self._watched:
            for stats in (channel.stats() for channel in mailbox.channels if not channel.side):
                figures[f"queue/{stats.name}/depth"] = float(stats.depth)
                figures[f"queue/{stats.name}/wait_s"] = stats.wait_s
        dropped = sum(channel.stats().dropped for channel in self.inbox.channels)
        figures["spans_dropped"] = float(dropped + self._sinks.dropped)
        return figures
