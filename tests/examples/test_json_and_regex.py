"""Your own JSON with rewards by regular expression."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.running import EXAMPLES, imported, run_command

REWARDS = imported("json_and_regex/rewards.py")
ROWS = json.loads((EXAMPLES / "json_and_regex" / "prompts.json").read_text())


def test_scores_are_those_of_the_patterns() -> None:
    assert REWARDS.tidy(completions=["0", "10", "01", "1 ", "", "a"]) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    patterns = [r"1\d4", r"1\d4", r"[1-9]2"]
    assert REWARDS.fits(completions=["164", "54", "12"], pattern=patterns) == [1.0, 0.0, 1.0]


def test_the_right_sum_always_fits_and_a_forgotten_hundred_never_does() -> None:
    for row in ROWS:
        one, other = map(int, row["prompt"].removesuffix("=").split("+"))
        total = str(one + other)
        assert re.fullmatch(row["pattern"], total)
        assert len(total) < 3 or not re.fullmatch(row["pattern"], total[1:])


@pytest.mark.slow
def test_the_reward_rises(tmp_path: Path) -> None:
    done = run_command("troupe train examples/json_and_regex/run.toml", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "runs" / "prompts-001" / "metrics.jsonl").read_text().splitlines()
    means = [json.loads(line)["rewards/fits/mean"] for line in lines]
    assert len(means) == 30
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.1
