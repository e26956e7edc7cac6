"""What tests of rewards share: a manager and what it says of groups, and waiting for what comes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import anyio

from troupe.messages import RolloutGroup
from troupe.rewards import GroupScores, RewardManager, RewardsConfig


class Scoring:
    """A manager that tries once, and the scores of each group by its number."""

    def __init__(self, *rewards: Any, **settings: Any) -> None:
        self.manager = RewardManager(rewards, config=RewardsConfig(retries=0, breaker_max_wait_s=0.001, **settings))
        self.results: dict[int | None, GroupScores] = {}

    async def score(self, group: RolloutGroup) -> None:
        self.results[group.prompt.gid] = await self.manager.score_group(group)


async def no_sleep(seconds: float) -> None:
    await anyio.lowlevel.checkpoint()


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(30):
        while not condition():
            await anyio.lowlevel.checkpoint()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
