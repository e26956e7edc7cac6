"""Who decodes the parts of a step, in which order, and who dies of it, changes no bit of a run."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.fakes import delayed, often_equal, same_bits, tiny_config, weigh_ids
from tests.support.games import acting, write_player
from tests.support.runs import policy_of
from tests.support.straight import run_straight
from troupe import Supervisor, train
from troupe.actors.generator.local import LocalProcesses
from troupe.actors.generator.remote import RemoteGenerator
from troupe.run.result import RunResult
from troupe.runtime import linux_cpu
from troupe.runtime.roles import Role

pytestmark = [pytest.mark.anyio, pytest.mark.alone, pytest.mark.no_cover]
SLOW = pytest.mark.slow
PATIENCE_S = 120.0
SIZES: dict[str, Any] = {
    "learner__batch_size": 5,
    "schedule__blas_threads": 1,
    "schedule__learner_streams": 1,
    "schedule__max_staleness": 1,
}
ROUNDS: dict[str, Any] = {"learner__dynamic_sampling": True, "learner__max_resampling_attempts": 2}


@pytest.fixture(autouse=True)
def as_many_threads_as_the_runs_have() -> Iterator[None]:
    """For the plain loop, whose products are rounded in the same way then."""
    with linux_cpu.blas_limited(1):
        yield


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_player(tmp_path_factory.mktemp("player"))


def whose(decoders: int) -> dict[str, Any]:
    """A thread for 0, else so many processes."""
    if not decoders:
        return {"schedule__generator": "thread"}
    return {"schedule__generator": "process", "schedule__generator_processes": decoders}


@pytest.mark.parametrize(
    ("parts", "decoders", "staleness"),
    [
        (2, 3, 1),
        pytest.param(2, 0, 1, marks=SLOW),
        pytest.param(3, 1, 0, marks=SLOW),
        pytest.param(3, 0, 0, marks=SLOW),
        pytest.param(2, 1, 1, marks=SLOW),
        pytest.param(2, 2, 0, marks=SLOW),
        pytest.param(3, 2, 2, marks=SLOW),
        pytest.param(5, 3, 0, marks=SLOW),
    ],
)
async def test_the_weights_are_those_of_the_plain_loop_that_decodes_part_by_part(
    tmp_path: Path, ragged_model: Path, parts: int, decoders: int, staleness: int
) -> None:
    settings = SIZES | {"schedule__parts": parts, "schedule__max_staleness": staleness} | whose(decoders)
    config = tiny_config(ragged_model, tmp_path, **settings)
    async with Supervisor(config, [delayed(seed=1)]) as run:
        await run.wait()
    assert run.result.incidents == {}
    assert same_bits(policy_of(run.result.folder), run_straight(config, weigh_ids).weights)


@SLOW
def test_how_many_parts_there_are_is_a_matter_of_bits(tmp_path: Path, ragged_model: Path) -> None:
    """Else the others would show nothing."""
    straight = [
        run_straight(tiny_config(ragged_model, tmp_path, **SIZES, schedule__parts=parts), weigh_ids).weights
        for parts in (1, 2)
    ]
    assert not same_bits(*straight)


@SLOW
@pytest.mark.parametrize("decoders", [0, 1, 3])
async def test_replacements_are_parts_of_their_own(tmp_path: Path, ragged_model: Path, decoders: int) -> None:
    config = tiny_config(ragged_model, tmp_path, **SIZES | ROUNDS | whose(decoders), schedule__parts=2)
    expected = run_straight(config, often_equal)
    assert sum(expected.filtered), "the case is worth its name"
    async with Supervisor(config, [delayed(2, reward=often_equal)]) as run:
        await run.wait()
    assert same_bits(policy_of(run.result.folder), expected.weights)


@SLOW
def test_episodes_are_the_same_whoever_decodes_them(
    player: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAME_DELAY_S", "0.01")
    found = []
    for staleness, several in ((0, (3,)), (1, (1, 2))):
        for decoders in (0, *several):
            folder = tmp_path / f"{staleness} {decoders}"
            settings = SIZES | {"schedule__parts": 2, "schedule__max_staleness": staleness} | whose(decoders)
            result = train(tiny_config(player, folder, **acting(folder, **settings)), [weigh_ids])
            assert result.incidents == {}
            found.append(policy_of(result.folder))
        assert all(same_bits(found[0], each) for each in found[1:])
        found.clear()


class Killer:
    """A reward, and somebody who kills processes of the generator meanwhile: one in `rarity` groups costs one."""

    def __init__(self, seed: int, rarity: int) -> None:
        self._dice = random.Random(seed)
        self._rarity = rarity
        self.generator: Role
        self.killed: set[int] = set()

    @property
    def _pids(self) -> set[int]:
        assert isinstance(self.generator.actor, RemoteGenerator)
        (source,) = self.generator.actor.sources
        assert isinstance(source, LocalProcesses)
        return set(source.pids)

    async def weigh_ids(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        alive = sorted(self._pids - self.killed)
        if alive and not self._dice.randrange(self._rarity):
            await anyio.sleep(self._dice.random() * 0.02)
            pid = self._dice.choice(alive)
            with suppress(ProcessLookupError):  # it has ended meanwhile
                if pid in self._pids - self.killed:
                    os.kill(pid, signal.SIGKILL)
                    self.killed.add(pid)
        return weigh_ids(completion_ids)


async def kill_through(config: Any, killer: Killer) -> RunResult:
    with anyio.fail_after(PATIENCE_S):
        async with Supervisor(config, [killer.weigh_ids]) as run:
            killer.generator = run._pipeline.roles[1]
            await run.wait()
    result = run.result
    assert set(result.incidents) == {"process_restarted"}
    assert result.incidents["process_restarted"] <= len(killer.killed), "one that nobody killed was restarted"
    return result


@SLOW
async def test_a_process_that_is_killed_costs_the_others_nothing(tmp_path: Path, ragged_model: Path) -> None:
    settings = SIZES | whose(2) | {"schedule__parts": 5, "generation__max_completion_length": 40}
    config = tiny_config(ragged_model, tmp_path, **settings)
    killer = Killer(seed=1, rarity=7)
    result = await kill_through(config, killer)
    assert killer.killed
    assert result.closed_groups == {"trained": 20}
    assert same_bits(policy_of(result.folder), run_straight(config, weigh_ids).weights)


@SLOW
async def test_twenty_processes_are_killed_and_no_bit_is_lost(tmp_path: Path, ragged_model: Path) -> None:
    settings = SIZES | whose(3) | {"schedule__parts": 3, "learner__max_steps": 24}
    config = tiny_config(ragged_model, tmp_path, **settings)
    killer = Killer(seed=1, rarity=4)
    result = await kill_through(config, killer)
    assert len(killer.killed) >= 20
    assert result.closed_groups == {"trained": 24 * 5}
    assert same_bits(policy_of(result.folder), run_straight(config, weigh_ids).weights)


@pytest.mark.soak
@SLOW
async def test_episodes_survive_kills(player: Path, tmp_path: Path) -> None:
    settings = SIZES | {"schedule__parts": 3, "learner__max_steps": 10}
    async with Supervisor(tiny_config(player, tmp_path, **acting(tmp_path, **settings | whose(0))), [weigh_ids]) as run:
        await run.wait()
    again = tmp_path / "again"
    killer = Killer(seed=3, rarity=4)
    result = await kill_through(tiny_config(player, again, **acting(again, **settings | whose(2))), killer)
    assert len(killer.killed) >= 3
    assert result.closed_groups == {"trained": 50}
    assert same_bits(policy_of(result.folder), policy_of(run.result.folder))


@pytest.mark.soak
@SLOW
@pytest.mark.parametrize("acts", [False, True])
async def test_the_free_schedule_survives_kills(ragged_model: Path, player: Path, tmp_path: Path, acts: bool) -> None:
    settings = SIZES | whose(2) | {"schedule__mode": "free", "learner__max_steps": 12}
    settings = acting(tmp_path, **settings) if acts else settings
    killer = Killer(seed=4, rarity=4)
    result = await kill_through(tiny_config(player if acts else ragged_model, tmp_path, **settings), killer)
    assert len(killer.killed) >= 3
    assert result.complete
    assert set(result.closed_groups) <= {"trained", "stale"}, "what a death held up may be too old"
    assert sum(result.closed_groups.values()) >= 60
