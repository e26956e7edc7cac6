"""Whole runs with rewards of every kind: in processes, once a step, down for a while, exchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

import troupe
from tests.support.fakes import tiny_config, weigh_ids
from troupe import RunConfig, Supervisor, load_config
from troupe.rewards import TrainerState, batch_reward
from troupe.run.config import config_table

pytestmark = pytest.mark.anyio


def with_rewards(config: RunConfig, **rewards: Any) -> RunConfig:
    return load_config(None, [config_table(config), {"rewards": rewards}])


@pytest.mark.slow
def test_a_reward_in_processes_gives_the_run_that_it_gives_here(tmp_path: Path, tiny_model: Path) -> None:
    here = troupe.train(tiny_config(tiny_model, tmp_path / "here"), [weigh_ids])
    config = with_rewards(
        tiny_config(tiny_model, tmp_path / "there"), functions=["tests.support.fakes:weigh_ids"], run=["process"]
    )
    there = troupe.train(config)
    weights = [Path(run.folder, "final", "model.safetensors").read_bytes() for run in (here, there)]
    assert weights[0] == weights[1]
    assert there.incidents == {}


@pytest.mark.slow
def test_a_reward_that_moves_to_processes_gives_the_run_that_it_gives_there_and_after_a_resume(
    tmp_path: Path, tiny_model: Path
) -> None:
    functions = ["tests.rewards.process_rewards:weighs_with_an_alarm"]

    def config(name: str, steps: int, **rewards: Any) -> RunConfig:
        tiny = tiny_config(tiny_model, tmp_path / name, learner__max_steps=steps)
        return with_rewards(tiny, functions=functions, processes=1, **rewards)

    there = troupe.train(config("there", 3, run=["process"]))
    moved = troupe.train(config("moved", 3))
    troupe.train(config("resumed", 1))
    resumed = troupe.train(config("resumed", 3), resume=True, allow_changes=["learner.max_steps"])
    weights = [Path(run.folder, "final", "model.safetensors").read_bytes() for run in (there, moved, resumed)]
    assert (there.incidents, moved.incidents, resumed.incidents) == ({}, {"reward_moved": 1}, {"reward_moved": 1})
    assert weights[1] == weights[0]
    assert weights[2] == weights[0]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_reward_of_a_whole_step_is_called_once_a_step(tmp_path: Path, tiny_model: Path, staleness: int) -> None:
    calls: list[tuple[int, int]] = []

    @batch_reward
    def ranks(completion_ids: list[list[int]], trainer_state: TrainerState, **_: Any) -> list[float]:
        calls.append((trainer_state.global_step, len(completion_ids)))
        order = sorted(range(len(completion_ids)), key=lambda index: sum(completion_ids[index]))
        return [float(order.index(index)) for index in range(len(completion_ids))]

    result = troupe.train(tiny_config(tiny_model, tmp_path, schedule__max_staleness=staleness), [ranks, weigh_ids])
    assert sorted(calls) == [(step, 6) for step in range(4)]
    assert result.closed_groups == {"trained": 8}


async def test_a_run_is_held_while_its_reward_is_down_and_goes_on(tmp_path: Path, tiny_model: Path) -> None:
    asked, up = list[int](), list[bool]()

    async def judge(completion_ids: list[list[int]], **_: Any) -> list[float]:
        asked.append(1)
        if len(asked) > 2 and not up:
            raise ConnectionError("no judge")
        return weigh_ids(completion_ids)

    config = with_rewards(tiny_config(tiny_model, tmp_path), retries=0, breaker_failures=1, breaker_max_wait_s=0.001)
    async with Supervisor(config, [judge]) as run:
        status = run.status()
        async for _ in run.updates():
            break
        while not (status := run.status()).rewards_down:  # noqa: ASYNC110
            await anyio.sleep(0.001)
        assert list(status.rewards_down) == ["judge"]
        assert "no judge" in status.rewards_down["judge"]
        up.append(True)
    assert run.result.complete
    assert run.result.closed_groups == {"trained": 8}
    assert run.result.incidents == {"reward_down": 1, "reward_back": 1}


async def test_a_reward_is_exchanged_between_groups(tmp_path: Path, tiny_model: Path) -> None:
    def ones(completions: list[str], **_: Any) -> list[float]:
        return [float(index) for index in range(len(completions))]

    def tens(completions: list[str], **_: Any) -> list[float]:
        return [10.0 * index for index in range(len(completions))]

    means: list[float] = []
    async with Supervisor(tiny_config(tiny_model, tmp_path, learner__max_steps=4), [ones]) as run:
        run.pause()
        run.step()
        async for update in run.updates():
            means.append(update.metrics["reward"])
            if len(means) == 1:
                run.exchange_reward("ones", tens)
                while run.status().incidents.get("reward_exchanged", 0) == 0:  # noqa: ASYNC110
                    await anyio.sleep(0.001)
                run.resume()
    assert means == [1.0, 10.0, 10.0, 10.0]
