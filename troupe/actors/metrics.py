"""Metrics: takes every report of the play and hands it to the sinks and to those who listen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from troupe.messages import GroupClosed, Incident, Span, Update
from troupe.runtime import Actor, Broadcast, Mailbox, Reporter
from troupe.sinks import Sink

_MAX_FAILURES = 3


class Tally(msgspec.Struct, kw_only=True):
    """What the Metrics actor has counted so far; read when the run is over."""

    closed_groups: Counter[str] = msgspec.field(default_factory=Counter)
    """Groups by the state in which they closed."""
    incidents: Counter[str] = msgspec.field(default_factory=Counter)
    """Incidents by kind."""
    switched_off_sinks: dict[str, str] = msgspec.field(default_factory=dict)
    """Sink → why it was switched off."""


class Metrics(Actor):
    """Receives Update, GroupClosed, Incident and Span; broadcasts Update, of which a slow listener keeps the newest.

    A sink that fails three times in a row on the same type of message is switched off, which is an incident, and
    training goes on.
    """

    name = "metrics"
    leaves_last = True

    def __init__(
        self,
        inbox: Mailbox,
        *,
        sinks: Sequence[Sink],
        listeners: Broadcast[Update],
        tally: Tally,
        watched: Sequence[Mailbox],
        report: Reporter | None = None,
    ) -> None:
        super().__init__(inbox, [listeners], report)
        self._listeners = listeners
        self._sinks = list(sinks)
        self._failures: Counter[tuple[str, type]] = Counter()
        self._tally = tally
        self._watched = watched

    async def start(self) -> None:
        """Open the sinks."""
        for sink in tuple(self._sinks):
            try:
                sink.open()
            except Exception as error:
                self._switch_off(sink, error)

    async def handle(self, message: Update | GroupClosed | Incident | Span) -> None:
        """Count, pass on, and write to every sink."""
        if isinstance(message, Update):
            message = msgspec.structs.replace(message, metrics=message.metrics | self._queues())
            self._listeners.send_nowait(message)
        elif isinstance(message, GroupClosed):
            self._tally.closed_groups[message.state] += 1
        elif isinstance(message, Incident):
            self._tally.incidents[message.kind] += 1
        self._write(message)

    async def stop(self) -> None:
        """Take what was reported before a fault or a stop cut the play short; close the sinks."""
        while len(self.inbox):
            await self.handle(await anext(self.inbox))
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                self._tally.switched_off_sinks[sink.name] = str(error)

    def _write(self, message: object) -> None:
        for sink in tuple(self._sinks):
            kind = sink.name, type(message)  # a sink leaves most types alone, which says nothing of its health
            try:
                sink.write(message)
                self._failures[kind] = 0
            except Exception as error:
                self._failures[kind] += 1
                if self._failures[kind] >= _MAX_FAILURES:
                    self._switch_off(sink, error)

    def _switch_off(self, sink: Sink, error: Exception) -> None:
        if sink not in self._sinks:  # it failed on the incident about another one
            return
        self._sinks.remove(sink)
        with suppress(Exception):
            sink.close()
        self._tally.switched_off_sinks[sink.name] = f"{type(error).__name__}: {error}"
        incident = Incident(
            actor=self.name, kind="sink_failed", message=f"the sink {sink.name} is switched off: {error}"
        )
        self._tally.incidents[incident.kind] += 1
        self._write(incident)

    def _queues(self) -> dict[str, float]:
        """Depth of every watched channel now, and the seconds its messages have waited so far."""
        figures = {}
        for mailbox in self._watched:
            for stats in (channel.stats() for channel in mailbox.channels if not channel.side):
                figures[f"queue/{stats.name}/depth"] = float(stats.depth)
                figures[f"queue/{stats.name}/wait_s"] = stats.wait_s
        return figures
