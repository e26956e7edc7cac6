"""A page of the newest figures for Prometheus, served on this machine."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from troupe.messages import NOT_STARTED, Incident, Phase, Status, Update
from troupe.records.sinks.display import queue_depths
from troupe.records.sinks.prometheus_text import CONTENT_TYPE, exposition

_POLL_S = 0.1
"""In which the server sees that it is to end."""


class PrometheusSink:
    """Serves `/metrics` on this machine: what the newest messages say."""

    name = "prometheus"
    takes: tuple[type, ...] = (Update, Incident, Status)

    def __init__(self, port: int, *, host: str = "127.0.0.1") -> None:
        """`port` 0: any that is free; `port` then tells which, once it is open."""
        self.port = port
        self._host = host
        self._status: Status = NOT_STARTED
        self._newest: Update | None = None
        self._incidents: Counter[str] = Counter()
        self._server: ThreadingHTTPServer | None = None

    def open(self) -> None:
        """Begin to serve. OSError where the port is taken."""
        self._server = _Server((self._host, self.port), _handler(lambda: exposition(self._status)))
        self.port = self._server.server_address[1]
        threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="troupe-prometheus", daemon=True
        ).start()

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
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Who asked has gone."""


def _handler(page: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # who connects and says nothing has a thread for so long

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, explain="The metrics of the run are at /metrics.")
                return
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nobody wants to read each scrape."""

    return Handler
