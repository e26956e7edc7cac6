"""Kills at bad moments: of processes of environments, and of the run that has them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.environments.acting import notes
from tests.environments.playing import PROMPT, playing, saying, told
from tests.rewards.scoring import is_alive
from troupe.environments.ledger import EpisodeName
from troupe.environments.manager import EnvironmentManager

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.alone]

TURNS = 12
RUN = """
import anyio, sys
from tests.environments.playing import config_of, played, saying
from troupe.environments.ledger import EpisodeName
from troupe.environments.loading import load_world
from troupe.environments.manager import EnvironmentManager

async def main():
    config = config_of("process", "Counter", ("act",), processes=2)
    async with EnvironmentManager(load_world(config), config) as manager:
        async with anyio.create_task_group() as group:
            for sample in range(4):
                what = saying(act={"what": "hang"}) if sample % 2 else saying("hang")
                group.start_soon(lambda: played(manager, what, name=EpisodeName(0, sample)))
            runner = manager._answerer.runner
            pids = [worker._child.pid for pool in (runner._environments, runner._tools) for worker in pool._all]
            print(*pids, flush=True)

anyio.run(main)
"""


async def play(manager: EnvironmentManager, name: EpisodeName, heard: dict[EpisodeName, list[str]]) -> None:
    await manager.open(name, PROMPT, {})
    heard[name] = []
    for turn in range(1, TURNS + 1):
        said = saying(double={"number": turn}) if turn % 3 == 0 else saying(f"{name.sample} {turn}")
        answer = await manager.answer(name, turn, (turn,), said)
        heard[name].append(answer.failed or told(answer))
        if answer.failed:
            break
        await anyio.sleep(0.02)
    ending = await manager.close(name, TURNS)
    heard[name].append(str(ending.reward))


async def heard_with(kills: int, factory: str) -> tuple[dict[EpisodeName, list[str]], list[str]]:
    """What 8 episodes have heard while processes were killed, and the kinds of incidents."""
    heard: dict[EpisodeName, list[str]] = {}
    chance = random.Random(5)
    async with playing("process", factory, ("double",), processes=2, retries=30) as (manager, incidents):
        runner: Any = manager._answerer.runner

        async def kill() -> None:
            for _ in range(kills):
                await anyio.sleep(chance.uniform(0.05, 0.35))
                workers = [worker for worker in runner._environments._all if not worker.is_over]
                if workers:
                    with suppress(ProcessLookupError):
                        os.kill(chance.choice(workers)._child.pid, signal.SIGKILL)

        async with anyio.create_task_group() as group:
            for sample in range(8):
                group.start_soon(play, manager, EpisodeName(sample // 4, sample % 4), heard)
            group.start_soon(kill)
    return heard, [incident.kind for incident in incidents]


@pytest.mark.parametrize("factory", ["Again", "AgainSaving"])
async def test_processes_that_are_killed_change_no_answer_where_it_may_be_asked_again(factory: str) -> None:
    straight, _ = await heard_with(0, factory)
    assert all(len(each) == TURNS + 1 for each in straight.values())
    before = Counter(notes())
    killed, incidents = await heard_with(20, factory)
    assert killed == straight
    assert incidents == []
    after = Counter(notes()) - before
    assert {note: count for note, count in after.items() if note.startswith("double")} == {
        note: count for note, count in before.items() if note.startswith("double")
    }
    assert after["made"] > before["made"]


async def test_processes_that_are_killed_cost_at_most_the_episodes_that_they_were_answering() -> None:
    straight, _ = await heard_with(0, "Counter")
    killed, incidents = await heard_with(6, "Counter")
    missing = [name for name, each in killed.items() if each[-1] == "None"]
    assert incidents == ["environment_died"] * len(missing)
    assert len(missing) <= 6
    assert all(killed[name] == straight[name] for name in killed if name not in missing)


def test_nothing_is_left_of_a_run_that_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "ACTING_NOTES": str(tmp_path / "notes")}
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        pids = [int(pid) for pid in run.stdout.readline().split()]
        run.kill()
    assert len(pids) == 4

    async def gone() -> None:
        with anyio.fail_after(10):
            while any(map(is_alive, pids)):  # noqa: ASYNC110 - nobody tells us
                await anyio.sleep(0.05)

    anyio.run(gone)
