"""A run of every family: the bits of the plain loop, in threads and processes, after a resume and after SIGKILL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.adapters import DORA, LORA, adapter_config, cut_back, newest, train_adapter
from tests.support.fakes import delayed, same_bits, weigh_ids
from tests.support.families import family_configs, shaken_policy
from tests.support.kills import EVERY, STEPS, Trainer, read_store, run_and_kill, write_run
from tests.support.runs import completions, lines, policy_of, timeless, train
from tests.support.straight import run_straight
from tests.support.tiny import write_tokenizer
from troupe.errors import ConfigError

pytestmark = pytest.mark.slow

CONFIGS = family_configs(
    vocab_size=260, hidden_size=32, max_position_embeddings=128, initializer_range=0.2, eos_token_id=(256, *range(24))
)
EACH = pytest.mark.parametrize("name", CONFIGS)
PROCESS: dict[str, Any] = {"schedule__generator": "process"}


def write_model(name: str, folder: Path) -> Path:
    shaken_policy(CONFIGS[name], seed=3).save(folder)
    write_tokenizer(folder)
    return folder


@EACH
def test_a_run_has_the_bits_of_the_plain_loop_also_with_a_process_and_from_any_checkpoint(
    name: str, tmp_path: Path
) -> None:
    model = write_model(name, tmp_path / "model")
    settings = {"schedule__max_staleness": 1, "checkpoint__every": 1}
    whole = train(model, tmp_path / "whole", delayed(1), **settings)
    config = adapter_config(model, tmp_path / "straight", adapter__kind=None, **settings)
    straight = run_straight(config, weigh_ids)
    assert same_bits(newest(whole.folder).weights, straight.weights)
    assert same_bits(newest(whole.folder).optimizer_state, straight.optimizer_state)
    process = train(model, tmp_path / "process", **settings | PROCESS)
    assert same_bits(policy_of(process.folder), straight.weights)
    assert completions(process.folder) == completions(whole.folder)
    for version in (1, 3):
        folder = cut_back(whole.folder, version, tmp_path / str(version))
        again = troupe.train(
            adapter_config(model, folder, adapter__kind=None, **settings), [delayed(version)], resume=True
        )
        assert same_bits(policy_of(again.folder), straight.weights)
        assert completions(again.folder) == [c for c in completions(whole.folder) if c.step > version]


@pytest.mark.parametrize("replay", ["measure", "on"])
def test_a_run_that_records_experts_has_the_bits_of_the_plain_loop_also_after_a_resume(
    replay: str, tmp_path: Path
) -> None:
    """Groups that are sampled and not trained on yet lie in checkpoints with the experts of their tokens."""
    model = write_model("qwen3-moe", tmp_path / "model")
    settings: dict[str, Any] = {
        "schedule__max_staleness": 1,
        "checkpoint__every": 1,
        "learner__router_replay": replay,
        "learner__router_aux_loss_coef": 0.5,
        "learner__lr": 0.03,
    }
    whole = train(model, tmp_path / "whole", delayed(1), **settings)
    config = adapter_config(model, tmp_path / "straight", adapter__kind=None, **settings)
    straight = run_straight(config, weigh_ids)
    assert same_bits(newest(whole.folder).weights, straight.weights)
    metrics = [timeless(line) for line in lines(whole.folder)]
    flips = [line["router/flips"] for line in metrics]
    assert flips[0] == 0.0, "the weights are those that sampled"
    assert max(flips) > 0.0
    assert all(line["aux_loss"] >= 1.0 for line in metrics)
    process = train(model, tmp_path / "process", **settings | PROCESS)
    assert same_bits(policy_of(process.folder), straight.weights)
    for version in (1, 3):
        folder = cut_back(whole.folder, version, tmp_path / str(version))
        again = troupe.train(
            adapter_config(model, folder, adapter__kind=None, **settings), [delayed(version)], resume=True
        )
        assert same_bits(policy_of(again.folder), straight.weights)
    plain = train(model, tmp_path / "plain", **settings | {"learner__router_replay": "off"})
    assert same_bits(policy_of(plain.folder), straight.weights) == (replay == "measure")


@pytest.mark.parametrize(("key", "value"), [("router_aux_loss_coef", 0.001), ("router_replay", "on")])
def test_what_is_for_experts_is_refused_where_there_are_none(key: str, value: Any, tmp_path: Path) -> None:
    model = write_model("qwen2", tmp_path / "model")
    with pytest.raises(ConfigError, match=f"learner.{key} is .*, but a qwen2 has no experts; leave it out"):
        train(model, tmp_path / "run", **{f"learner__{key}": value})


@EACH
@pytest.mark.parametrize("settings", [LORA, DORA | {"model__dtype": "bfloat16"}], ids=["lora", "dora, 16 bits"])
def test_so_has_a_run_of_an_adapter(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    thread = train_adapter(model, tmp_path / "thread", **settings)
    straight = run_straight(adapter_config(model, tmp_path / "straight", **settings), weigh_ids)
    assert same_bits(policy_of(thread.folder), straight.weights)
    process = train_adapter(model, tmp_path / "process", **settings | PROCESS)
    assert same_bits(policy_of(process.folder), straight.weights)
    assert completions(process.folder) == completions(thread.folder)


@pytest.mark.alone
@EACH
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(name: str, tmp_path: Path) -> None:
    model = write_model(name, tmp_path / "model")
    config = write_run(
        tmp_path, model__path=str(model), schedule__max_staleness=1, schedule__generator="thread", learner__lr=1e-3
    )
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert Trainer(config, whole).wait() == 0, (tmp_path / "log.txt").read_text()[-4000:]
    assert read_store(whole)["steps"] == list(range(1, STEPS + 1))
    assert run_and_kill(config, out, kills=2, seed=EVERY + len(name)) == 2
    file = "final/model.safetensors"
    assert (out / file).read_bytes() == (whole / file).read_bytes()
    assert [timeless(line) for line in lines(out)] == [timeless(line) for line in lines(whole)]
    assert read_store(out) == read_store(whole)
