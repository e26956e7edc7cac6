"""Other people's names: the table says something of each, and what it says exists."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import fields

import pytest

from troupe.cli.main import main
from troupe.run.aliases import COMMANDS, TABLES, describe_meaning, foreign_for, meaning_of, normalized, ours_for
from troupe.run.config import known_keys

FLAGS = {flag for command in main.load_all().values() for param in command.params for flag in param.opts}


def test_what_is_ours_exists() -> None:
    for alias in (alias for table in TABLES.values() for alias in table):
        for ours in alias.ours:
            assert ours in (FLAGS if ours.startswith("--") else known_keys()), alias
        assert alias.ours or alias.note, alias
        assert alias.theirs, alias
    assert set(COMMANDS.values()) <= set(main.load_all())
    assert not set(COMMANDS) & set(main.load_all())


def test_no_table_says_a_name_twice() -> None:
    for table in TABLES.values():
        names = [normalized(name) for alias in table for name in alias.theirs]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("--learning-rate", ["learner.lr"]),
        ("learning_rate", ["learner.lr"]),
        ("--learning_rate", ["learner.lr"]),
        ("generation.learning_rate", ["learner.lr"]),
        ("LR", ["learner.lr"]),
        ("lr", ["learner.lr"]),
        ("learner.num_generations", ["generation.num_generations"]),
        ("--iters", ["learner.max_steps"]),
        ("--epochs", ["learner.epochs"]),
        ("model_name_or_path", ["model.path"]),
        ("epsilon-high", ["learner.epsilon_high"]),
        ("save_total_limit", ["checkpoint.keep"]),
        ("r", ["adapter.rank"]),
        ("--lora_target_modules", ["adapter.target_modules"]),
        ("use_rslora", ["adapter.use_rslora"]),
        ("load_in_8bit", ["model.path"]),
        ("path", ["model.path", "data.path", "teacher.path"]),
        ("vllm_server_host", []),
        ("vllm_importance_sampling_mode", ["learner.vllm_importance_sampling_mode"]),
    ],
)
def test_a_name_in_any_spelling_is_ours(name: str, ours: list[str]) -> None:
    meaning = ours_for(name, known_keys())
    assert meaning is not None
    assert list(meaning.ours) == ours
    assert describe_meaning(meaning).startswith("it is " if ours else "there is none here: Troupe generates itself")


def test_what_differs_is_told() -> None:
    batch = meaning_of("per_device_train_batch_size")
    assert batch is not None
    assert describe_meaning(batch) == "it is learner.batch_size here (it counts prompts here, not completions)"
    split = ours_for("gradient_accumulation_steps", known_keys())
    assert split is not None
    assert "splits the batch, does not multiply it" in describe_meaning(split)


def test_a_mistyped_foreign_name_is_recognized() -> None:
    found = foreign_for("--lerning-rate")
    assert found is not None
    assert (found[0], found[1].ours) == ("learning_rate", ("learner.lr",))
    assert foreign_for("zzzz") is None
    assert ours_for("zzzz", known_keys()) is None


def answered(name: str) -> bool:
    return ours_for(name, known_keys()) is not None or f"--{normalized(name).replace('_', '-')}" in FLAGS


@pytest.mark.parametrize(
    ("module", "parser"),
    [
        pytest.param("mlx_lm.lora", "build_parser", marks=pytest.mark.slow),
        ("mlx_lm.generate", "setup_arg_parser"),
    ],
)
def test_every_flag_of_mlx_lm_is_answered(module: str, parser: str) -> None:
    pytest.importorskip("mlx_lm")
    actions = getattr(importlib.import_module(module), parser)()._actions
    names = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
    names.remove("--help")
    assert len(names) > 15
    assert [name for name in names if not answered(name)] == []


def test_every_setting_that_grpo_adds_in_trl_is_answered() -> None:
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")
    common = {field.name for field in fields(transformers.TrainingArguments)}
    names = {field.name for field in fields(trl.GRPOConfig)} - common
    names |= set(inspect.signature(trl.GRPOTrainer).parameters) & {"reward_funcs", "train_dataset", "eval_dataset"}
    assert sorted(name for name in names if not answered(name)) == []
