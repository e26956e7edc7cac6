"""What a run is doing, in the text format that Prometheus reads, and a sink that serves it on this machine.

Names begin with `troupe_`. Metrics of the newest step keep theirs, with `_` for what Prometheus does not allow; those
that exist once a reward, a queue or an actor share a name and say whose they are in a label.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus
from typing import Literal, get_args

import msgspec
from anyio.from_thread import start_blocking_portal

from troupe.messages import NOT_STARTED, Evaluated, Incident, Phase, Status, Update
from troupe.records.figures import queue_depths
from troupe.runtime.http import HttpRequest, HttpResponse, HttpServer, RefusedError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_Kind = Literal["gauge", "counter"]
_PATTERNS: tuple[tuple[re.Pattern[str], str, str], ...] = (
    (re.compile(r"rewards/(?P<label>.+)/(?P<rest>mean|std)"), "troupe_reward_function_{rest}", "reward"),
    (re.compile(r"queue/(?P<label>.+)/(?P<rest>wait_s)"), "troupe_queue_{rest}", "queue"),
    (re.compile(r"time/(?P<label>[^/]+)/(?P<rest>busy|idle)"), "troupe_actor_{rest}", "actor"),
    (re.compile(r"time/(?P<label>[^/]+)/(?P<rest>hidden_s|exposed_s)"), "troupe_time_{rest}", "work"),
    (re.compile(r"environments/(?P<label>.+)/(?P<rest>wait_s)"), "troupe_environment_{rest}", "environment"),
    (re.compile(r"(?P<rest>diagnosis)/(?P<label>.+)"), "troupe_{rest}", "rule"),
    (re.compile(r"tools/(?P<label>.+)/(?P<rest>wait_s)"), "troupe_tool_{rest}", "tool"),
)
"""Which metrics share a name, and what their label is called."""
_TOLD_OTHERWISE = re.compile(r"queue/.+/depth")
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]+")


class PrometheusSink:
    """Serves `/metrics` on this machine: what the newest messages say."""

    name = "prometheus"
    takes: tuple[type, ...] = (Update, Incident, Evaluated, Status)

    def __init__(self, port: int) -> None:
        """`port` 0: any that is free; `port` then tells which, once it is open."""
        self.port = port
        self._status: Status = NOT_STARTED
        self._newest: Update | None = None
        self._incidents: Counter[str] = Counter()
        self._evaluated: dict[str, Evaluated] = {}
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
        if isinstance(message, Status):
            self._status = message
        elif isinstance(message, Update):
            self._newest = message
        elif isinstance(message, Evaluated):
            self._evaluated[message.name] = msgspec.structs.replace(message, rows=())
        elif isinstance(message, Incident):
            self._incidents[message.kind] += 1

    def flush(self) -> None:
        """Have what was taken be served."""
        status, newest = self._status, self._newest
        if newest is not None:
            phase: Phase = "running" if status.phase == "starting" else status.phase
            queues = status.queues or queue_depths(newest.metrics)
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
        evaluated = (*status.evaluated, *self._evaluated.values())
        self._status = msgspec.structs.replace(status, incidents=status.incidents | told, evaluated=evaluated)

    def close(self) -> None:
        self._serving.close()

    async def _answer(self, request: HttpRequest) -> HttpResponse:
        if request.method != "GET":
            raise RefusedError(HTTPStatus.NOT_IMPLEMENTED, "The metrics of the run can be read, with GET.")
        if request.path != "/metrics":
            raise RefusedError(HTTPStatus.NOT_FOUND, "The metrics of the run are at /metrics.")
        return HttpResponse(kind=CONTENT_TYPE, body=exposition(self._status).encode())


class _Page:
    """Samples by the name that they share; a name has one kind, and a sample is told once."""

    def __init__(self) -> None:
        self._families: dict[str, tuple[_Kind, str, dict[str, str]]] = {}

    def add(
        self, name: str, value: float, labels: Mapping[str, str] | None = None, *, kind: _Kind = "gauge", about: str
    ) -> None:
        """One more sample, unless it is there already."""
        told_kind, _, samples = self._families.setdefault(name, (kind, about, {}))
        if told_kind == kind:
            pairs = ",".join(f'{key}="{_escaped(text)}"' for key, text in (labels or {}).items())
            samples.setdefault(f"{name}{{{pairs}}}" if pairs else name, _number(value))

    def text(self) -> str:
        lines = []
        for name, (kind, about, samples) in self._families.items():
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            lines += [f"{sample} {value}" for sample, value in samples.items()]
        text = "\n".join([*lines, ""])
        return text.encode(errors="backslashreplace").decode()  # half a surrogate pair is in no file


def exposition(status: Status) -> str:
    """A page of samples, one a line."""
    page = _Page()
    for phase in get_args(Phase):
        page.add("troupe_phase", phase == status.phase, {"phase": phase}, about="1 for the phase that the run is in.")
    page.add("troupe_step", status.step, about="Learner batches completed.")
    page.add("troupe_total_steps", status.total_steps, about="Learner batches that the run will have.")
    page.add("troupe_policy_version", status.policy_version, about="Newest policy version.")
    page.add("troupe_held", len(status.held), about="Reasons why no step is begun although none is forbidden.")
    owners = Counter((group.owner, "true" if group.waiting else "false") for group in status.groups)
    page.add("troupe_groups_alive", len(status.groups), about="Groups between prompting and the end of their training.")
    for (owner, waiting), count in sorted(owners.items()):
        labels = {"owner": owner, "waiting": waiting}
        page.add("troupe_groups", count, labels, about="Groups alive, by the actor that has them.")
    oldest_s = max((group.age_s for group in status.groups), default=0.0)
    page.add("troupe_oldest_group_age_seconds", oldest_s, about="Since the oldest group alive was prompted.")
    for queue, depth in status.queues.items():
        page.add("troupe_queue_depth", depth, {"queue": queue}, about="Messages that wait in a channel.")
    for reward in status.rewards_down:
        page.add("troupe_reward_down", 1, {"reward": reward}, about="1 for each reward that is down.")
    for kind, count in sorted(status.incidents.items()):
        page.add("troupe_incidents_total", count, {"kind": kind}, kind="counter", about="Faults that did not stop it.")
    for actor, count in sorted(status.restarts.items()):
        labels = {"actor": actor}
        page.add("troupe_actor_restarts_total", count, labels, kind="counter", about="Times that a new one took over.")
    if status.restarting is not None:
        page.add("troupe_restart_attempt", status.restarting.attempt, about="The start after a failure, as it lasts.")
    for metric, value in status.metrics.items():
        _add_metric(page, metric, value)
    _add_evaluations(page, status.evaluated)
    return page.text()


def _add_metric(page: _Page, metric: str, value: float) -> None:
    if _TOLD_OTHERWISE.fullmatch(metric):
        return
    for pattern, name, label in _PATTERNS:
        if found := pattern.fullmatch(metric):
            labels = {label: found["label"]}
            page.add(name.format(rest=found["rest"]), value, labels, about=f"{label} by {label}, of the newest step.")
            return
    name = f"troupe_{_NOT_IN_A_NAME.sub('_', metric).strip('_')}"
    page.add(name, value, about=f"{_one_line(metric)} of the newest step.")


def _add_evaluations(page: _Page, evaluated: Sequence[Evaluated]) -> None:
    """The newest of each set."""
    for one in {one.name: one for one in sorted(evaluated, key=lambda one: one.version)}.values():
        page.add("troupe_evaluation_version", one.version, {"set": one.name}, about="Newest version evaluated, by set.")
        for metric, value in one.metrics.items():
            labels = {"set": one.name, "figure": metric.removeprefix(f"eval/{one.name}/")}
            page.add("troupe_evaluation", value, labels, about="Figures of the newest evaluation, by set.")


def _number(value: float) -> str:
    number = float(value)
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "+Inf" if number > 0 else "-Inf"
    return repr(number)


def _one_line(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escaped(text: str) -> str:
    return _one_line(text).replace('"', '\\"')
