"""Environments work while the device does: what a step takes, in virtual time, where they take as long as it."""

from __future__ import annotations

import pytest

from tests.support.timed import Work, step_s, waits_s

pytestmark = pytest.mark.no_cover

WORKS = [
    pytest.param(Work(turn_s=(3.0,), answer_s=(6.0,), learn_s=3.0), id="one turn"),
    pytest.param(Work(turn_s=(1.0, 1.0), answer_s=(4.0, 0.0), learn_s=2.0), id="one tool"),
    pytest.param(Work(turn_s=(1.0, 1.0, 1.0), answer_s=(3.0, 3.0, 3.0), learn_s=6.0), id="learning takes most"),
    pytest.param(Work(turn_s=(2.0, 2.0, 2.0), answer_s=(3.5, 3.5, 0.0), learn_s=1.0), id="sampling takes most"),
    pytest.param(Work(turn_s=(1.0,) * 10, answer_s=(1.5,) * 10, learn_s=5.0), id="ten turns", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("work", WORKS)
def test_a_step_behind_hides_environments_that_take_as_long_as_the_device(work: Work) -> None:
    assert work.tools_s == work.device_s
    assert step_s(work, max_staleness=0) == pytest.approx(work.device_s + work.tools_s, rel=0.01)
    # two steps are under way, and each lasts as long as both
    assert (work.device_s + work.tools_s) / 2 <= step_s(work, max_staleness=1) * 1.001 <= 1.15 * work.device_s


@pytest.mark.parametrize("work", WORKS[2:4])
def test_on_one_device_two_steps_get_in_each_others_way_and_three_fill_it(work: Work) -> None:
    shared = work.on_one_device()
    assert work.device_s <= step_s(shared, max_staleness=1) * 1.001 <= 1.4 * work.device_s
    assert work.device_s <= step_s(shared, max_staleness=2) * 1.001 <= 1.15 * work.device_s


@pytest.mark.parametrize("work", WORKS[1:4:2])
def test_the_free_schedule_hides_them_too(work: Work) -> None:
    assert step_s(work, mode="free", max_staleness=1) <= 1.15 * work.device_s


def test_the_free_schedule_gives_the_device_to_who_waits_when_the_turns_under_way_end() -> None:
    out_of_step = Work(turn_s=(1.0,) * 4, answer_s=(0.25,) * 4, learn_s=0.1, late_s=1.0)
    assert max(waits_s(out_of_step, mode="free", max_staleness=4)) <= 1.01
