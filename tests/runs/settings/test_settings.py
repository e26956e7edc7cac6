"""Settings: from files, flags and the environment; what is told of those that cannot be, before any work is done."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.runs import call, done, lines, names_in, refused, summary
from troupe.errors import ConfigError
from troupe.run.config import config_table, load_config

RUN = ("-m", "m", "-d", "p.json", "--num-generations", "2", "--batch-size", "2", "--reward", "length")
SHORT = ("--set", "generation.max_completion_length=6", "--max-steps", "1")


def planned(*arguments: str) -> dict[str, Any]:
    """The configuration that a dry run prints."""
    printed = done(*arguments, "--dry-run")
    return tomllib.loads("\n".join(line for line in printed.splitlines() if not line.startswith("note: ")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[learner]\nlearning_rate = 1e-3\n", "unknown key learner.learning_rate"),
        ("[learner]\nmax_step = 3\n", "did you mean learner.max_steps?"),
        ("[learnr]\nlr = 1e-3\n", "did you mean learner?"),
        ('[learner]\nlr = "fast"\n', "learner.lr is 'fast'"),
        ('[learner]\nloss_type = "gppo"\n', "'dapo'"),
        ("[generation]\ntemperature = 0.0\n", "give a temperature above 0"),
        ("[generation]\nnum_generations = 1\n", "give at least 2"),
        ("[learner]\nlr = nan\n", "finite"),
        ("[rewards]\nweights = [1.0]\nfunctions = ['length', 'diversity']\n", "one weight a function"),
        ("[metrics]\nsinks = ['jsonl', 'jsonl']\n", "more than once"),
        ("seed = -1\n", "seed is -1"),
        ("[learner]\nsync_ref_model = true\n", "beta"),
        ("[learner\nlr = 1\n", "line 1"),
    ],
    ids=[
        "a key of somewhere else",
        "a typo in a key",
        "a typo in a section",
        "a text for a number",
        "no such choice",
        "greedy",
        "one completion",
        "no number",
        "weights",
        "a sink twice",
        "seed",
        "a key that needs another",
        "no toml",
    ],
)
def test_a_mistake_in_a_run_file_is_named_before_the_model_is_looked_for(desk: Path, text: str, said: str) -> None:
    paths = '[model]\npath = "nowhere"\n[data]\npath = "nowhere.json"\n'
    (desk / "run.toml").write_text(text + paths if text.startswith(("[", "seed")) else text)
    message = refused("train", "run.toml", "-o", "out")
    assert message.startswith("troupe: ")
    assert "run.toml" in message
    assert said in message
    assert "nowhere" not in message
    assert names_in(desk) == {"m", "p.json", "run.toml"}


def test_a_flag_wins_over_set_no_matter_the_file_and_the_run_says_what_it_was_made_with(desk: Path) -> None:
    (desk / "run.toml").write_text("[learner]\nlr = 0.5\nbeta = 0.1\nmax_steps = 9\n")
    done("train", "run.toml", *RUN, *SHORT, "-o", "out", "--lr", "0.25", "--set", "learner.beta=0.0")
    stored = load_config("out/run.toml")
    assert (stored.learner.lr, stored.learner.beta, stored.learner.max_steps) == (0.25, 0.0, 1)
    assert lines("out")[0]["learning_rate"] == 0.25
    assert summary("out").total_steps == 1


def test_set_takes_lists_tables_truth_and_plain_words(desk: Path) -> None:
    settings = {
        "rewards.functions": '["length", "diversity"]',
        "rewards.weights": "[1, 0.5]",
        "data.shuffle": "false",
        "generation.logit_bias": "{97 = 2.5}",
        "learner.lr_scheduler": "cosine",
        "generation.stop": '["\\n"]',
    }
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    table = planned("train", *RUN[:-2], *flags, "-o", "out")
    assert table["rewards"]["functions"] == ["length", "diversity"]
    assert table["rewards"]["weights"] == [1.0, 0.5]
    assert table["data"]["shuffle"] is False
    assert table["generation"]["logit_bias"] == {"97": 2.5}
    assert table["learner"]["lr_scheduler"] == "cosine"
    assert table["generation"]["stop"] == ["\n"]


@pytest.mark.parametrize("setting", ["learner.lr", "=3", "learner.=3", "lr=0.1", "learner.lr="])
def test_a_setting_that_names_no_key_is_refused(desk: Path, setting: str) -> None:
    message = refused("train", *RUN, "-o", "out", "--set", setting)
    assert setting.rstrip("=").partition("=")[0] in message
    assert not (desk / "out").exists()


def test_a_dry_run_prints_every_key_that_the_run_then_stores(desk: Path) -> None:
    plan = planned("train", *RUN, *SHORT, "-o", "out")
    assert not (desk / "out").exists()
    done("train", *RUN, *SHORT, "-o", "out")
    assert plan == tomllib.loads((desk / "out" / "run.toml").read_text())


def test_a_home_sign_in_a_path_is_ones_home(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(desk))
    flags = ("-m", "~/m", "-d", "~/p.json", *RUN[4:], *SHORT, "-o", "~/out")
    done("train", *flags)
    assert load_config(desk / "out" / "run.toml").model.path == str(desk / "m")
    assert "completions" in done("inspect", desk / "out")


def test_a_model_is_found_in_the_cache_that_the_environment_names(
    desk: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repo = desk / "cache" / "models--Some--Qwen3-tiny"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).symlink_to(ragged_model)
    monkeypatch.setenv("HF_HUB_CACHE", str(desk / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    flags = ("-p", "ab", "--seed", "1", "--max-new-tokens", "6")
    assert done("generate", "-m", "Some/Qwen3-tiny", *flags) == done("generate", "-m", "m", *flags)
    done("train", "-m", "Some/Qwen3-tiny", *RUN[2:], *SHORT, "-o", "out")
    assert summary("out").complete


def test_an_output_folder_with_other_things_in_it_is_left_alone(desk: Path) -> None:
    (desk / "out").mkdir()
    (desk / "out" / "thesis.tex").write_text("years of work")
    message = refused("train", *RUN, *SHORT, "-o", "out")
    assert "not empty" in message
    refused("train", *RUN, *SHORT, "-o", "out", "--resume")
    assert names_in(desk / "out") == {"thesis.tex"}
    assert (desk / "out" / "thesis.tex").read_text() == "years of work"


def test_resume_needs_to_be_told_which_run(desk: Path) -> None:
    assert "-o OUT_DIR" in refused("train", *RUN, "--resume")
    assert not (desk / "runs").exists()


def test_a_run_file_that_was_moved_with_its_data_means_the_same(desk: Path) -> None:
    (desk / "one").mkdir()
    (desk / "one" / "p.json").write_bytes((desk / "p.json").read_bytes())
    (desk / "one" / "run.toml").write_text(
        '[model]\npath = "../m"\n[data]\npath = "p.json"\n[rewards]\nfunctions = ["length"]\n'
    )
    before = load_config("one/run.toml")
    (desk / "one").rename(desk / "two")
    after = load_config("two/run.toml")
    assert (after.data.path, after.model.path) == (str(desk / "two" / "p.json"), str(desk / "two" / ".." / "m"))
    assert before.data.path == str(desk / "one" / "p.json")
    done("train", "two/run.toml", *SHORT, "-o", "out", "--num-generations", "2", "--batch-size", "2")
    assert summary("out").complete


def test_a_memory_limit_is_kept_by_smaller_pieces_and_told(desk: Path) -> None:
    flags = ("train", *RUN[:4], "--num-generations", "8", "--batch-size", "4", "--reward", "length", "--max-steps", "1")
    plan = planned(*flags, "-o", "out")
    assert plan["learner"]["gradient_accumulation_steps"] == 1
    tight = done(*flags, "-o", "out", "--memory-limit", "0.004")
    stored = load_config("out/run.toml")
    assert stored.memory_limit_gb == 0.004
    chosen = (
        (stored.learner.gradient_accumulation_steps or 1) > 1
        or bool(stored.learner.gradient_checkpointing)
        or stored.generation.memory_limit_gb is not None
    )
    assert chosen
    assert "note: memory: at most" in tight
    assert summary("out").complete


def test_python_is_told_the_same_as_the_command_line(desk: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean learner\.max_steps"):
        troupe.load_config(None, ["learner.max_step=3"])
    told = refused("train", *RUN, "--set", "learner.max_step=3")
    assert "did you mean learner.max_steps?" in told


def test_everything_that_can_be_set_is_in_the_plan_or_has_no_value(desk: Path) -> None:
    plan = planned("train", *RUN, "-o", "out")
    for section, keys in config_table(troupe.RunConfig()).items():
        if isinstance(keys, dict):
            assert keys.keys() <= plan[section].keys(), section


def test_a_prompt_file_given_as_the_run_file_is_told_so(desk: Path) -> None:
    result = call("train", "p.json")
    assert result.exit_code == 2
    assert "p.json" in result.stderr
    assert "Traceback" not in result.output
