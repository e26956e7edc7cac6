"""What a run that trains an adapter leaves: folders that are adapters, small, and whose base is found, or missed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.support.adapters import DORA, FILES, LORA, adapter_config, newest, train_adapter
from tests.support.fakes import same_bits, weigh_ids, write_ragged_model
from tests.support.runs import call, done, names_in, refused, summary
from tests.support.straight import run_straight
from troupe.checkpoint import list_checkpoints, verify_manifest
from troupe.errors import ModelError
from troupe.policy import Policy, load_policy

ASK = ("-p", "ab", "--temperature", "0", "--max-new-tokens", "9")
RUN = ("-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--reward", "length", "--lr", "0.01")
SHORT = ("--set", "generation.max_completion_length=8", "--max-steps", "2", "--set", "checkpoint.every=1")


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def logits(policy: Policy) -> mx.array:
    return policy.model(mx.array([[97, 98, 99, 100, 101]]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run with a checkpoint of each step."""
    return Path(train_adapter(ragged_model, tmp_path_factory.mktemp("run"), checkpoint__every=1).folder)


def test_the_final_folder_and_every_checkpoint_is_an_adapter_s_and_nothing_of_the_base_is_copied(run: Path) -> None:
    assert names_in(run / "final") == FILES | {"MANIFEST.json"}
    assert verify_manifest(run / "final") == FILES
    of_a_run = {"made.json", "optimizer.safetensors", "state.json", "unfinished.msgpack"}
    assert len(list_checkpoints(run)) == 4
    for folder in list_checkpoints(run):
        assert verify_manifest(folder) == FILES | of_a_run
    last = list_checkpoints(run)[0]
    assert (last / "adapter_config.json").read_bytes() == (run / "final" / "adapter_config.json").read_bytes()
    for name in FILES - {"adapter_config.json"}:
        stored: list[Any] = [mx.load(str(folder / name), return_metadata=True) for folder in (last, run / "final")]
        (of_checkpoint, its_metadata), (of_final, metadata) = stored
        assert same_bits(of_checkpoint, of_final)
        assert its_metadata == metadata


def test_a_checkpoint_is_as_small_as_what_is_trained(tmp_path: Path, ragged_model: Path) -> None:
    few: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 1, "adapter__target_modules": ["q_proj"]}
    run = Path(train_adapter(ragged_model, tmp_path, schedule__max_staleness=1, **few).folder)
    trained = sum(array.nbytes for array in newest(run).weights.values())
    assert trained == 4 * 2 * (32 + 32)
    for folder in list_checkpoints(run):
        header_bytes = 2000
        for file in folder.glob("*.safetensors"):
            assert file.stat().st_size < 2 * trained + header_bytes


def test_the_final_folder_is_what_was_learned_and_beside_its_base_the_policy(
    tmp_path: Path, ragged_model: Path, run: Path
) -> None:
    expected = run_straight(adapter_config(ragged_model, tmp_path), weigh_ids).weights
    alone, beside = load_policy(run / "final"), load_policy(ragged_model, adapter=run / "final")
    assert same_bits(alone.weights, expected)
    assert same_bits(beside.weights, expected)
    assert mx.array_equal(logits(alone), logits(beside)).item()
    apart = mx.max(mx.abs(logits(alone) - logits(load_policy(ragged_model)))).item()
    assert float(apart) > 0.1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [LORA, pytest.param(DORA, marks=pytest.mark.slow), LORA | {"adapter__init": "gaussian"}],
    ids=["lora", "dora", "init"],
)
def test_an_adapter_that_was_not_trained_is_the_base_to_the_bit(
    tmp_path: Path, ragged_model: Path, settings: dict[str, Any]
) -> None:
    final = Path(train_adapter(ragged_model, tmp_path, learner__lr=0.0, **settings).folder) / "final"
    policy, base = load_policy(final), load_policy(ragged_model)
    assert policy.base.adapter is not None
    assert mx.array_equal(logits(policy), logits(policy.having({}))).item()
    assert mx.allclose(logits(policy), logits(base), rtol=1e-5, atol=1e-5).item(), "whose matrices lie otherwise"
    assert policy.generate_text("ab", 9, temperature=0.0) == base.generate_text("ab", 9, temperature=0.0)


def test_the_base_stays_as_it_is(tmp_path: Path) -> None:
    model = write_ragged_model(tmp_path / "model")
    before = sums(model)
    train_adapter(model, tmp_path)
    assert sums(model) == before


