"""What runs came to, in figures that can be set beside each other."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from troupe.records.compare.figures import Level, figures_of_run, level_of
from troupe.records.curves import Thinned, Thinner


def curve(rewards: Sequence[float | None], most_points: int = 1000) -> Thinned:
    thinner = Thinner(len(rewards), most_points)
    for step, reward in enumerate(rewards, 1):
        told = {} if reward is None else {"reward": reward}
        thinner.add(step, {"step_time": 2.0, "num_tokens": 100.0 * step, **told})
    return thinner.result()


def test_by_hand() -> None:
    run = curve([0.0, 0.2, 0.4, 0.6, 1.0, 0.8])
    level = Level(window=2, steps=4, reward=0.5)
    found = figures_of_run(run, level)
    assert found.first == pytest.approx(0.1)
    assert found.last == pytest.approx(0.9)
    assert found.best == pytest.approx(0.9)
    assert found.best_step == 6
    assert found.area == pytest.approx(0.3)
    assert (found.reached_step, found.reached_s, found.reached_tokens) == (4, 8.0, 400.0)


def test_what_never_was_or_is_not_known() -> None:
    level = Level(window=1, steps=2, reward=2.0)
    assert figures_of_run(curve([0.5, None]), level).reached_step is None
    assert figures_of_run(curve([]), level).last is None
    assert level_of([curve([]), curve([])]) == Level(window=1, steps=0, reward=None)


def test_the_level_is_most_of_the_way_of_the_best() -> None:
    slow, quick = curve([0.1] * 20), curve([0.1] * 10 + [1.1] * 20)
    level = level_of([slow, quick])
    assert (level.window, level.steps, level.reward) == (2, 20, 1.0)
    assert figures_of_run(quick, level).reached_step == 12
    assert figures_of_run(slow, level).reached_step is None
    assert level_of([slow, quick], 0.25).reward == 0.25


def test_a_long_run_in_few_points_comes_to_the_same() -> None:
    noise = random.Random(3)
    rewards = [step / 4000 + noise.gauss(0, 0.05) for step in range(4000)]
    level = Level(window=400, steps=4000, reward=0.5)
    exact, thinned = (figures_of_run(curve(rewards, most), level) for most in (10_000, 100))
    assert thinned.area == pytest.approx(exact.area, abs=1e-9)
    assert thinned.last == pytest.approx(exact.last, abs=0.01)
    assert thinned.reached_step == pytest.approx(exact.reached_step, abs=80)
