"""Runs that are cut at any moment and go on, several times in a row: no group is lost or doubled, and what a pinned run
learns is the same."""

from __future__ import annotations

import pytest

from tests.support.resumes import drive

pytestmark = pytest.mark.no_cover  # other tests cover what these shake

BLOCK = 50


@pytest.mark.parametrize(
    "first", [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(1000, 1250, BLOCK))]
)
def test_over_all_starts_every_group_ends_once(first: int) -> None:
    for seed in range(first, first + (BLOCK if first else 15)):
        drive(seed)


def test_a_step_that_was_whole_when_its_run_was_stopped() -> None:
    drive(1068)
