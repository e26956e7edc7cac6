"""A page of the newest figures for Prometheus, served on this machine."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from http import HTTPStatus

import msgspec
from anyio.from_thread import start_blocking_portal

from troupe.messages import NOT_STARTED, Incident, Phase, Status, Update
from troupe.records.sinks.display import queue_depths
from troupe.records.sinks.prometheus_text import CONTENT_TYPE, exposition
from troupe.runtime.http import HttpRequest, HttpResponse, HttpServer, RefusedError


class PrometheusSink:
    """Serves `/metrics` on this machine: what the newest messages say."""

    name = "prometheus"
    takes: tuple[type, ...] = (Update, Incident, Status)

    def __init__(self, port: int) -> None:
        """`port` 0: any that is free; `port` then tells which, once it is open."""
        self.port = port
        self._status: Status = NOT_STARTED
        self._newest: Update | None = None
        self._incidents: Counter[str] = Counter()
        self._serving = ExitStack()

    def open(self) -> None:
        """Begin to serve, in a thread. OSError where the port is taken."""
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal(name="troupe-prometheus"))
            server = HttpServer(self._answer, self.port)
            stack.enter_context(portal.wrap_async_context_manager(server))
            self.port = server.port
            self._serving = stack.pop_all()

    def write(self, message: object) -> None:
        """Take over what is new."""
        if isinstance(message, Status):
            self._status = message
        elif isinstance(message, Update):
            self._newest = message
        elif isinstance(message, Incident):
            self._incidents[message.kind] += 1

    def flush(self) -> None:
        """Have what was taken be served."""
        status, newest = self._status, self._newest
        if newest is not None:
            phase: Phase = "running" if status.phase == "starting" else status.phase
            queues = status.queues or dict(queue_depths(newest.metrics))
            status = msgspec.structs.replace(
                status,
                phase=phase,
                step=max(status.step, newest.step),
                total_steps=newest.total_steps,
                policy_version=max(status.policy_version, newest.version),
                queues=queues,
                metrics=newest.metrics,
            )
        told = {kind: max(count, status.incidents.get(kind, 0)) for kind, count in self._incidents.items()}
        self._status = msgspec.structs.replace(status, incidents=status.incidents | told)

    def close(self) -> None:
        """Serve no more. Safe to call twice."""
        self._serving.close()

    async def _answer(self, request: HttpRequest) -> HttpResponse:
        if request.path != "/metrics":
            raise RefusedError(HTTPStatus.NOT_FOUND, "The metrics of the run are at /metrics.")
        return HttpResponse(kind=CONTENT_TYPE, body=exposition(self._status).encode())
