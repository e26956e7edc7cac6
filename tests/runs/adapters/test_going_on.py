"""Runs that go on with an adapter: PEFT's, mlx-lm's, and another run's, by every way to name it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support.adapters import VECTORS, adapter_config, cut_back, newest, train_adapter, write_base
from tests.support.fakes import RAGGED, same_bits, weigh_ids
from tests.support.runs import column, completions, done, policy_of, refused, summary
from tests.support.tiny import write_tiny_model
from troupe.checkpoint import list_checkpoints
from troupe.errors import CheckpointError, ConfigError, ModelError
from troupe.policy import load_policy
from troupe.run.prepare import prepare

FLAGS = ("-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--reward", "length", "--lr", "0.01")
SHORT = ("--set", "generation.max_completion_length=8", "--max-steps", "2", "--set", "checkpoint.every=1")
TWO_STEPS: dict[str, Any] = {"learner__max_steps": 2, "checkpoint__every": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run of a new adapter."""
    return Path(train_adapter(ragged_model, tmp_path_factory.mktemp("run"), **TWO_STEPS).folder)


@pytest.mark.parametrize(
    "name",
    ["peft/patterns", "mlx/default"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("peft/dora", "peft/all", "peft/rslora", "peft/last-layers", "mlx/all-layers", "mlx/dora")
    ],
)
def test_a_run_goes_on_with_what_another_tool_wrote_and_writes_what_it_is_again(
    tmp_path: Path, base: Path, name: str
) -> None:
    given = load_policy(base, adapter=VECTORS / name)
    settings = TWO_STEPS | {"adapter__resume_from": str(VECTORS / name)}
    still = train_adapter(base, tmp_path / "still", **settings, learner__lr=0.0)
    assert same_bits(policy_of(still.folder), given.weights)
    run = Path(train_adapter(base, tmp_path / "moved", **settings).folder)
    trained = load_policy(run / "final")
    assert trained.base.adapter is not None
    assert given.base.adapter is not None
    assert trained.base.adapter.kind == given.base.adapter.kind
    assert trained.base.adapter.modules == given.base.adapter.modules
    assert trained.base.adapter.dropout == 0.0
    assert trained.weights.keys() == given.weights.keys()
    assert not any(mx.array_equal(trained.weights[name], array).item() for name, array in given.weights.items())


def test_a_run_goes_on_with_another_run_s_adapter_by_any_name_of_it(
    tmp_path: Path, ragged_model: Path, run: Path
) -> None:
    found = [
        train_adapter(ragged_model, tmp_path / "final", **TWO_STEPS, adapter__resume_from=str(run / "final")),
        train_adapter(ragged_model, tmp_path / "run", **TWO_STEPS, adapter__resume_from=str(run)),
        train_adapter(list_checkpoints(run)[0], tmp_path / "alone", **TWO_STEPS, adapter__kind=None),
    ]
    for result in found[1:]:
        assert same_bits(policy_of(result.folder), policy_of(found[0].folder))
        assert completions(result.folder) == completions(found[0].folder)
    assert not same_bits(policy_of(found[0].folder), policy_of(run))
    settings = json.loads((Path(found[2].folder) / "final" / "adapter_config.json").read_bytes())
    assert settings["base_model_name_or_path"] == str(ragged_model)


def test_the_reference_is_the_adapter_that_a_run_went_on_with(tmp_path: Path, ragged_model: Path, run: Path) -> None:
    settings: dict[str, Any] = {"adapter__resume_from": str(run / "final"), "learner__beta": 0.1}
    kl = column(train_adapter(ragged_model, tmp_path, **settings).folder, "kl")
    assert kl[0] == 0.0
    assert all(value > 1e-4 for value in kl[1:])


