"""What `--dry-run` says first."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.fakes import tiny_config
from troupe import train
from troupe.cli.main import main
from troupe.cli.train import describe_plan
from troupe.run.prepare import prepare


def test_the_plan_says_what_matters(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, rewards__functions=["length", "diversity"], rewards__weights=[1, 0.5])
    lines = describe_plan(prepare(config))
    assert lines[:2] == [
        f"4 steps into {tmp_path / 'run'}; nothing was written",
        f"model: {tiny_model}, {lines[1].split()[-4]} weights in float32",
    ]
    assert lines[2].startswith("5 prompts of ")
    assert lines[4:8] == [
        "a step: 2 prompts × 3 completions of at most 12 tokens, at temperature 1",
        "rewards: length_reward × 1, diversity_reward × 0.5",
        "learning: dapo, learning rate 0.01 (linear), beta 0",
        "schedule: pinned, max_staleness 0; a checkpoint every 50 steps",
    ]
    assert lines[8].startswith("memory at the most, MB")
    assert lines[-1] == "memory limit: none"
    limited = tiny_config(tiny_model, tmp_path, memory_limit_gb=0.5)
    assert describe_plan(prepare(limited))[-1] == "memory limit: 0.5 GB"


def test_of_a_resumed_run_it_says_what_is_done(tiny_model: Path, tmp_path: Path) -> None:
    train(tiny_config(tiny_model, tmp_path, learner__max_steps=1))
    longer = tiny_config(tiny_model, tmp_path)
    prepared = prepare(longer, resume=True, allow_changes=["learner.max_steps"])
    assert describe_plan(prepared)[0] == f"4 steps, 1 of them done, into {tmp_path / 'run'}; nothing was written"


def test_the_plan_comes_first_then_notes_then_the_config(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_config(tiny_model, tmp_path)  # writes prompts.json
    flags = ("-m", str(tiny_model), "-d", "prompts.json", "-o", "out", "--dry-run")
    out = CliRunner().invoke(main, ["train", *flags]).stdout
    plan, _, config = out.partition("\n\n")
    kinds = ["plan" if line.startswith("# ") else "note" for line in plan.splitlines()]
    assert kinds == sorted(kinds, reverse=True)
    assert "note: generation.max_completion_length lowered from" in plan
    assert tomllib.loads(config)["output"] == str(tmp_path / "out")
    assert not (tmp_path / "out").exists()
