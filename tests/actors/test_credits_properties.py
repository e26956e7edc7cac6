"""Credits, in virtual time: live groups never exceed them, and no delays, bounds or failures make a run stand still.

`tests.support.chaos.drive` checks both at every moment, and that each group closes once; a deadlock is told as such.
Here hypothesis looks for the plan that breaks it, and shrinks it.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.chaos import assert_timing_changes_nothing, drive
from tests.support.plans import REQUESTS, Plan

pytestmark = pytest.mark.no_cover  # other tests cover what these shake; the tracer would triple their time

SHARES = st.sampled_from([0.0, 0.1, 0.5, 1.0])
WHOLE_RUNS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

calm_plans = st.builds(
    Plan,
    seed=st.integers(0, 999),
    prompts=st.integers(1, 4),
    generations=st.integers(2, 4),
    steps=st.integers(1, 5),
    rows=st.integers(1, 9),
    max_staleness=st.integers(0, 3),
    mode=st.sampled_from(["pinned", "free"]),
    on_stale=st.sampled_from(["drop", "requeue", "correct"]),
    attempts=st.integers(0, 2),
    checkpoint_every=st.integers(1, 5),
    overlap=st.booleans(),
    concurrency=st.sampled_from([1, 2, 64]),
    retries=st.integers(0, 1),
    levels=st.sampled_from([1, 2, 7]),
    with_actor=st.booleans(),
    bad_rewards=SHARES,
    bad_updates=SHARES,
)
requests = st.lists(st.tuples(st.floats(0, 60), st.sampled_from([*REQUESTS])), max_size=4).map(sorted).map(tuple)


@st.composite
def plans(draw: st.DrawFn, *, failures: bool) -> Plan:
    """Any delays and bounds; with failures also faults of actors, disk and sinks, and requests at any time."""
    plan = draw(calm_plans)
    changes = {
        "delay_s": draw(st.sampled_from([0.0, 0.01, 1.0, 100.0])),
        "bounds": draw(st.sampled_from(["asked", "wide", "narrow"])),
    }
    if failures:
        changes |= {
            "faults": draw(st.sampled_from([0.0, 0.05, 0.5])),
            "bad_disk": draw(SHARES),
            "bad_sinks": draw(SHARES),
            "hiccups": draw(SHARES) if plan.retries else 0.0,
            "requests": draw(requests),
        }
    return msgspec.structs.replace(plan, **changes)


@WHOLE_RUNS
@given(plan=plans(failures=False))
def test_live_groups_never_exceed_the_credits(plan: Plan) -> None:
    report = drive(plan)
    limit = (plan.max_staleness + 1) * plan.prompts
    assert report.ledger.most_alive <= limit
    assert report.ledger.most_alive >= min(limit, plan.steps * plan.prompts), "every credit is used"
    assert report.steps == plan.steps


@WHOLE_RUNS
@given(plan=plans(failures=True))
def test_nothing_makes_a_run_stand_still(plan: Plan) -> None:
    report = drive(plan)
    if plan.is_reproducible:
        assert_timing_changes_nothing(plan, report)
