"""Interval arithmetic against counting unit cells; metrics of a step against hand-worked ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from troupe.messages import Span
from troupe.runtime.spans import Interval, StepTimes, Times, difference, intersection, length, union

ENDS = st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda ends: (float(min(ends)), float(max(ends))))
LISTS = st.lists(ENDS, max_size=8)


def cells(intervals: list[Interval]) -> set[int]:
    """The unit cells that intervals with whole ends cover."""
    return {cell for start, end in intervals for cell in range(int(start), int(end))}


def assert_plain(intervals: list[Interval]) -> None:
    ends = [moment for interval in intervals for moment in interval]
    assert ends == sorted(set(ends))


@given(LISTS, LISTS)
def test_intervals_are_sets_of_moments(one: list[Interval], other: list[Interval]) -> None:
    a, b = union(one), union(other)
    assert_plain(a)
    assert cells(a) == cells(one)
    assert length(a) == len(cells(one))
    common, rest = intersection(a, b), difference(a, b)
    assert cells(common) == cells(one) & cells(other)
    assert cells(rest) == cells(one) - cells(other)
    assert_plain(union(common))
    assert_plain(union(rest))
    assert length(common) + length(rest) == length(a)


def span(actor: str, name: str, start_s: float, end_s: float, **fields: Any) -> Span:
    return Span(actor=actor, name=name, start_s=start_s, end_s=end_s, **fields)


def test_who_waits_in_the_midst_of_work_is_not_at_work_unless_another_lane_is() -> None:
    spans = [
        span("a", "score", 1.0, 9.0, lane=0),
        span("a", "room", 3.0, 6.0, lane=0, kind="wait"),
        span("a", "score", 5.0, 7.0, lane=1),
        span("a", "idle", 8.0, 20.0, lane=2, kind="wait"),
    ]
    times = Times(spans, 2.0, 12.0)
    assert times.work == [(2.0, 3.0), (5.0, 9.0)]
    assert times.wait == [(3.0, 5.0), (9.0, 12.0)]


def test_lanes_of_different_processes_are_different() -> None:
    spans = [span("a", "decode", 0.0, 4.0, process=1), span("a", "idle", 1.0, 3.0, process=2, kind="wait")]
    times = Times(spans, 0.0, 4.0)
    assert (times.work, times.wait) == ([(0.0, 4.0)], [])


def test_a_step_says_what_hid_behind_the_device() -> None:
    step = StepTimes(10.0)
    for message in (
        span("generator", "decode", 9.0, 14.0),  # began in the step before
        span("generator", "idle", 14.0, 18.0, kind="wait"),
        span("scorer", "score", 12.0, 16.0, gid=1, lane=1),
        span("scorer", "score", 13.0, 15.5, gid=2, lane=2),
        span("learner", "idle", 10.0, 16.0, kind="wait"),
        span("learner", "learn", 16.0, 19.0),
        span("metrics", "write jsonl", 15.0, 17.0),
    ):
        step.add(message)
    figures = step.end_step(20.0, [span("checkpointer", "checkpoint", 18.0, 20.0), span("scorer", "idle", 16.0, 20.0)])
    expected = {
        "time/generator/busy": 0.4,
        "time/generator/idle": 0.4,
        "time/scorer/busy": 0.8,  # the last span is of work, for it was not said to be a wait
        "time/scorer/idle": 0.0,
        "time/learner/busy": 0.3,
        "time/learner/idle": 0.6,
        "time/metrics/busy": 0.2,
        "time/metrics/idle": 0.0,
        "time/checkpointer/busy": 0.2,
        "time/checkpointer/idle": 0.0,
        "time/device_s": 7.0,  # 10–14 and 16–19
        "time/reward/hidden_s": 5.0,  # 12–14 and 16–19
        "time/reward/exposed_s": 3.0,  # 14–16 and 19–20
        "time/logging/hidden_s": 1.0,
        "time/logging/exposed_s": 1.0,
        "time/checkpoint/hidden_s": 1.0,
        "time/checkpoint/exposed_s": 1.0,
    }
    assert figures == pytest.approx(expected)


def test_environments_hide_behind_the_device_in_runs_that_have_any() -> None:
    step = StepTimes(0.0)
    step.add(span("generator", "decode", 0.0, 4.0))
    assert "time/environment/hidden_s" not in step.end_step(4.0)
    step.add(span("generator", "decode", 4.0, 6.0))
    step.add(span("environment", "search", 5.0, 7.0, lane=1))
    step.add(span("environment", "search", 5.0, 9.0, lane=2))
    figures = step.end_step(10.0)
    assert (figures["time/environment/hidden_s"], figures["time/environment/exposed_s"]) == (1.0, 3.0)
    assert step.end_step(12.0)["time/environment/exposed_s"] == 0.0  # who was seen once stays


def test_evaluating_is_device_work_that_is_told_by_itself() -> None:
    step = StepTimes(0.0)
    step.add(span("learner", "learn", 0.0, 4.0))
    assert "time/evaluation/hidden_s" not in step.end_step(4.0)
    step.add(span("learner", "learn", 4.0, 6.0))
    step.add(span("evaluator", "evaluate sums", 4.0, 9.5))
    step.add(span("evaluator", "generate", 5.0, 9.0))
    step.add(span("scorer", "score", 8.0, 10.0))
    figures = step.end_step(10.0)
    assert (figures["time/evaluation/hidden_s"], figures["time/evaluation/exposed_s"]) == (1.0, 3.0)
    assert figures["time/device_s"] == 5.0
    assert (figures["time/reward/hidden_s"], figures["time/reward/exposed_s"]) == (1.0, 1.0)
    assert step.end_step(12.0)["time/evaluation/exposed_s"] == 0.0
    step.add(
        span("generator", "generate", 12.0, 13.0, lane=1)
    )  # who generates decodes rows, too, where it has processes
    step.add(span("generator", "evaluate", 12.5, 15.0, lane=2))
    figures = step.end_step(16.0)
    assert (figures["time/evaluation/hidden_s"], figures["time/evaluation/exposed_s"]) == (0.5, 2.0)
    assert figures["time/device_s"] == 3.0


def test_a_span_over_two_steps_counts_in_both_as_far_as_it_goes() -> None:
    step = StepTimes(0.0)
    first = step.end_step(4.0, [span("generator", "decode", 3.0, 4.0)])
    step.add(span("generator", "decode", 3.0, 6.0))
    second = step.end_step(8.0)
    third = step.end_step(10.0)
    assert [figures["time/device_s"] for figures in (first, second, third)] == [1.0, 2.0, 0.0]
    assert third["time/generator/busy"] == 0.0  # who was seen once stays in the table
    assert step.end_step(10.0) == {}


ACTORS = st.sampled_from(["generator", "learner", "scorer", "metrics", "checkpointer"])


@given(
    st.lists(
        st.builds(lambda a, i, k, l: (a, i, k, l), ACTORS, ENDS, st.sampled_from(["work", "wait"]), st.integers(0, 2))
    )
)
def test_shares_are_shares_and_hidden_and_exposed_are_all_of_the_work(
    told: list[tuple[str, Interval, Any, int]],
) -> None:
    step = StepTimes(5.0)
    for actor, (start, end), kind, lane in told:
        step.add(span(actor, "x", start, end, kind=kind, lane=lane))
    figures = step.end_step(25.0)
    for actor in {actor for actor, *_ in told}:
        busy, idle = figures[f"time/{actor}/busy"], figures[f"time/{actor}/idle"]
        assert 0.0 <= busy <= 1.0
        assert 0.0 <= idle <= 1.0
        assert busy + idle <= 1.0 + 1e-12
    for name, actor in (("reward", "scorer"), ("logging", "metrics"), ("checkpoint", "checkpointer")):
        both = figures[f"time/{name}/hidden_s"] + figures[f"time/{name}/exposed_s"]
        assert both == pytest.approx(20.0 * figures.get(f"time/{actor}/busy", 0.0))
