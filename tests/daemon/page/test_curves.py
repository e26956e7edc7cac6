"""Curves: what is kept of a step, how many points become one, what a resume makes again."""

from __future__ import annotations

import math
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from troupe.daemon.page.curves import Curves, figures, read_curves


def test_the_figures_that_are_drawn() -> None:
    metrics = {
        "reward": 0.123456789,
        "loss": math.nan,
        "kl": math.inf,
        "rewards/r/mean": 1,
        "rewards/r/std": 2.0,
        "x": 3,
    }
    assert figures(metrics) == {"reward": 0.123457, "rewards/r/mean": 1.0}
    many = {f"rewards/r{number}/mean": 0.0 for number in range(20)}
    assert len(figures(many)) == 8
    assert figures({"reward": None, "loss": 10**400, "kl": True}) == {"kl": 1.0}


def test_steps_in_order() -> None:
    curves = Curves()
    curves.add(1, {"reward": 0.5})
    curves.add(2, {"reward": 1.0, "loss": 0.25})
    curves.add(3, {"loss": 0.5})
    assert curves.table() == {"step": [1, 2, 3], "reward": [0.5, 1.0, None], "loss": [None, 0.25, 0.5]}


def test_a_step_that_is_made_again_takes_the_place_of_the_first() -> None:
    curves = Curves()
    for step in range(1, 6):
        curves.add(step, {"reward": float(step)})
    curves.add(3, {"reward": 30.0})
    assert curves.table() == {"step": [1, 2, 3], "reward": [1.0, 2.0, 30.0]}
    curves.cut(1)
    assert curves.table() == {"step": [1], "reward": [1.0]}
    curves.cut(0)
    assert curves.table() == {"step": [], "reward": []}


def test_neighbours_become_their_mean() -> None:
    curves = Curves(most=4)
    for step, reward in enumerate([1.0, 3.0, math.nan, 7.0, 9.0], 1):
        curves.add(step, {} if math.isnan(reward) else {"reward": reward})
    assert curves.table() == {"step": [2, 4, 5], "reward": [2.0, 7.0, 9.0]}
    curves.add(6, {"reward": 1.0})
    assert curves.table() == {"step": [2, 4, 6], "reward": [2.0, 7.0, 5.0]}
    curves.add(7, {"reward": 1.0})
    curves.add(8, {"reward": 1.0})
    curves.add(9, {"reward": 1.0})
    assert curves.table()["step"] == [4, 8, 9]
    assert curves.table()["reward"][1:] == [3.0, 1.0]


@given(st.integers(2, 30), st.integers(1, 300))
def test_never_more_than_its_bound_and_the_newest_is_there(most: int, steps: int) -> None:
    curves = Curves(most)
    for step in range(1, steps + 1):
        curves.add(step, {"reward": float(step)})
        assert len(curves) <= most
    table = curves.table()
    assert table["step"][-1] == steps
    assert table["step"] == sorted(set(table["step"]))
    assert all(value <= step for step, value in zip(table["step"], table["reward"], strict=True))


def test_a_file_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert len(read_curves(path)) == 0
    path.write_bytes(
        b'{"step":1,"version":1,"reward":0.5,"x":"text"}\nnot json\n\xff\n{"step":"two"}\n{"step":-4}\n[1]\n'
        b'{"step":2,"reward":null,"loss":0.1}\n{"step":99999999999999999999999,"reward":1}\n{"step":3,"rew'
    )
    assert read_curves(path).table() == {"step": [1, 2], "reward": [0.5, None], "loss": [None, 0.1]}
    assert len(read_curves(tmp_path)) == 0, "a folder"
