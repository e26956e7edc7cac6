"""Which charts a run gets."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.records.report.folders import make_run
from tests.records.test_curves import thinned
from troupe.records.curves import Metrics
from troupe.records.report.charts import Chart, sections_of
from troupe.records.report.picture import RunPicture, read_run


def run_of(folder: Path, *steps: Metrics, most_points: int = 1000) -> RunPicture:
    """A run that has these metrics only."""
    return msgspec.structs.replace(read_run(make_run(folder, 0)), metrics=thinned(list(steps), most_points))


def charts_of(run: RunPicture) -> dict[str, Chart]:
    return {chart.key: chart for section in sections_of(run) for chart in section.charts}


def test_sections_and_their_charts(tmp_path: Path) -> None:
    sections = {section.title: section for section in sections_of(read_run(make_run(tmp_path)))}
    keys = {title: [chart.key for chart in section.charts] for title, section in sections.items()}
    assert keys == {
        "Reward": ["reward", "reward_parts", "spread"],
        "Learning": ["loss", "kl", "learning_rate"],
        "Completions": ["lengths"],
        "The run": ["tokens_per_second", "step_time", "exposed", "peak_memory"],
        "Other metrics": ["logged_1"],
    }
    assert sections["Reward"].flat == ("Groups without signal",)
    assert sections["Learning"].flat == ("Clipped tokens",)
    assert sections["Other metrics"].charts[0].spec.title == "judge/speed"


def test_values_are_those_of_the_metrics(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, 3))
    charts = charts_of(run)
    [mean] = charts["reward"].lines
    assert mean.mean == (0.1, 0.2, 0.3)
    assert mean.bands == (((0.1, 0.1, 0.1), (0.3, 0.3, 0.3)),), "a deviation is drawn where the line itself was"
    parts = charts["reward_parts"].lines
    assert [(line.name, line.mean) for line in parts] == [("r", (0.05, 0.1, 0.15)), ("style", (0.95, None, 0.85))]
    every, ended = charts["lengths"].lines[0], charts["lengths"].lines[1:]
    assert (every.mean, every.bands, ended) == ((4.0,) * 3, (((2.0,) * 3, (6.0, 7.0, 8.0)),), ())
    assert charts["exposed"].lines[0].mean == (0.125,) * 3


def test_a_line_of_many_steps_has_a_band(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"loss": 1.0}, {"loss": 3.0}, most_points=1)
    [line] = charts_of(run)["loss"].lines
    assert (line.mean, line.bands) == ((2.0,), (((1.0,), (3.0,)),))


def test_the_reward_has_its_quantiles_about_it(tmp_path: Path) -> None:
    quantiles = {"reward/q10": 0.1, "reward/q25": 0.2, "reward/q50": 0.5, "reward/q75": 0.7, "reward/q90": 0.9}
    run = run_of(tmp_path, {"reward": 0.5, "reward_std": 4.0, **quantiles})
    [line] = charts_of(run)["reward"].lines
    assert line.bands == (((0.1,), (0.9,)), ((0.2,), (0.7,)))


def test_many_rewards_share_charts(tmp_path: Path) -> None:
    run = run_of(tmp_path, {f"rewards/r{i}/mean": 1.0 for i in range(14)})
    charts = charts_of(run)
    assert [(key, len(chart.lines)) for key, chart in charts.items()] == [
        ("reward_parts", 6),
        ("reward_parts_2", 6),
        ("reward_parts_3", 2),
    ]


def test_one_reward_alone_is_the_reward(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"reward": 1.0, "rewards/r/mean": 1.0})
    charts = charts_of(run)
    assert list(charts) == ["reward"]
    assert charts["reward"].lines[0].bands == ()


def test_a_reward_of_nothing_but_0_is_drawn(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"reward": 0.0, "loss": 0.0, "kl": 0.0})
    assert list(charts_of(run)) == ["reward", "loss"]


def test_metrics_without_a_number_make_no_chart(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"loss": None, "mine": None})
    assert sections_of(run) == ()


def test_what_rewards_log_has_an_end(tmp_path: Path) -> None:
    run = run_of(tmp_path, {f"reward_model/{i}": 1.0 for i in range(50)})
    [section] = sections_of(run)
    assert len(section.charts) == 24
    assert len({chart.key for chart in section.charts}) == 24


def test_charts_of_episodes(tmp_path: Path) -> None:
    waits = {f"tools/tool {i}/wait_s": 1.0 for i in range(12)}
    waits |= {"environments/wait_s": 3.0, "environments/library/wait_s": 2.0, "environments/failed": 0.0}
    turns = {"turns/mean": 2.5, "turns/min": 1.0, "turns/max": 4.0, "observations/mean_tokens": 9.0}
    run = run_of(tmp_path, {**turns, "tools/call_frequency": 1.5, "tools/failure_frequency": 0.0, **waits})
    [section] = sections_of(run)
    assert (section.title, section.flat) == ("Episodes", ("Calls that failed", "Episodes that failed"))
    charts = charts_of(run)
    assert list(charts) == ["turns", "observations", "calls", "waits", "tool_waits"]
    [line] = charts["turns"].lines
    assert (line.mean, line.bands) == ((2.5,), (((1.0,), (4.0,)),))
    assert [line.name for line in charts["waits"].lines] == ["all", "library"]
    assert [line.name for line in charts["tool_waits"].lines] == [f"tool {i}" for i in range(8)]
