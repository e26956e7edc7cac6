"""What is told of a curriculum before a run begins."""

from __future__ import annotations

import pytest

from troupe.dataset import CurriculumConfig
from troupe.run.curriculum import curriculum_notices


@pytest.mark.parametrize(
    ("settings", "prompts", "says"),
    [
        (CurriculumConfig(), 10, ""),
        (CurriculumConfig(easy_weight=0.5), 10, "does nothing as long as curriculum.enabled is false"),
        (CurriculumConfig(enabled=True), 149, "the run draws 149 prompts of 100 rows"),
        (CurriculumConfig(enabled=True), 150, ""),
    ],
)
def test_what_the_user_should_know(settings: CurriculumConfig, prompts: int, says: str) -> None:
    told = curriculum_notices(settings, rows=100, prompts=prompts)
    assert [says in notice for notice in told] == ([True] if says else [])
