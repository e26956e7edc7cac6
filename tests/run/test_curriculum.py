"""What is told of a curriculum before a run begins."""

from __future__ import annotations

import pytest

from troupe.dataset import CurriculumConfig
from troupe.grpo import LearnerConfig
from troupe.run.config import RunConfig
from troupe.run.curriculum import curriculum_notices


def told_of(settings: CurriculumConfig, *rewards: str, steps: int = 90) -> list[str]:
    """With ten prompts a step of a hundred rows."""
    config = RunConfig(curriculum=settings, learner=LearnerConfig(batch_size=10))
    return curriculum_notices(config, rewards, rows=100, steps=steps)


@pytest.mark.parametrize(
    ("settings", "steps", "says"),
    [
        (CurriculumConfig(), 1, ""),
        (CurriculumConfig(easy_weight=0.5), 1, "does nothing as long as curriculum.enabled is false"),
        (CurriculumConfig(enabled=True), 14, "the run draws 140 prompts of 100 rows"),
        (CurriculumConfig(enabled=True), 15, ""),
    ],
)
def test_what_the_user_should_know(settings: CurriculumConfig, steps: int, says: str) -> None:
    told = told_of(settings, "exact_answer", steps=steps)
    assert [says in notice for notice in told] == ([True] if says else [])


def test_of_several_rewards_one_should_say_what_passes() -> None:
    (told,) = told_of(CurriculumConfig(enabled=True), "right", "form")
    assert "the weighted sum of right, form" in told
    for settings in (CurriculumConfig(enabled=True, reward="right"), CurriculumConfig(enabled=True, passes_from=2.0)):
        assert told_of(settings, "right", "form") == []
