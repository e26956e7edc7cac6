"""The overlap benchmark says what it measured; the figures themselves are for a quiet machine, and are not a test."""

from __future__ import annotations

import json
import time
from typing import Any

import anyio
import pytest

from benchmarks import bench_overlap as bench

pytestmark = pytest.mark.alone

SMALL = ["--steps", "1", "--prompts", "2", "--group", "2", "--new-tokens", "4"]


def lines_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    bench.main([*SMALL, *arguments])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(line["benchmark"] == "overlap" for line in lines)
    assert lines.pop()["part"] == "about"
    return lines


@pytest.mark.slow
def test_latencies_are_compared_with_a_sequential_loop(capsys: pytest.CaptureFixture[str]) -> None:
    device, sequential, run = lines_of(capsys, "--parts", "latency", "--latencies", "1", "--staleness", "1")
    assert device["device_s"] == pytest.approx(device["generate_s"] + device["learn_s"], abs=2e-4)
    assert sequential["score_s"] >= 0.99 * device["device_s"]
    assert run["speedup"] == pytest.approx(sequential["step_s"] / run["step_s"], rel=0.05)
    larger_s = max(sequential["device_s"], sequential["score_s"])
    assert run["of_larger"] == pytest.approx(run["step_s"] / larger_s, rel=0.05)
    assert run["ok"] == (run["of_larger"] <= 1.10)


@pytest.mark.slow
def test_rewards_of_the_examples_and_processes(capsys: pytest.CaptureFixture[str]) -> None:
    judge, code, thread, process = lines_of(capsys, "--parts", "rewards", "processes")
    assert [judge["reward"], code["reward"]] == ["http_judge", "code_reward"]
    assert judge["sequential_score_s"] >= 0.99 * judge["judge_s"] > 0
    assert [thread["generator"], process["generator"]] == ["thread", "process"]
    assert "ok" not in thread
    assert process["ok"] == (process["speedup"] >= 1.5)


def test_the_service_divides_its_time_among_the_groups() -> None:
    reward = bench.service(0.2, prompts=4)
    began_s = time.perf_counter()
    assert anyio.run(lambda: reward(completion_ids=[[1, 2], [17]])) == [3 / 17, 0.0]
    assert time.perf_counter() - began_s >= 0.049


def test_the_command_line() -> None:
    args = bench.parse([])
    assert args.parts == ["latency", "rewards", "processes"]
    assert (args.latencies, args.staleness) == ([0.0, 0.5, 1.0, 2.0], [0, 1, 2])
    with pytest.raises(SystemExit, match="2"):
        bench.parse(["--parts", "luck"])
