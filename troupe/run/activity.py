"""What a run as a whole is at, or waits for, put into one line when somebody asks. It changes nothing.

While actors run it is read off their open spans; before and after, a `Progress` says it.
Times are on `time.perf_counter`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from troupe.messages import Activity, Span
from troupe.rewards import Wait
from troupe.runtime.actor import Actor

_AT_LEAST_S = 1.0
"""What has taken less is told without its time."""


class Progress:
    """What is done while no actor runs: a few fields that whoever does it sets, from any thread."""

    def __init__(self) -> None:
        self.what = ""
        """Empty: nothing."""
        self.done = self.total = 0
        """How far it is; a total of 0 is not told."""
        self.since_s = 0.0

    @contextmanager
    def at(self, what: str) -> Iterator[Progress]:
        """The body does this."""
        self.what, self.done, self.total, self.since_s = what, 0, 0, time.perf_counter()
        try:
            yield self
        finally:
            self.what = ""

    def activity(self, now_s: float) -> Activity | None:
        """In words; None where nothing is done."""
        if not self.what:
            return None
        far = f" {min(self.done, self.total):,} / {self.total:,}" if self.total else ""
        return Activity(what=self.what, detail=far + _lasting(now_s - self.since_s))


def of_actors(actors: Iterable[Actor], now_s: float, most_tokens: int) -> Activity | None:
    """What the actors are at; None where none works on a step. `most_tokens`: of a completion."""
    parts: list[str] = []
    begun_s: list[float] = []
    far = ""
    for actor in actors:
        spans = [span for span in actor.report.doing if span.kind == "work"]
        told = _of(actor.name, spans)
        if told is None or (actor.name == "checkpointer" and parts):
            continue
        parts.append(told)
        begun_s.append(min(span.start_s for span in spans))
        if told.startswith("generating") and actor.made:
            far = f": {actor.made:,} of at most {most_tokens:,} tokens"
    if not parts:
        return None
    return Activity(what=", ".join(parts), detail=far + _lasting(now_s - min(begun_s)))


def with_waits(activity: Activity | None, waits: Mapping[str, Wait]) -> Activity | None:
    """The same, and before it what it waits for."""
    if not waits:
        return activity
    told = [f"{wait.why} ({_counted(wait.tries, 'try', 'tries')}, {_time(wait.for_s)})" for wait in waits.values()]
    rest = "" if activity is None else f"; {activity.text}"
    what = f"waiting for reward {' and '.join(waits)}"
    return Activity(what=what, detail=f": {'; '.join(told)}{rest}", waiting=True)


def _of(actor: str, spans: Sequence[Span]) -> str | None:
    for span in spans:
        step = "" if span.step is None else f" step {span.step + 1:,}"
        match actor, span.name:
            case "generator", "generate":
                return f"generating{step}"
            case "generator", "start process":
                return "starting the generator"
            case "scorer", name if name.startswith("score "):
                return f"scoring{step}"
            case "learner", "learn":
                return f"learning{step}"
            case "checkpointer", _:
                return "saving" if span.step is None else f"saving step {span.step:,}"
    return None


def _lasting(seconds: float) -> str:
    return f" ({_time(seconds)})" if seconds >= _AT_LEAST_S else ""


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    return f"{minutes} min" if not hours else f"{hours} h {minutes % 60:02d} min"


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
