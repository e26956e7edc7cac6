from __future__ import annotations

from collections.abc import Mapping

import msgspec

from troupe.messages import Evaluated
from troupe.records.held_out import Point, Standings, is_share, most_telling


def evaluated(version: int, name: str, metrics: Mapping[str, float]) -> Evaluated:
    return Evaluated(version=version, name=name, metrics=metrics, rows=())


def test_a_set_is_told_by_its_accuracy_or_by_its_mean_over_most_samples() -> None:
    figures = {"avg@1": 0.1, "avg@8": 0.2, "avg@8_se": 0.0, "pass@8": 0.9, "length": 9.0}
    assert most_telling(figures) == "avg@8"
    assert most_telling(figures | {"accuracy": 0.5}) == "accuracy"
    assert most_telling({"length": 9.0, "length_se": 1.0}) == "length"
    assert most_telling({}) is None


def test_first_newest_and_best_of_each_set() -> None:
    held_out = Standings()
    for version, accuracy in ((0, 0.34), (50, 0.98), (100, 0.975)):
        held_out.add(evaluated(version, "sums", {"eval/sums/accuracy": accuracy, "eval/sums/accuracy_se": 0.01}))
        held_out.add(evaluated(version, "sums-2", {"eval/sums-2/avg@4": -accuracy}))
    held_out.add(evaluated(100, "none", {}))
    assert {name: str(standing) for name, standing in held_out.sets.items()} == {
        "sums": "accuracy 34.0% → 97.5% ± 1.0% at step 100, best 98.0% at step 50",
        "sums-2": "avg@4 -0.340 → -0.975 at step 100, best -0.340 at step 0",
    }


def test_a_version_that_is_told_of_twice_counts_once() -> None:
    held_out = Standings()
    for accuracy in (0.5, 0.25):
        held_out.add(evaluated(10, "sums", {"eval/sums/accuracy": accuracy}))
    assert str(held_out.sets["sums"]) == "accuracy 25.0% at step 10"


def test_a_version_without_a_score_is_a_gap_and_no_other_figure() -> None:
    """A judge that was down before the first step, and once more amid the run."""
    held_out = Standings()
    scored = {"eval/sums/avg@4": 0.5, "eval/sums/avg@4_se": 0.125}
    for version, scores in ((0, {}), (10, scored), (20, {}), (30, {"eval/sums/avg@4": 0.75})):
        held_out.add(evaluated(version, "sums", {**scores, "eval/sums/length": 9.0}))
    told = held_out.sets["sums"]
    assert told.headline == "avg@4"
    assert told.figures["avg@4"] == (
        Point(version=10, value=0.5, se=0.125),
        Point(version=30, value=0.75, se=None),
    )


def test_a_reward_that_is_called_like_the_accuracy_is_not_it() -> None:
    held_out = Standings()
    held_out.add(evaluated(10, "sums", {"eval/sums/accuracy": 0.5, "eval/sums/accuracy_reward": 1.25}))
    assert str(held_out.sets["sums"]) == "accuracy 50.0% at step 10"
    assert is_share("accuracy")
    assert not is_share("accuracy_reward")


def test_figures_of_other_conditions_are_not_compared() -> None:
    """A set whose rows were changed under its name; results of before conditions were kept go on with any."""
    held_out = Standings()
    told = ((0, 0.9, None), (10, 0.8, "400 (sum a)"), (20, 0.25, "200 (sum b)"), (30, 0.5, "200 (sum b)"))
    for version, accuracy, rows in told:
        one = evaluated(version, "sums", {"eval/sums/accuracy": accuracy})
        conditions = {} if rows is None else {"rows": rows, "num_samples": "1"}
        held_out.add(msgspec.structs.replace(one, conditions=conditions))
    of_set = held_out.sets["sums"]
    assert of_set.changes == {20: ("rows 400 (sum a) → 200 (sum b)",)}
    assert [[point.version for point in part] for part in of_set.stretches("accuracy")] == [[0, 10], [20, 30]]
    line = "accuracy 25.0% → 50.0% at step 30, its best (other conditions before step 20)"
    assert (str(of_set), of_set.short) == (line, "accuracy 50.0% (from 25.0%)")
