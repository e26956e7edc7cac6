"""The task of reasoning-gym and its verifier."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.examples.running import imported, run_command

if os.environ.get("TROUPE_REQUIRE_ORACLES") != "1":
    pytest.importorskip("reasoning_gym")
EXAMPLE = imported("reasoning_task.py")


def test_a_row_is_a_sum_as_the_policy_knows_it_with_the_whole_task() -> None:
    entry = EXAMPLE.tasks(1, 5)[3]
    assert re.fullmatch(r"\d+\+\d+=", EXAMPLE.row(entry)["prompt"])
    assert EXAMPLE.row(entry)["task"] is entry
    assert eval_sum(EXAMPLE.row(entry)["prompt"]) == int(entry["answer"])


def eval_sum(prompt: str) -> int:
    one, other = prompt.removesuffix("=").split("+")
    return int(one) + int(other)


def test_the_verifier_scores_each_completion_by_its_own_task() -> None:
    one, other = EXAMPLE.tasks(1, 5)[0], EXAMPLE.tasks(1, 5)[4]
    assert one["answer"] != other["answer"]
    completions = [one["answer"], f" {other['answer']} ", one["answer"], ""]
    assert EXAMPLE.verified(completions, [one, other, other, other]) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.slow
def test_held_out_tasks_score_better_after_training(tmp_path: Path) -> None:
    done = run_command("python examples/reasoning_task.py --max-steps 16", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.search(
        r"^16 steps; the verifier on held-out tasks: ([\d.]+)% before, ([\d.]+)% after$", done.stdout, re.M
    )
    assert told is not None, done.stdout
    before, after = map(float, told.groups())
    assert (before < 60, after > 80) == (True, True)
