"""The script that keeps a run in its hands: when it asks for what, and that the run heeds it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.running import imported, run_command

Coach = imported("supervisor.py").Coach


def asked_for(rewards: list[float], **settings: float) -> dict[int, str]:
    """Step → what is asked for after it."""
    coach = Coach(**{"window": 2, **settings})
    requests = {step: coach.after(reward) for step, reward in enumerate(rewards, 1)}
    return {step: request for step, request in requests.items() if request is not None}


def test_a_best_that_is_clearly_one_asks_for_a_checkpoint() -> None:
    assert asked_for([0.2, 0.2, 0.3, 0.3, 0.31]) == {2: "checkpoint", 3: "checkpoint", 4: "checkpoint"}


def test_a_reward_that_stalls_slows_the_learning_again_and_again() -> None:
    assert asked_for([0.5] * 9, patience=3) == {2: "checkpoint", 5: "slower", 8: "slower"}


def test_a_high_mean_ends_the_run_and_then_nothing_more_is_asked() -> None:
    assert asked_for([0.5, 0.95, 1.0, 1.0, 1.0, 0.1], good_enough=0.97) == {2: "checkpoint", 3: "end"}


@pytest.mark.slow
def test_what_breaks_costs_little_and_what_is_good_enough_ends_early(tmp_path: Path) -> None:
    done = run_command("python examples/supervisor.py --output runs/shaken --fail-at 7 --good-enough 0.68", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "start 1 of 3 failed: something broke; going on from the newest checkpoint" in done.stdout
    assert "good enough" in done.stdout
    told = re.search(r"^(\d+) of 100 steps;", done.stdout, re.MULTILINE)
    assert told is not None
    steps = int(told[1])
    assert steps < 90
    run = tmp_path / "runs" / "shaken"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert (run / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_bad_input_is_told_and_not_tried_again(tmp_path: Path) -> None:
    done = run_command("python examples/supervisor.py --output runs/none --max-steps 0", tmp_path)
    assert done.returncode == 2
    assert "learner.max_steps" in done.stderr
    assert not (tmp_path / "runs").exists()
