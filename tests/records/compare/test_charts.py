"""Curves over each other: lines, bands, axes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.records.compare.runs import evaluated, make_run, nobody
from troupe.records.compare.charts import Laid, Overlay
from troupe.records.compare.runs import RunComparison, read_runs
from troupe.records.report.charts import Chart


def compared(*folders: Path) -> tuple[RunComparison, Laid]:
    found = read_runs(folders, nobody)
    return found, Overlay(found).laid()


def chart(laid: Laid, key: str) -> Chart:
    [found] = [one for section in laid.sections for one in section.charts if one.key == key]
    return found


def test_seeds_are_a_band_and_others_lines(tmp_path: Path) -> None:
    first = make_run(tmp_path / "seed-1", [0.0, 0.4, 0.8], metrics={"kl": 0.1})
    second = make_run(tmp_path / "seed-2", [0.2, 0.2], settings={"seed": 2}, step_s=4.0)
    third = make_run(tmp_path / "other", [1.0], settings={"learner": {"lr": 1.0}})
    _, laid = compared(first, second, third)
    band, *lines = chart(laid, "reward").lines
    assert (band.name, band.run, laid.axes[band.axes].step) == ("seed-*", "seed-*", (1, 2))
    assert band.mean == pytest.approx((0.1, 0.3))
    [(low, high)] = band.bands
    assert low == pytest.approx((0.0, 0.2))
    assert high == pytest.approx((0.2, 0.4))
    assert laid.axes[band.axes].time == pytest.approx((3.0, 6.0)), "where the seeds are on average"
    assert [(line.name, line.mean) for line in lines] == [
        ("seed-1", (0.0, 0.4, 0.8)),
        ("seed-2", (0.2, 0.2)),
        ("other", (1.0,)),
    ]
    assert laid.axes[lines[0].axes].tokens == (1000.0, 2000.0, 3000.0)
    assert laid.within == ("seed-1", "seed-2")
    assert len(set(laid.colours.values())) == 4
    assert [line.name for line in chart(laid, "kl").lines] == ["seed-1"], "others have no such metric"


def test_a_band_goes_on_between_steps_that_only_one_seed_has(tmp_path: Path) -> None:
    long = make_run(tmp_path / "a1", [step / 1200 for step in range(1200)])
    short = make_run(tmp_path / "a2", [step / 1200 for step in range(50)], settings={"seed": 2})
    _, laid = compared(long, short)
    band, one, _ = chart(laid, "reward").lines
    steps = laid.axes[band.axes].step
    assert steps[-1] <= 50
    for step, mean, low, high in zip(steps, band.mean, *band.bands[0], strict=True):
        assert mean == pytest.approx((step - 1) / 1200, abs=0.001)
        assert low == pytest.approx(high, abs=0.001), "both seeds have the same rewards"
    assert len(one.mean) == 600


def test_held_out_figures_have_their_errors(tmp_path: Path) -> None:
    asked = [evaluated(version, {"1+1=": (0.0, 1.0), "2+2=": (float(version > 0), 1.0)}) for version in (0, 2)]
    first = make_run(tmp_path / "a", [0.1, 0.2], evaluations=asked)
    second = make_run(tmp_path / "b", [0.1, 0.2], settings={"learner": {"lr": 1.0}})
    found, laid = compared(first, second)
    assert found.runs[0].held_out["sums"].headline == "avg@2"
    [line] = chart(laid, "eval/sums/avg@2").lines
    assert (line.mean, line.errors, line.points) == ((0.5, 0.75), (0.0, 0.25), True)
    assert laid.axes[line.axes].step == (0, 2)
    assert laid.axes[line.axes].tokens == (0.0, 2000.0)


def test_runs_without_anything(tmp_path: Path) -> None:
    _, laid = compared(make_run(tmp_path / "a", []), make_run(tmp_path / "b", []))
    assert laid.sections == ()


def test_figures_that_say_the_same_are_one_chart(tmp_path: Path) -> None:
    """With one sample a row, avg@1 and pass@1 are alike where it passes or fails."""
    one = make_run(tmp_path / "a", [0.1], evaluations=[evaluated(0, {"1+1=": (1.0,), "2+2=": (0.0,)})])
    other = make_run(
        tmp_path / "b", [0.1], evaluations=[evaluated(0, {"1+1=": (0.0,)}), evaluated(1, {"1+1=": (1.0,)})]
    )
    _, laid = compared(one, other)
    [section] = [section for section in laid.sections if section.title == "Held-out rows"]
    assert [found.key for found in section.charts] == ["eval/sums/avg@1", "eval/sums/length"]
    assert "The same as pass@1" in section.charts[0].spec.about
