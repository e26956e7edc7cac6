"""The first minutes: `troupe train` without arguments, and what one does with what it leaves."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import troupe
from tests.support.fakes import same_bits
from tests.support.runs import call, done, lines, names_in, policy_of, refused, summary, write_jsonl
from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import load_policy

SHORT = ("--num-generations", "2", "--batch-size", "2", "--set", "generation.max_completion_length=8")


class First(NamedTuple):
    """A first run."""

    folder: Path
    said: str


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """`troupe train`, cut short."""
    folder = tmp_path_factory.mktemp("first") / "out"
    return First(folder, done("train", "-o", folder, "--max-steps", "3", "--lr", "1e-4"))


def accuracy(*flags: str | Path) -> float:
    """What `troupe eval` tells of the demo's held-out rows."""
    figures: dict[str, Any] = json.loads(done("eval", *flags, "--max-new-tokens", "8", "--json"))
    told: float = figures["accuracy"]
    return told


def test_the_first_command_needs_no_file_and_ends_with_what_was_learned(first: First) -> None:
    result = summary(first.folder)
    assert f"held-out greedy accuracy: {result.accuracy_before:.1%} before, {result.accuracy_after:.1%} after" in (
        first.said
    )
    assert "3 of 3 steps in " in first.said
    assert first.said.rstrip().endswith(f"policy: {first.folder / 'final'}")


def test_the_last_line_of_a_log_has_the_reward_of_the_last_step(first: First) -> None:
    [told] = [text for text in first.said.splitlines() if text.startswith("step 3/3")]
    assert f"reward {lines(first.folder)[-1]['reward']:.3f}" in told


def test_the_run_folder_holds_what_the_readme_says(first: First) -> None:
    assert names_in(first.folder) == {
        "run.toml",
        "summary.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "trace.json",
        "run.sqlite",
        "checkpoints",
        "final",
    }


def test_the_accuracy_before_training_is_that_of_the_policy_that_ships(first: First) -> None:
    assert accuracy() == summary(first.folder).accuracy_before


def test_the_accuracy_that_training_tells_is_the_one_that_eval_finds(first: First) -> None:
    assert accuracy("-m", first.folder / "final") == summary(first.folder).accuracy_after


def test_the_final_folder_generates_with_the_command_line(first: First) -> None:
    final = first.folder / "final"
    told = done("generate", "-m", final, "-p", "12+30=", "--temperature", "0", "--max-new-tokens", "8")
    assert told == load_policy(final).generate_text("12+30=", 8, temperature=0.0) + "\n"
    assert told.strip().isdigit(), "a policy that was taught sums answers with a number"


def test_a_checkpoint_generates_as_the_final_folder_does(first: First) -> None:
    flags = ("-p", "12+30=", "--seed", "4", "--max-new-tokens", "8")
    newest = max((first.folder / "checkpoints").iterdir())
    assert newest.name == "step-00000003"
    assert done("generate", "-m", newest, *flags) == done("generate", "-m", first.folder / "final", *flags)


def test_the_final_folder_begins_a_second_training(first: First, tmp_path: Path) -> None:
    flags = ("-m", first.folder / "final", *SHORT, "--max-steps", "1", "--lr", "1e-3", "-o", tmp_path / "second")
    done("train", *flags)
    stored = troupe.load_config(tmp_path / "second" / "run.toml")
    assert stored.model.path == str(first.folder / "final")
    assert not same_bits(policy_of(tmp_path / "second"), policy_of(first.folder))
    assert names_in(tmp_path / "second" / "final") == names_in(first.folder / "final")