def test_commands_find_the_base_of_a_run_and_answer_alike_wherever_the_adapter_is_named(desk: Path) -> None:
    done("train", "-m", "m", "--lora", "4", *RUN, *SHORT, "-o", "out")
    answer = done("generate", "-m", "out/final", *ASK)
    assert answer != done("generate", "-m", "m", *ASK)
    for named in (("-m", "out"), ("-m", "out/checkpoints/step-00000002"), ("-m", "m", "--adapter", "out")):
        assert done("generate", *named, *ASK) == answer
    judging = ("-d", "p.json", "--reward", "length")
    alone, beside = (done("eval", *named, *judging) for named in (("-m", "out"), ("-m", "m", "--adapter", "out/final")))
    assert alone.splitlines()[1:] == beside.splitlines()[1:]
    done("fuse", "--adapter", "out", "-o", "fused")
    assert done("generate", "-m", "fused", *ASK) == answer
    for command in (("inspect", "out"), ("status", "out"), ("report", "out")):
        assert call(*command).exit_code == 0


def test_a_run_goes_on_from_the_command_line_with_what_it_stored(desk: Path) -> None:
    done("train", "-m", "m", "--lora", "4", *RUN, *SHORT, "-o", "out")
    more = ("--max-steps", "4", "--allow-change", "learner.max_steps")
    assert "going on after step 2" in done("train", "-o", "out", "--resume", *more)
    assert summary("out").steps == 4
    said = refused("train", "-o", "out", "--resume", "--lora", "5", *more)
    assert "adapter.rank: 4 → 5 (never: a run goes on with the adapter that it began with)" in said


def test_a_base_that_is_not_where_the_adapter_says_is_missed_by_name_and_may_be_named(
    tmp_path: Path, ragged_model: Path
) -> None:
    model = Path(shutil.copytree(ragged_model, tmp_path / "model"))
    final = Path(train_adapter(model, tmp_path).folder) / "final"
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=rf"{final}: holds an adapter of the base {model}, .*-m BASE --adapter DIR"):
        load_policy(final)
    trained = newest(tmp_path / "run").weights
    assert same_bits(load_policy(moved, adapter=final).weights, trained)
    settings = json.loads((final / "adapter_config.json").read_bytes())
    (final / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "../../moved"}))
    assert same_bits(load_policy(final).weights, trained), "a path counts from the adapter's folder"


def test_dora_is_refused_where_a_row_of_a_matrix_has_no_direction(desk: Path) -> None:
    """PEFT and mlx-lm would divide 0 by 0."""
    shutil.copytree(Path("m").resolve(), "empty")
    weights = mx.load("empty/model.safetensors")
    assert isinstance(weights, dict)
    weights["model.layers.1.mlp.up_proj.weight"][5] = 0.0
    weights = {name: array + 0 for name, array in weights.items()}
    mx.eval(weights)
    mx.save_safetensors("empty/model.safetensors", weights)
    said = refused("train", "-m", "empty", "--set", "adapter.kind=dora", *RUN, *SHORT, "-o", "out")
    assert "empty: rows of model.layers.1.mlp.up_proj hold nothing but 0, and DoRA divides by their length" in said
    done("train", "-m", "empty", "--lora", "4", *RUN, *SHORT, "-o", "out")


def put_in_cache(model: Path, cache: Path) -> None:
    """The model `Some/Tiny` as the hub's client leaves it."""
    kept = cache / "models--Some--Tiny"
    shutil.copytree(model, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")


@pytest.mark.slow
def test_a_base_that_has_a_hub_id_is_named_by_it_and_found_on_another_machine(
    desk: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def base_in(folder: str) -> str:
        settings: dict[str, str] = json.loads((Path(folder) / "adapter_config.json").read_bytes())
        return settings["base_model_name_or_path"]

    put_in_cache(ragged_model, desk / "cache")
    monkeypatch.setenv("HF_HUB_CACHE", str(desk / "cache"))
    done("train", "-m", "Some/Tiny", "--lora", "4", *RUN, *SHORT, "-o", "out")
    assert base_in("out/final") == base_in("out/checkpoints/step-00000002") == "Some/Tiny"
    answer = done("generate", "-m", "out", *ASK)
    shutil.move(desk / "cache", desk / "elsewhere")
    assert "holds an adapter of the base Some/Tiny, which cannot be used" in refused("generate", "-m", "out", *ASK)
    monkeypatch.setenv("HF_HUB_CACHE", str(desk / "elsewhere"))
    for named in (("-m", "out"), ("-m", "Some/Tiny", "--adapter", "out")):
        assert done("generate", *named, *ASK) == answer
    done("train", "-o", "out", "--resume", "--max-steps", "3", "--allow-change", "learner.max_steps")
    done("train", "-m", "out", *RUN, *SHORT, "-o", "more")
    assert base_in("out/final") == base_in("more/final") == "Some/Tiny"
