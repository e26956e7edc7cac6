"""The walk through one step: its figures are those of the functions that it shows."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest

from tests.examples.running import EXAMPLES, imported


@pytest.fixture(scope="module")
def walk() -> object:
    return imported("one_step.py")


def test_every_cell_says_what_it_shows() -> None:
    cells = re.findall(r"^# %% (\d+)\. .+$", (EXAMPLES / "one_step.py").read_text(), re.MULTILINE)
    assert [int(number) for number in cells] == list(range(1, len(cells) + 1))
    assert len(cells) == 10


def test_rewards_are_of_the_right_sums_and_advantages_center_each_group(walk: object) -> None:
    texts, rewards, answers = walk.rollouts.texts, walk.rewards, walk.answers  # type: ignore[attr-defined]
    assert rewards == [float(text == answer) for text, answer in zip(texts, answers, strict=True)]
    assert 0 < sum(rewards) < len(rewards)
    advantages = walk.advantages.reshape(4, 8)  # type: ignore[attr-defined]
    assert float(mx.max(mx.abs(mx.sum(advantages, axis=1)))) < 1e-4


def test_the_step_goes_the_right_way_and_is_that_of_the_learner(walk: object) -> None:
    told, norm, loss = walk.told, float(walk.norm), float(walk.loss)  # type: ignore[attr-defined]
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert told["loss"] == pytest.approx(loss, abs=1e-4)
    assert walk.gain > 0  # type: ignore[attr-defined]