def test_what_a_dry_run_prints_is_a_run_file_that_gives_the_run_itself(tmp_path: Path) -> None:
    flags = (*SHORT, "--max-steps", "2", "--lr", "1e-3", "--seed", "3", "-d", DEMO_CONFIG.parent / "arithmetic.json")
    printed = done("train", *flags, "-o", tmp_path / "one", "--dry-run")
    plan = "\n".join(line for line in printed.splitlines() if not line.startswith("note: "))
    tomllib.loads(plan)
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    assert names_in(tmp_path) == {"plan.toml"}
    done("train", *flags, "-o", tmp_path / "one")
    done("train", tmp_path / "plan.toml", "-o", tmp_path / "two")
    assert same_bits(policy_of(tmp_path / "one"), policy_of(tmp_path / "two"))


def test_a_run_is_repeated_by_the_run_file_in_its_folder(first: First, tmp_path: Path) -> None:
    done("train", first.folder / "run.toml", "-o", tmp_path / "again")
    finals = [(folder / "final" / "model.safetensors").read_bytes() for folder in (first.folder, tmp_path / "again")]
    assert finals[0] == finals[1]
    assert summary(tmp_path / "again").accuracy_after == summary(first.folder).accuracy_after


def test_eval_with_a_reward_of_ones_own_tells_its_mean_over_the_rows_that_it_scored(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text(
        "def points(prompts, points, **columns):\n    return points\n"
        "async def twice(points, completions, **columns):\n    return [None if p is None else 2 * p for p in points]\n"
    )
    rows = [{"prompt": f"{n}+1=", "points": points} for n, points in enumerate([1.0, 2.5, None, 4.0])]
    flags = ("eval", "-d", write_jsonl(tmp_path / "p.jsonl", rows), "--max-new-tokens", "2")
    rewards = ("--reward", f"{tmp_path / 'r.py'}:points", "--reward", f"{tmp_path / 'r.py'}:twice")
    figures = json.loads(done(*flags, *rewards, "--json"))
    assert (figures["rows"], figures["accuracy"], figures["rewards"]) == (4, None, {"points": 2.5, "twice": 5.0})
    assert done(*flags, *rewards).splitlines()[1:4] == ["avg@1 7.5000 ± 2.5981", "points 2.5000", "twice 5.0000"]


def test_a_misspelt_command_or_flag_is_refused_with_the_right_one() -> None:
    assert "--max-steps" in refused("train", "--max-step", "3")
    assert "No such command 'trian'" in refused("trian")


def test_a_model_folder_with_a_part_missing_is_named_and_nothing_is_written(desk: Path, tiny_model: Path) -> None:
    for missing in ("config.json", "tokenizer.json", "model.safetensors"):
        broken = desk / missing.partition(".")[0]
        broken.mkdir()
        for file in tiny_model.iterdir():
            if file.name != missing:
                (broken / file.name).symlink_to(file)
        message = refused("train", "-m", broken, "-d", "p.json", "-o", "out")
        assert str(broken) in message
        assert missing in message
    assert not (desk / "out").exists()


def test_weights_that_were_not_copied_whole_are_named_and_nothing_is_written(desk: Path, tiny_model: Path) -> None:
    broken = desk / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    message = refused("train", "-m", broken, "-d", "p.json", "-o", "out")
    assert "model.safetensors" in message
    assert "copy it again" in message
    assert not (desk / "out").exists()


@pytest.mark.parametrize("command", ["train", "generate", "eval"])
def test_a_model_that_is_no_qwen3_is_refused_by_every_command(desk: Path, tiny_model: Path, command: str) -> None:
    other = desk / "other"
    other.mkdir()
    for file in tiny_model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model_type": "llama"}))
    rest = {"train": ["-d", "p.json", "-o", "out"], "generate": ["-p", "a"], "eval": ["-d", "p.json"]}[command]
    message = refused(command, "-m", other, *rest)
    assert "llama" in message
    assert "qwen3" in message


def test_one_word_of_help_for_every_command() -> None:
    said = done("--help")
    told = {line.split()[0]: line for line in said.splitlines() if line.startswith("  ") and line.split()}
    for command in ("train", "generate", "eval", "inspect", "status", "daemon", "pause", "resume", "drain", "stop"):
        assert len(told[command].split()) > 3
        assert call(command, "--help").exit_code == 0
