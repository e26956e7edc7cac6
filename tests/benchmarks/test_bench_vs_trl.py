"""What the comparison with TRL computes and prepares; the figures themselves need TRL, and are not a test."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest

import troupe
from benchmarks import bench_vs_trl as bench
from benchmarks import vs_trl_theirs as theirs
from troupe.cli.demo import DEMO_CONFIG
from troupe.rewards import exact_answer_reward

pytestmark = pytest.mark.alone


def arguments(*more: str) -> argparse.Namespace:
    return bench.parse(["--trl-python", "python-with-trl", *more])


def test_windows_by_hand() -> None:
    ours = [[0.0, 0.2, 1.0, 1.0, 0.7], [0.2, 0.4, 1.0, 1.0, 1.0]]
    theirs_ = [[0.3, 0.3, 0.8, 0.8, 0.8], [0.5, 0.5, 0.8, 0.8, 0.8]]
    first, last = bench.compare(ours, theirs_, 2)
    assert (first.first, last.first) == (1, 3)
    assert first[1:5] == pytest.approx([0.2, math.sqrt(0.02), 0.4, math.sqrt(0.02)])
    assert last[1:5] == pytest.approx([0.95, math.sqrt(0.005), 0.8, 0.0])  # steps 3 to 5: 0.9 and 1.0
    assert first.limit == pytest.approx(3 * math.sqrt(0.02))  # its own noise
    assert last.limit == pytest.approx(3 * math.sqrt((0.02 + 0.0025) / 2))  # that of both windows is larger
    assert first.excess == pytest.approx(0.2 / first.limit)


def test_a_window_as_long_as_the_run_is_the_mean_of_all() -> None:
    (window,) = bench.compare([[0.0, 1.0, 0.5], [0.5, 1.0, 0.6]], [[0.0, 0.0, 0.3], [0.3, 0.3, 0.3]], 3)
    assert window.first == 1
    assert [window.ours, window.theirs] == pytest.approx([0.6, 0.2])
    assert window.limit == pytest.approx(3 * math.sqrt((0.02 + 0.02) / 2))


def test_the_threshold_is_reached_by_a_full_window() -> None:
    rewards = [1.0, 0.0, 0.5, 1.0, 1.0, 0.0]
    assert bench.first_reaching(rewards, 0.75, 2) == 4
    assert bench.first_reaching(rewards, 1.0, 2) == 5
    assert bench.first_reaching(rewards, 0.7, 5) == 5
    assert bench.first_reaching(rewards, 0.71, 5) is None


def test_a_ratio_needs_every_seed() -> None:
    assert bench.median([3.0, 1.0, 2.0]) == 2.0
    assert bench.median([3.0, None, 2.0]) is None


def test_both_sides_are_given_the_same_prompts_and_settings(tmp_path: Path) -> None:
    commands = bench.prepare(tmp_path, 7, arguments("--steps", "260"))  # 4,160 prompts: into the second epoch
    assert commands["trl"][0] == "python-with-trl"
    config = troupe.load_config(commands["troupe"][-1])
    job = json.loads(Path(commands["trl"][-1]).read_text(encoding="utf-8"))
    rows = json.loads(Path(config.data.path or "").read_text(encoding="utf-8"))
    assert len(rows) == 260 * config.learner.batch_size
    assert [(row["prompt"], row["answer"]) for row in job["rows"]] == [(row["prompt"], row["answer"]) for row in rows]
    assert all(row["prompt_ids"] == list(row["prompt"].encode()) for row in job["rows"])
    assert rows[0] != rows[4000]
    assert len({row["prompt"] for row in rows[:4000]}) == 4000
    assert (config.seed, config.data.shuffle, config.data.eval_path) == (7, False, None)
    assert job["model"] == config.model.path
    demo = troupe.load_config(DEMO_CONFIG)
    settings = job["settings"]
    assert settings["learning_rate"] == config.learner.lr == demo.learner.lr
    assert settings["max_steps"] == config.learner.max_steps == 260
    assert settings["per_device_train_batch_size"] == 16 * 8
    assert (settings["num_generations"], settings["max_completion_length"]) == (8, 8)
    assert (settings["loss_type"], settings["beta"], settings["seed"]) == ("dapo", 0.0, 7)
    assert settings["gradient_checkpointing"] is False


def test_the_same_reward_on_both_sides() -> None:
    completions, answers = ["85", " 85\n", "850", ""], ["85", "85", "85 ", "1"]
    scores = theirs.exact_answer_reward(completions, answers)
    assert scores == exact_answer_reward(completions, answers) == [1.0, 1.0, 0.0, 0.0]


def test_other_ids_are_refused() -> None:
    rows = [{"prompt": "1+2=", "prompt_ids": [1, 2]}]
    theirs.check_tokenizer(lambda text: {"input_ids": [1, 2]}, rows)
    with pytest.raises(ValueError, match=r"'1\+2='.*\[1, 3\]"):
        theirs.check_tokenizer(lambda text: {"input_ids": [1, 3]}, rows)


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--window", "1"], ["--window", "11", "--steps", "10"]])
def test_what_cannot_be_compared_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        arguments(*flags)


@pytest.mark.slow
def test_our_side_runs() -> None:
    run = bench.train("troupe", 1, arguments("--steps", "3", "--window", "2", "--threads", "1"))
    assert len(run.rewards) == len(run.times_s) == len(run.metrics) == 3
    assert 0.2 <= run.rewards[0] <= 0.8
    assert 0 < run.times_s[0] < run.times_s[1] < run.times_s[2] < run.process_s - run.startup_s
    assert run.versions["troupe"] == troupe.__version__


@pytest.mark.slow
def test_a_failing_side_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["python3", "-c", "import sys; sys.exit('no such thing')"]
    monkeypatch.setattr(bench, "prepare", lambda *args: {"trl": command})
    with pytest.raises(RuntimeError, match="trl, seed 0, ended with 1:\nno such thing"):
        bench.train("trl", 0, arguments())
