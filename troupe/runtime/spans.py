"""Where time went: spans of one step → what share of it each actor worked, and which work hid behind the device.

Intervals are pairs (start, end) of seconds on one clock; a list of them is *plain* when it is sorted and no two touch.
Pure arithmetic but for `StepTimes`, which collects the spans of the step in hand. It knows the names of the actors that
compute on the device and of those whose work is meant to hide behind them; it reads no clock.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from troupe.messages import Span

Interval: TypeAlias = tuple[float, float]

ON_DEVICE = ("generator", "learner", "teacher")
"""Actors whose work is the device's."""
BEHIND_DEVICE = {"reward": "scorer", "logging": "metrics", "checkpoint": "checkpointer", "environment": "environment"}
"""Work that should hide behind the device's → the actor that does it."""
_NOT_IN_EVERY_RUN = "environment"
_EVALUATOR = "evaluator"
"""Who answers rows that are not trained on."""
_EVALUATING = {(_EVALUATOR, "generate"), ("generator", "evaluate")}
"""Actor and name of spans in which rows are decoded that are not trained on: here, or by who generates."""


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """All moments that are in any of the intervals, as a plain list; empty intervals vanish."""
    plain: list[Interval] = []
    last_start = last_end = 0.0
    for start, end in sorted(intervals):
        if start >= end:
            continue
        if plain and start <= last_end:
            if end > last_end:
                plain[-1] = (last_start, end)
                last_end = end
        else:
            plain.append((start, end))
            last_start, last_end = start, end
    return plain


def intersection(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The moments that are in both of two plain lists."""
    common: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            common.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """The moments that are in the plain list `one` and not in the plain list `other`."""
    rest: list[Interval] = []
    j = 0
    for start, end in one:
        while j < len(other) and other[j][1] <= start:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            if start < other[k][0]:
                rest.append((start, other[k][0]))
            start = other[k][1]
            k += 1
        if start < end:
            rest.append((start, end))
    return rest


def length(plain: Iterable[Interval]) -> float:
    """Seconds in a plain list."""
    return math.fsum(end - start for start, end in plain)


class Times:
    """What one actor did in a while: `work` and `wait` as plain lists.

    Who waits in the midst of work is not at work meanwhile; what happens in other lanes counts by itself.
    An actor waits while any lane of it waits and none works.
    """

    def __init__(self, spans: Iterable[Span], start_s: float, end_s: float) -> None:
        work: defaultdict[object, list[Interval]] = defaultdict(list)
        wait: defaultdict[object, list[Interval]] = defaultdict(list)
        for span in spans:
            lanes = work if span.kind == "work" else wait
            lanes[span.member, span.process, span.lane].append((max(span.start_s, start_s), min(span.end_s, end_s)))
        working: list[Interval] = []
        for lane, intervals in work.items():
            in_lane = union(intervals)
            working += difference(in_lane, union(wait[lane])) if lane in wait else in_lane
        self.work = union(working)
        self.wait = difference(union(interval for intervals in wait.values() for interval in intervals), self.work)


class StepTimes:
    """Collects spans; at the end of each step it says where the time since the last one went, and forgets them."""

    def __init__(self, start_s: float) -> None:
        self._start_s = start_s
        self._spans: list[Span] = []
        self._actors: set[str] = set()

    def add(self, span: Span) -> None:
        """Take a span that has ended; one that ends in another step counts there as far as it was not told before."""
        self._spans.append(span)

    def end_step(self, now_s: float, doing: Iterable[Span] = ()) -> dict[str, float]:
        """Metrics of the time since the end of the step before; `doing` is what has begun and not ended by now.

        `time/ACTOR/busy` and `/idle`: share of the time in which it worked, and in which it only waited; what is left
        of 1 is its own machinery. `time/device_s`: seconds of device work. `time/reward/hidden_s` and `/exposed_s`:
        seconds in which rewards were computed under device work, and without any; likewise `logging`,
        `checkpoint` and, where the policy acts, `environment`. In runs that evaluate, `time/evaluation/hidden_s` and
        `/exposed_s`: seconds in which rows of sets were decoded under the device work of training, and without any.
        """
        start_s, self._start_s = self._start_s, now_s
        by_actor: defaultdict[str, list[Span]] = defaultdict(list)
        for span in [*self._spans, *doing]:
            by_actor[span.actor].append(span)
        self._spans = []
        self._actors.update(by_actor)
        window_s = now_s - start_s
        if window_s <= 0.0:
            return {}
        times = {actor: Times(by_actor[actor], start_s, now_s) for actor in sorted(self._actors)}
        figures = {}
        for actor, its in times.items():
            figures[f"time/{actor}/busy"] = length(its.work) / window_s
            figures[f"time/{actor}/idle"] = length(its.wait) / window_s
        training, evaluating = _device_work(by_actor, start_s, now_s)
        device = union([*training, *evaluating])
        if _EVALUATOR in times:
            figures["time/evaluation/hidden_s"] = length(intersection(evaluating, training))
            figures["time/evaluation/exposed_s"] = length(difference(evaluating, training))
        figures["time/device_s"] = length(device)
        for name, actor in BEHIND_DEVICE.items():
            if actor == _NOT_IN_EVERY_RUN and actor not in times:
                continue
            work = times[actor].work if actor in times else []
            figures[f"time/{name}/hidden_s"] = length(intersection(work, device))
            figures[f"time/{name}/exposed_s"] = length(difference(work, device))
        return figures


def _device_work(
    by_actor: Mapping[str, Sequence[Span]], start_s: float, end_s: float
) -> tuple[list[Interval], list[Interval]]:
    """The device's work for training, and that for rows that are not trained on."""

    def work(actors: Iterable[str], *, of_rows: bool) -> list[Interval]:
        chosen = [
            [span for span in by_actor.get(actor, ()) if ((actor, span.name) in _EVALUATING) is of_rows]
            for actor in actors
        ]
        return union(moment for spans in chosen for moment in Times(spans, start_s, end_s).work)

    return work(ON_DEVICE, of_rows=False), work((*ON_DEVICE, _EVALUATOR), of_rows=True)