def test_flags_name_an_adapter_to_go_on_with(desk: Path) -> None:
    done("train", "-m", "m", "--lora", "4", *FLAGS, *SHORT, "-o", "one")
    done("train", "-m", "m", "--adapter", "one", *FLAGS, *SHORT, "-o", "two")
    done("train", "-m", "one", *FLAGS, *SHORT, "-o", "three")
    done("train", "--adapter", "one", *FLAGS, *SHORT, "-o", "base-by-adapter")
    assert same_bits(policy_of("two"), policy_of("base-by-adapter"))
    assert same_bits(policy_of("two"), policy_of("three"))
    assert "2 of 2 steps" in done("train", "-o", "three", "--resume")
    assert summary("three").complete
    assert "is an adapter itself" in refused("train", "-m", "one", "--lora", "4", *FLAGS, *SHORT, "-o", "four")
    assert not (desk / "four").exists()


def test_an_adapter_of_another_base_is_refused_by_the_base_s_fingerprint(
    tmp_path: Path, ragged_model: Path, run: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", RAGGED, seed=1)
    with pytest.raises(
        ModelError, match=rf"{run}/final: this adapter was trained over another base \({ragged_model}\)"
    ):
        train_adapter(other, tmp_path, adapter__resume_from=str(run / "final"))
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_other_shapes_is_refused_by_its_tensors(tmp_path: Path, ragged_model: Path) -> None:
    with pytest.raises(ModelError, match=r"peft/all/adapter_model.safetensors: \d+ bad tensor\(s\) for this base"):
        train_adapter(ragged_model, tmp_path, adapter__resume_from=str(VECTORS / "peft" / "all"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "dora"}, "run/final: is a lora adapter, and adapter.kind is dora; leave it out"),
        ({"kind": "lora", "rank": 8}, "adapter.rank is given beside adapter.resume_from"),
        ({"alpha": 3.0}, "adapter.alpha is given beside adapter.resume_from"),
    ],
)
def test_what_the_folder_says_cannot_be_asked_for_otherwise(
    tmp_path: Path, ragged_model: Path, run: Path, settings: dict[str, Any], said: str
) -> None:
    given = {f"adapter__{key}": value for key, value in settings.items()}
    with pytest.raises((ConfigError, ModelError), match=said):
        train_adapter(ragged_model, tmp_path, adapter__resume_from=str(run / "final"), **given)
    assert not (tmp_path / "run").exists()


def test_an_adapter_beside_an_adapter_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ModelError, match=r"is an adapter itself, and .* is given beside it; name one of them"):
        train_adapter(run / "final", tmp_path, adapter__resume_from=str(run / "final"))
    with pytest.raises(ModelError, match=r"is an adapter itself, so that no new one can begin beside it"):
        train_adapter(run / "final", tmp_path)


def test_a_run_that_went_on_with_an_adapter_is_resumed_with_the_same_one_wherever_it_lies(
    tmp_path: Path, ragged_model: Path, run: Path
) -> None:
    given = Path(shutil.copytree(run / "final", tmp_path / "given"))
    settings: dict[str, Any] = {"checkpoint__every": 1, "adapter__resume_from": str(given)}
    whole = train_adapter(ragged_model, tmp_path, **settings)
    moved = given.rename(tmp_path / "moved")
    folder = cut_back(whole.folder, 2, tmp_path / "cut")
    with pytest.raises(ModelError, match=rf"{given}: no such adapter folder"):
        train_adapter(ragged_model, folder, resume=True, **settings)
    again = train_adapter(ragged_model, folder, resume=True, **settings | {"adapter__resume_from": str(moved)})
    assert same_bits(newest(again.folder).weights, newest(whole.folder).weights)
    other = settings | {"adapter__resume_from": str(Path(whole.folder) / "final")}
    louder = Path(shutil.copytree(moved, tmp_path / "louder")) / "adapter_config.json"
    louder.write_text(json.dumps(json.loads(louder.read_bytes()) | {"lora_alpha": 99}))
    scaled = settings | {"adapter__resume_from": str(louder.parent)}
    for changed in (other, scaled, settings | {"adapter__resume_from": None, "adapter__kind": None}):
        config = adapter_config(ragged_model, folder, **changed)
        with pytest.raises(CheckpointError, match=r"or another adapter than adapter.resume_from now names; restore th"):
            prepare(config, [weigh_ids], resume=True)
