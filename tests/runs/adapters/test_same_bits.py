"""A run that trains an adapter comes to the bits of the plain loop, whatever is on, wherever its generator runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.adapters import DORA, LORA, adapter_config, kill_generators, newest, train_adapter
from tests.support.fakes import delayed, often_equal, same_bits, weigh_ids
from tests.support.runs import completions, in_store, lines, policy_of, timeless
from tests.support.straight import run_straight
from troupe.policy import CompletedGroup, RolloutEngine, RolloutRequest
from troupe.run.ledgers import Factories

SLOW = pytest.mark.slow
PATTERNS: dict[str, Any] = LORA | {
    "adapter__rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7},
    "adapter__alpha_pattern": {"v_proj": 3.0},
}
"""Matrices that are joined for decoding have adapters of unlike ranks and scales."""
LAST: dict[str, Any] = LORA | {"adapter__layers": 1, "adapter__target_modules": ["k_proj", "up_proj"]}
"""Most matrices have none, and the gradient ends above the first layer."""
EVERYTHING: dict[str, Any] = {
    "learner__dynamic_sampling": True,
    "learner__max_resampling_attempts": 2,
    "learner__num_iterations": 2,
    "learner__gradient_accumulation_steps": 2,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_mixup_alpha": 1.0,
    "learner__ref_model_sync_steps": 3,
    "learner__weight_decay": 0.1,
    "adapter__dropout": 0.2,
}
PROCESS: dict[str, Any] = {"schedule__generator": "process"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "staleness"),
    [
        pytest.param(LORA, 1, id="lora", marks=SLOW),
        pytest.param(LORA | {"adapter__use_rslora": True, "adapter__init": "gaussian"}, 0, id="rslora", marks=SLOW),
        pytest.param(DORA, 2, id="dora", marks=SLOW),
        pytest.param(LORA | {"adapter__dropout": 0.5}, 0, id="dropout", marks=SLOW),
        pytest.param(LAST, 0, id="few modules of the last layer", marks=SLOW),
        pytest.param(LORA | {"learner__gradient_checkpointing": True}, 0, id="layers computed twice", marks=SLOW),
        pytest.param(DORA | {"model__dtype": "bfloat16"}, 0, id="16 bits"),
        pytest.param(
            LORA | {"learner__gradient_accumulation_steps": 4, "schedule__learner_streams": 3},
            0,
            id="three streams",
            marks=SLOW,
        ),
        pytest.param(LORA | EVERYTHING, 1, id="everything", marks=SLOW),
        pytest.param(DORA | EVERYTHING, 3, id="everything, dora", marks=SLOW),
        pytest.param(PATTERNS | EVERYTHING, 2, id="everything, patterns"),
    ],
)
def test_a_run_comes_to_the_bits_of_the_plain_loop(
    tmp_path: Path, ragged_model: Path, settings: dict[str, Any], staleness: int
) -> None:
    reward = often_equal if "learner__dynamic_sampling" in settings else weigh_ids
    config = adapter_config(ragged_model, tmp_path, schedule__max_staleness=staleness, **settings)
    result = troupe.train(config, [delayed(staleness, reward=reward)])
    straight, found = run_straight(config, reward), newest(result.folder)
    assert result.complete
    assert same_bits(found.weights, straight.weights)
    assert same_bits(found.optimizer_state, straight.optimizer_state)
    assert same_bits(policy_of(result.folder), straight.weights)
    assert found.state.num_tokens == straight.num_tokens
    if config.learner.sync_ref_model:
        assert same_bits(found.reference or {}, straight.reference or {})


def test_the_same_run_twice_writes_the_same_files(tmp_path: Path, ragged_model: Path) -> None:
    one, two = (Path(train_adapter(ragged_model, tmp_path / name).folder) for name in ("one", "two"))
    assert [timeless(line) for line in lines(one)] == [timeless(line) for line in lines(two)]
    assert completions(one) == completions(two)
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "MANIFEST.json"):
        assert (one / "final" / name).read_bytes() == (two / "final" / name).read_bytes()


@SLOW
def test_another_seed_begins_with_another_adapter(tmp_path: Path, ragged_model: Path) -> None:
    one, two = (
        policy_of(train_adapter(ragged_model, tmp_path / str(seed), seed=seed, learner__lr=0.0).folder)
        for seed in (0, 1)
    )
    assert one.keys() == two.keys()
    assert not same_bits(one, two)


@pytest.mark.parametrize(
    ("settings", "staleness"),
    [
        pytest.param(LORA, 0, marks=SLOW),
        (DORA, 1),
        pytest.param(PATTERNS, 0, marks=SLOW),
        pytest.param(LORA | EVERYTHING, 1, marks=SLOW),
    ],
    ids=["in turns", "overlapping", "patterns", "everything"],
)
def test_the_generator_in_a_process_of_its_own_writes_the_same(
    tmp_path: Path, ragged_model: Path, settings: dict[str, Any], staleness: int
) -> None:
    settings = settings | {"schedule__max_staleness": staleness}
    thread = train_adapter(ragged_model, tmp_path / "thread", **settings)
    process = train_adapter(ragged_model, tmp_path / "process", **settings | PROCESS)
    assert same_bits(policy_of(thread.folder), policy_of(process.folder))
    assert completions(thread.folder) == completions(process.folder)


@SLOW
@pytest.mark.parametrize("staleness", [0, 1])
def test_a_generator_in_two_processes_writes_the_same_each_time(
    tmp_path: Path, ragged_model: Path, staleness: int
) -> None:
    settings = PROCESS | {"schedule__generator_processes": 2, "schedule__max_staleness": staleness}
    one, two = (train_adapter(ragged_model, tmp_path / name, **settings) for name in ("one", "two"))
    assert same_bits(policy_of(one.folder), policy_of(two.folder))
    assert completions(one.folder) == completions(two.folder)


@SLOW
@pytest.mark.alone
def test_a_process_of_the_generator_that_is_killed_is_made_anew_beside_the_same_base(
    tmp_path: Path, ragged_model: Path
) -> None:
    killed: list[int] = []
    once = threading.Lock()  # groups are scored side by side

    def deadly(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        with once:
            if trainer_state.global_step == 2 and not killed:
                killed.append(kill_generators())
        return weigh_ids(completion_ids)

    deadly.__name__ = weigh_ids.__name__
    whole = train_adapter(ragged_model, tmp_path / "whole")
    result = train_adapter(ragged_model, tmp_path / "killed", deadly, **PROCESS)
    assert killed == [1]
    assert result.incidents == {"process_restarted": 1}
    assert same_bits(policy_of(result.folder), policy_of(whole.folder))
    assert completions(result.folder) == completions(whole.folder)


def test_a_generator_that_fails_is_made_anew_beside_the_same_base(tmp_path: Path, ragged_model: Path) -> None:
    made: list[FaultyEngine] = []

    def engine(*arguments: Any, **named: Any) -> RolloutEngine:
        made.append(FaultyEngine(*arguments, **named))
        made[-1].fails = len(made) == 1
        return made[-1]

    whole = train_adapter(ragged_model, tmp_path / "whole", **DORA)
    config = adapter_config(ragged_model, tmp_path / "faulty", **DORA)
    result = troupe.train(config, [weigh_ids], factories=Factories(engine=engine))
    assert result.incidents == {"actor_restarted": 1}
    assert len(made) == 2
    assert same_bits(policy_of(result.folder), policy_of(whole.folder))


class FaultyEngine(RolloutEngine):
    """Fails once at its third decode, where it is to."""

    fails, decodes = False, 0

    def decode_lists(self, requests: Sequence[RolloutRequest]) -> Iterator[list[CompletedGroup]]:
        self.decodes += 1
        if self.fails and self.decodes == 3:
            raise ArithmeticError("once")
        return super().decode_lists(requests)


@pytest.mark.parametrize("where", ["thread", pytest.param("process", marks=SLOW)])
@pytest.mark.parametrize("on_stale", ["drop", pytest.param("requeue", marks=SLOW), pytest.param("correct", marks=SLOW)])
def test_a_free_run_prompts_every_place_and_ends_every_group_once(
    tmp_path: Path, ragged_model: Path, where: str, on_stale: str
) -> None:
    schedule = {"mode": "free", "max_staleness": 1, "on_stale": on_stale, "generator": where}
    settings: dict[str, Any] = {f"schedule__{name}": value for name, value in schedule.items()}
    result = train_adapter(ragged_model, tmp_path, delayed(3, most_s=0.02), learner__max_steps=6, **settings)
    assert result.complete
    found = in_store(result.folder, "SELECT slot_step, place, attempt FROM groups")
    assert {(step, place) for step, place, _ in found} == {(step, place) for step in range(6) for place in range(2)}
    assert len(found) == len(set(found)) == sum(result.closed_groups.values())
    versions = {version for c in completions(result.folder) for version, _ in c.versions}
    assert len(versions) > 2, "new adapters come to the generator while it works"
