"""`troupe train` killed with SIGKILL amid an evaluation: whoever resumes it neither repeats nor loses one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import Trainer, check_after_kill, newest_step, write_run
from tests.support.runs import in_store
from troupe.cli.demo import DEMO_CONFIG
from troupe.records.evaluations import read_evaluations

pytestmark = [pytest.mark.alone, pytest.mark.slow]

ROWS, KILLS = 200, 2


def settings(folder: Path) -> dict[str, Any]:
    """Evaluations that take longer than a step."""
    rows = json.loads((DEMO_CONFIG.parent / "arithmetic-held-out.json").read_text())[:ROWS]
    (folder / "held-out.json").write_text(json.dumps(rows))
    sets = [{"name": "sampled", "path": "held-out.json", "limit": 100, "num_samples": 3, "temperature": 1.0}]
    return {
        "data__eval_path": "held-out.json",
        "evaluation__every": 3,
        "evaluation__sets": sets,
        "learner__max_steps": 6,
        "schedule__max_staleness": 1,
        "schedule__generator": "thread",
        "metrics__sinks": ["jsonl", "sqlite", "trace"],
    }


def done(out: Path) -> int:
    return len(read_evaluations(out))


def test_each_evaluation_is_there_once_and_is_that_of_a_run_that_was_not_killed(tmp_path: Path) -> None:
    config, whole, out = write_run(tmp_path, **settings(tmp_path)), tmp_path / "whole", tmp_path / "out"
    assert Trainer(config, whole).wait() == 0
    dice, amid = random.Random(1), 0
    for _ in range(KILLS):
        before, step = done(out), newest_step(out)
        trainer = Trainer(config, out)
        if dice.random() < 0.5:
            trainer.wait_until(lambda before=before: done(out) > before)  # type: ignore[misc]
        else:
            trainer.wait_until(lambda step=step: newest_step(out) > step)  # type: ignore[misc]
        trainer.kill()
        check_after_kill(out)
        behind = {int(path.stem[7:]) for path in out.glob("checkpoints/*/behind-*.safetensors")}
        amid += bool({version for version in behind if version % 3 == 0})
    assert Trainer(config, out).wait() == 0, (tmp_path / "log.txt").read_text()[-4000:]
    assert amid, "no checkpoint held what an evaluation had still to do"
    figures = [[(e.version, e.name, e.metrics) for e in read_evaluations(run)] for run in (out, whole)]
    assert figures[0] == figures[1]
    assert [(version, name) for version, name, _ in figures[0]] == [
        (version, name) for version in (0, 3, 6) for name in ("held_out", "sampled")
    ]
    stored = "SELECT version, name, row, sample, text, scores FROM evaluation_samples ORDER BY 1, 2, 3, 4"
    assert in_store(out, stored) == in_store(whole, stored)
    assert len(in_store(out, stored)) == 3 * (ROWS + 300)
    final = "final/model.safetensors"
    assert (out / final).read_bytes() == (whole / final).read_bytes()
