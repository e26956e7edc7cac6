"""Runs of adapters that are killed with SIGKILL at random moments go on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.adapters import DORA, FILES, LORA
from tests.support.kills import EVERY, STEPS, G, P, Trainer, read_store, run_and_kill, write_run
from tests.support.runs import lines, timeless

pytestmark = [pytest.mark.slow, pytest.mark.alone]

PINNED: dict[str, Any] = {"schedule__max_staleness": 1, "schedule__generator": "thread", "learner__lr": 1e-2}
REFERENCE: dict[str, Any] = {
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_mixup_alpha": 1.0,
    "learner__ref_model_sync_steps": 5,
}


def metrics(out: Path) -> list[dict[str, Any]]:
    """Line by line, what does not depend on time."""
    return [timeless(line) for line in lines(out)]


@pytest.mark.parametrize(
    ("settings", "seed"),
    [
        (PINNED | LORA, 1),
        (PINNED | DORA | REFERENCE, 2),
        (PINNED | LORA | {"schedule__generator": "process"}, 3),
        pytest.param(
            PINNED | LORA | {"schedule__generator": "process", "schedule__max_staleness": 0}, 4, marks=pytest.mark.soak
        ),
    ],
    ids=["thread", "dora and a reference", "process", "process in turns"],
)
def test_a_pinned_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, settings: dict[str, Any], seed: int
) -> None:
    config, whole = write_run(tmp_path, **settings), tmp_path / "whole"
    assert Trainer(config, whole).wait() == 0, (tmp_path / "log.txt").read_text()[-4000:]
    killed = 0
    while killed < 6:
        out = tmp_path / f"out-{killed}"
        killed += run_and_kill(config, out, kills=STEPS // EVERY // 2, seed=seed + killed)
        for name in FILES:
            assert (out / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
        assert metrics(out) == metrics(whole)
        assert read_store(out) == read_store(whole)


@pytest.mark.parametrize("generator", [pytest.param("thread", marks=pytest.mark.soak), "process"])
def test_a_free_run_that_is_killed_again_and_again_ends_every_group_once(tmp_path: Path, generator: str) -> None:
    config = write_run(tmp_path, **PINNED | LORA | {"schedule__mode": "free", "schedule__generator": generator})
    killed = 0
    while killed < 6:
        out = tmp_path / f"out-{killed}"
        killed += run_and_kill(config, out, kills=STEPS // EVERY // 2, seed=100 + killed)
        store = read_store(out)
        assert store["steps"] == list(range(1, STEPS + 1))
        assert [gid for gid, _, _ in store["groups"]] == list(range(STEPS * P))
        assert len(store["completions"]) == STEPS * P * G
