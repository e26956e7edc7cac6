"""The rows of steps follow from what came of the steps before, never from when they are asked for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chaos import assert_timing_changes_nothing, drive
from tests.support.plans import draw_plan
from tests.support.resumes import drive as drive_in_starts
from troupe.actors.curriculum import Curriculum
from troupe.dataset import CurriculumConfig, PromptDataset
from troupe.messages import CurriculumState, Slot

P, ROWS = 2, 9
CONFIG = CurriculumConfig(enabled=True, window=2, retire_at=0.75, retire_after=1)


def curriculum(*, ahead: int | None = 1, attempts: int = 2, rows: int = ROWS, **changes: Any) -> Curriculum:
    dataset = PromptDataset.from_rows([{"prompt": f"p{i}"} for i in range(rows)])
    config = msgspec.structs.replace(CONFIG, **changes)
    return Curriculum(config, dataset, batch_size=P, seed=3, shuffle=True, ahead=ahead, attempts=attempts)


def rows_of(of: Curriculum, step: int) -> list[int]:
    return [of.row(Slot(step=step, place=place, attempt=attempt)) for attempt in range(3) for place in range(P)]


def learn(of: Curriculum, version: int, rates: dict[int, float]) -> dict[str, float]:
    """A step, whose second group was replaced once."""
    first, second, _, instead, *_ = rows_of(of, version - 1)
    shown = (first, second, instead)
    return of.learned(version, [(row, rates.get(row, 0.5)) for row in shown], oldest=version)


@given(st.integers(0, 3), st.dictionaries(st.integers(0, ROWS - 1), st.sampled_from([0.0, 0.5, 1.0])), st.data())
def test_rows_do_not_depend_on_when_they_are_asked_for(
    ahead: int, rates: dict[int, float], data: st.DataObject
) -> None:
    at_once, late = curriculum(ahead=ahead), curriculum(ahead=ahead)
    expected = {step: rows_of(at_once, step) for step in range(ahead + 1)}
    asked: set[int] = set()
    for version in range(1, 12):
        learn(at_once, version, rates)
        expected[version + ahead] = rows_of(at_once, version + ahead)
        for step in range(version - 1, version + ahead):
            if step not in asked and data.draw(st.booleans()):
                assert rows_of(late, step) == expected[step]
                asked.add(step)
        assert rows_of(late, version - 1) == expected[version - 1], "the learner has it by then"
        learn(late, version, rates)


@pytest.mark.parametrize("ahead", [0, 2, None])
def test_what_a_checkpoint_keeps_leads_to_the_same_rows(ahead: int | None) -> None:
    rates = {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 1.0}
    straight, before = curriculum(ahead=ahead), curriculum(ahead=ahead)
    for version in range(1, 6):
        learn(straight, version, rates)
        learn(before, version, rates)
    kept = msgspec.msgpack.encode(before.state())
    resumed = curriculum(ahead=ahead)
    resumed.restore(msgspec.msgpack.decode(kept, type=CurriculumState), 5)
    for version in range(6, 16):
        assert rows_of(resumed, version - 1) == rows_of(straight, version - 1)
        assert learn(resumed, version, rates) == learn(straight, version, rates)


def test_a_run_that_had_no_curriculum_goes_on_with_rows_as_if_never_seen() -> None:
    resumed = curriculum(ahead=1)
    resumed.restore(CurriculumState(), 7)
    assert sorted({*rows_of(resumed, 7)[:P], *rows_of(resumed, 8)[:P]}) == sorted(
        {*rows_of(curriculum(), 0)[:P], *rows_of(curriculum(), 1)[:P]}
    )


def test_metrics_say_where_rows_are_and_where_those_of_a_step_came_from() -> None:
    of = curriculum(rows=4, ahead=0, attempts=0)
    learn_all = {row: 1.0 if row < 2 else 0.0 for row in range(4)}
    for version in (1, 2):
        rows = [of.row(Slot(step=version - 1, place=place)) for place in range(P)]
        metrics = of.learned(version, [(row, learn_all[row]) for row in rows], version)
    assert {name: value for name, value in metrics.items() if value} == {
        "curriculum/retired": 2.0,
        "curriculum/hard": 2.0,
        "curriculum/share_normal": 1.0,
    }
    rows = [of.row(Slot(step=2, place=place)) for place in range(P)]
    assert of.learned(3, [(row, 0.0) for row in rows], 3)["curriculum/share_hard"] == 1.0


def test_a_run_may_end_when_all_is_mastered_and_what_is_under_way_is_finished() -> None:
    of = curriculum(rows=2, ahead=1, attempts=0, stop_when_retired=True)
    assert of.end is None
    of.learned(1, [(0, 1.0), (1, 1.0)], 1)
    assert of.is_retired
    assert int(of.end or 0) == 2, "step 1 was chosen before"
    assert "ends after step 2" in of.news()
    assert (of.why_over(1), "ended with step 2" in of.why_over(2)) == ("", True)
    assert not of.news(), "once is enough"
    again = curriculum(rows=2, ahead=1, attempts=0, stop_when_retired=True)
    again.restore(of.state(), 1)
    assert again.end == 2
    going_on = curriculum(rows=2, ahead=1, attempts=0)
    going_on.restore(of.state(), 1)
    assert going_on.end is None
    assert len(rows_of(going_on, 2)) == 3 * P


@pytest.mark.parametrize("seed", [17, 18])
def test_a_run_that_is_paused_again_and_again_has_the_same_rows(seed: int) -> None:
    changes: dict[str, Any] = {"mode": "pinned", "outage": None, "watchdog_s": 0.0, "deadly": 0.0, "bad_rewards": 0.0}
    requests = ((4.0, "pause"), (150.0, "step"), (300.0, "step"), (450.0, "resume"))
    plan = msgspec.structs.replace(
        draw_plan(seed), **changes, prompts=2, rows=9, max_staleness=2, steps=12, levels=2, delay_s=1.0,
        requests=requests, curriculum=True,
    )  # fmt: skip
    assert_timing_changes_nothing(plan, drive(plan))


def test_runs_that_are_cut_and_go_on_have_the_same_rows() -> None:
    for seed in (3, 6, 9, 12):
        drive_in_starts(seed, curriculum=True)
