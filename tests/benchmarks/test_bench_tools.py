"""The benchmark of sleeping tools says what it measured; the figures themselves are for a quiet machine."""

from __future__ import annotations

import json

import pytest

from benchmarks import bench_tools as bench

SMALL = ["--rounds", "1", "--steps", "1", "--group", "2", "--new-tokens", "64", "--hidden", "64", "--layers", "1"]


@pytest.mark.slow
@pytest.mark.alone
def test_runs_are_compared_with_the_larger_of_device_and_tools(capsys: pytest.CaptureFixture[str]) -> None:
    bench.main(SMALL)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    alone, *runs, about = lines
    assert [alone["what"], about["what"]] == ["without sleep", "about"]
    assert [run["what"] for run in runs] == list(bench.RUNS)
    for run in runs:
        assert run["tool_s"] == alone["step_s"]
        assert run["of_larger"] == pytest.approx(run["step_s"] / max(run["tool_s"], run["device_s"]), rel=0.05)
        assert run["hidden_s"] + run["exposed_s"] >= 0.9 * run["tool_s"]
    assert runs[0]["step_s"] > 0.9 * (runs[0]["tool_s"] + runs[0]["device_s"])


def test_medians_are_taken_over_the_rounds() -> None:
    rounds = [[{"what": "max_staleness 1", "step_s": s, "of_larger": s / 2.0}] for s in (2.0, 9.0, 2.2)]
    (line,) = bench.summary(rounds)
    assert line == {
        "what": "max_staleness 1",
        "step_s": 2.2,
        "of_larger": 1.1,
        "extremes": [1.0, 4.5],
        "ok": True,
    }


def test_the_command_line() -> None:
    assert bench.parse([]).turns == 3
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["--turns", "1"])
