"""Weights by which a policy teaches itself, beside those of TRL and a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.fakes import RAGGED
from tests.support.trl import assert_close
from troupe.actors.teacher.own import OwnTeacher, first_average
from troupe.actors.teacher.settings import TeacherConfig
from troupe.policy import Base

FILE = Path(__file__).parents[2] / "data" / "trl" / "sdft.json"
CASES = json.loads(FILE.read_text(encoding="utf-8"))["averages"]


def teacher(settings: TeacherConfig) -> OwnTeacher:
    return OwnTeacher(settings, RAGGED, Base(), 1.0, ())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_moving_average_is_that_of_trl(case: dict[str, Any]) -> None:
    settings = TeacherConfig(model_kind="ema", update_rate=case["rate"], sync_steps=case["every"])
    average = first_average(settings, {"w": mx.array(case["policy"][0])})
    for update, (weights, expected) in enumerate(zip(case["policy"][1:], case["teacher"], strict=True)):
        average = teacher(settings).followed(average, {"w": mx.array(weights)}, update, update + 1)
        assert average is not None
        assert_close(average["w"].tolist(), expected, 1e-6)


def test_small_steps_of_a_bfloat16_policy_are_not_lost() -> None:
    settings = TeacherConfig(model_kind="ema", update_rate=0.001)
    average = first_average(settings, {"w": mx.ones(3, dtype=mx.bfloat16)})
    expected = np.ones(3, dtype=np.float32)
    for update in range(200):
        average = teacher(settings).followed(average, {"w": mx.full(3, 2.0, dtype=mx.bfloat16)}, update, update + 1)
        expected = np.float32(0.001) * np.float32(2.0) + np.float32(0.999) * expected
    assert average is not None
    np.testing.assert_allclose(np.array(average["w"]), expected, rtol=1e-5)
    assert expected[0] > 1.15


def test_several_updates_of_a_step_count_each() -> None:
    settings = TeacherConfig(model_kind="ema", update_rate=0.5, sync_steps=2)
    moved = teacher(settings).followed({"w": mx.array([1.0])}, {"w": mx.array([3.0])}, 3, 8)
    assert moved is not None
    assert moved["w"].tolist() == [2.75]  # at the updates 4, 6 and 8
    still = teacher(settings).followed(moved, {"w": mx.array([9.0])}, 8, 9)
    assert still is moved


def test_other_kinds_stay_or_have_no_average() -> None:
    weights = {"w": mx.array([1.0])}
    assert first_average(TeacherConfig(model_kind="live"), weights) is None
    assert first_average(TeacherConfig(), weights) is None
    base = TeacherConfig(model_kind="base")
    assert first_average(base, weights) is weights
    assert teacher(base).followed(weights, {"w": mx.array([2.0])}, 0, 9) is weights
