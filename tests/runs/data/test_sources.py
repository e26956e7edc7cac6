"""Whole runs on prompts from elsewhere: tables, other columns, tasks that a seed makes; and resuming them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.extras import extra
from tests.support.runs import done, refused
from tests.support.tiny import CONFIG, write_tiny_model
from troupe.run.config import load_config

SHORT = [
    "--set",
    "generation.max_completion_length=6",
    "--set",
    "metrics.sinks=['sqlite']",
    "--set",
    "checkpoint.every=1",
]
LONGER = ("--max-steps", "2", "--allow-change", "learner.max_steps", "--resume")
SMALL = ("--batch-size", "2", "--num-generations", "2", "--lr", "1e-2", *SHORT)


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with sums in a table, and no cache of Hugging Face but its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = [(f"{a}+{b}=", a + b) for a in range(3) for b in range(2)]
    table = "".join(f"{question},{solution}\n" for question, solution in rows)
    (tmp_path / "sums.csv").write_text(f"question,solution\n{table}")
    (tmp_path / "same.jsonl").write_text(
        "\n".join(json.dumps({"asked": question, "solution": str(solution)}) for question, solution in rows)
    )
    (tmp_path / "other.csv").write_text(f"question,solution\n{table}7+7=,14\n")
    return tmp_path


def columns(**more: str) -> list[str]:
    named = {"prompt_column": "question", "answer_column": "solution", **more}
    return [word for key, value in named.items() for word in ("--set", f"data.{key}={value}")]


def test_a_table_with_other_columns_trains_and_the_plan_says_what_was_read(place: Path, tiny_model: Path) -> None:
    base = ["train", "-m", str(tiny_model), "-d", "sums.csv", *columns(), *SMALL]
    plan = done(*base, "--dry-run")
    assert f"# 6 prompts of 4 tokens from {place}/sums.csv; columns for rewards: answer, solution\n" in plan
    assert "# the first one, as the model reads it: '0+0='\n" in plan
    assert not (place / "runs").exists()
    done(*base, "--max-steps", "1")
    config = load_config(place / "runs" / "sums-001" / "run.toml")
    assert (config.rewards.functions, config.data.path) == (("exact_answer",), str(place / "sums.csv"))


def test_a_resume_goes_on_with_the_same_rows_from_wherever_and_with_no_others(place: Path, tiny_model: Path) -> None:
    base = ["-m", str(tiny_model), *SMALL, "-o", "out"]
    done("train", "-d", "sums.csv", *columns(), *base, "--max-steps", "1")
    for source, named in (("other.csv", columns()), ("sums.csv", columns(system_prompt="Add."))):
        message = refused("train", "-d", source, *named, *base, *LONGER)
        assert f"made with other prompts than those now in {place / source}" in message
    same = ("-d", "same.jsonl", "--set", "data.prompt_column=asked", *columns()[2:])
    assert "2 of 2 steps" in done("train", *same, *base, *LONGER)


def test_an_evaluation_reads_rows_as_a_run_does(place: Path, tiny_model: Path) -> None:
    base = ["eval", "-m", str(tiny_model), "-d", "sums.csv", "--max-new-tokens", "2", "--json"]
    assert json.loads(done(*base, *columns(chat="always")))["rows"] == 6
    assert 'has no "prompt"' in refused(*base)
    some = "of a config only [data], [environment], [generation] and [rewards] mean something here"
    assert some in refused(*base, "--set", "learner.lr=1")


@pytest.mark.slow
def test_tasks_of_reasoning_gym_bring_their_verifier_and_a_resume_knows_the_seed(
    place: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra("reasoning_gym")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    roomy: Any = msgspec.structs.replace(CONFIG, max_position_embeddings=256)
    model = write_tiny_model(tmp_path_factory.mktemp("roomy") / "m", roomy)
    base = ["-m", str(model), *SMALL, "-o", "out", "--set", "rewards.processes=1"]
    source = (
        "reasoning_gym:chain_sum,word_ladder?size=3&seed=1&word_ladder.max_word_length=3&word_ladder.min_word_length=3"
    )
    said = done("train", "-d", source, *base, "--max-steps", "1")
    config = load_config(place / "out" / "run.toml")
    assert (config.rewards.functions, config.data.path) == (("reasoning_gym",), source)
    assert "incidents" not in said
    message = refused("train", "-d", source.replace("seed=1", "seed=2"), *base, *LONGER)
    assert "the run was made with other prompts than those now in" in message
    assert "2 of 2 steps" in done("train", "-d", source, *base, *LONGER)
