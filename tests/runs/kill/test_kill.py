"""`troupe train` killed with SIGKILL at random moments, also while it writes a checkpoint, goes on as if nothing had
happened."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.kills import EVERY, STEPS, G, P, Trainer, read_store, run_and_kill, write_run
from tests.support.runs import lines, timeless
from troupe.cli.demo import DEMO_CONFIG

pytestmark = pytest.mark.alone

PINNED: dict[str, Any] = {"schedule__max_staleness": 1, "schedule__generator": "thread"}
CURRICULUM: dict[str, Any] = {
    "curriculum__enabled": True,
    "curriculum__passes_from": 0.5,
    "curriculum__window": 1,
    "curriculum__retire_at": 0.9,
    "curriculum__retire_after": 1,
    "curriculum__revisit_every": 5,
    "data__path": "rows.json",
}
FREE = PINNED | {"schedule__mode": "free"}


def final_hash(out: Path) -> str:
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


def metrics(out: Path) -> list[dict[str, Any]]:
    """Line by line, what does not depend on time."""
    return [timeless(line) for line in lines(out)]


def check_pinned(out: Path, whole: Path) -> None:
    assert final_hash(out) == final_hash(whole)
    assert metrics(out) == metrics(whole)
    assert read_store(out) == read_store(whole)


def check_free(out: Path) -> None:
    store = read_store(out)
    assert store["steps"] == list(range(1, STEPS + 1))
    assert [gid for gid, _, _ in store["groups"]] == list(range(STEPS * P)), "every group ends, and once"
    assert len(store["completions"]) == STEPS * P * G
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))


def uninterrupted(folder: Path, **settings: Any) -> Path:
    out = folder / "whole"
    assert Trainer(write_run(folder, **settings), out).wait() == 0, (folder / "log.txt").read_text()[-4000:]
    assert read_store(out)["steps"] == list(range(1, STEPS + 1))
    return out


@pytest.mark.slow
def test_a_killed_run_chooses_the_same_rows_by_their_pass_rates(tmp_path: Path) -> None:
    rows = json.loads((DEMO_CONFIG.parent / "arithmetic.json").read_text())[:24]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    whole = uninterrupted(tmp_path, **PINNED, **CURRICULUM)
    assert run_and_kill(tmp_path / "run.toml", tmp_path / "out", kills=2, seed=2) == 2
    check_pinned(tmp_path / "out", whole)
    last = metrics(whole)[-1]
    assert 0 < last["curriculum/retired"] < len(rows), "rows are mastered, and others are not"


@pytest.mark.slow
def test_a_killed_run_learns_the_same_from_its_teacher(tmp_path: Path) -> None:
    teaching = {"teacher__path": str(DEMO_CONFIG.parent / "policy"), "teacher__coef": 0.1}  # as it was at first
    whole = uninterrupted(tmp_path, **PINNED, **teaching)
    assert run_and_kill(tmp_path / "run.toml", tmp_path / "out", kills=1, seed=3) == 1
    check_pinned(tmp_path / "out", whole)
    assert all(line["teacher/kl"] != 0.0 for line in metrics(whole)[2:])


@pytest.mark.slow
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.soak)])
@pytest.mark.parametrize("generator", ["thread", "process"])
def test_pinned_runs_that_are_killed_again_and_again(tmp_path: Path, generator: str, kills: int) -> None:
    settings = PINNED | {"schedule__generator": generator}
    whole = uninterrupted(tmp_path, **settings)
    killed, seed = 0, 0
    while killed < kills:
        out = tmp_path / f"out-{seed}"
        killed += run_and_kill(tmp_path / "run.toml", out, kills=STEPS // EVERY // 2, seed=seed)
        check_pinned(out, whole)
        seed += 1


@pytest.mark.slow
@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.soak)])
@pytest.mark.parametrize("generator", ["thread", "process"])
def test_free_runs_that_are_killed_again_and_again(tmp_path: Path, generator: str, kills: int) -> None:
    config = write_run(tmp_path, **FREE | {"schedule__generator": generator})
    killed, seed = 0, 100
    while killed < kills:
        out = tmp_path / f"out-{seed}"
        killed += run_and_kill(config, out, kills=STEPS // EVERY // 2, seed=seed)
        check_free(out)
        seed += 1
