"""The other ranks: what they are told, and that one that dies, falls silent or hangs ends the run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import pytest

from tests.support.fake_rank import HARM
from tests.support.fakes import Reports, device_thread
from tests.support.tiny import CONFIG
from troupe.actors.learner.collective import Meeting
from troupe.actors.learner.rank_wire import RankSetup, pack_batch, unpack_batch
from troupe.actors.learner.ranks import RankProcesses
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.errors import RunError
from troupe.grpo import LearnerConfig, adamw_init, make_batch
from troupe.policy import random_policy

pytestmark = pytest.mark.anyio
LEARNER = LearnerConfig(batch_size=2, lr=1e-2, lanes=4, num_iterations=2, lr_scheduler="constant")


class Here:
    """Rank 0, which meets nobody."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.rank, self.size = rank, meeting.size
        self.waiting_since_s: float | None = None
        self.broken: str | None = None

    def join(self) -> None:
        pass

    def break_up(self, why: str) -> None:
        self.broken = why


class Rig:
    """A learner's ranks, three of them children that do each what is named."""

    def __init__(self, folder: Path, *harms: str) -> None:
        self.reports, self.ended, self.here = Reports(), list[str](), list[Here]()
        self.hung = anyio.Event()
        names = {"reward_weights": {}, "temperature": 1.0, "max_completion_length": 8, "pad_id": 0, "total_steps": 5}
        self.trainer = BatchTrainer(LEARNER, CONFIG, **names)  # type: ignore[arg-type]
        setup: dict[str, Any] = {"learner": LEARNER, "policy": CONFIG, "temperature": 1.0, "max_completion_length": 8}
        self.ranks = RankProcesses(
            RankSetup(**setup, pad_id=0, total_steps=5, streams=1, seed=0, on_cpu=True),
            [{HARM: harm} for harm in harms],
            backend="ring",
            folder=folder,
            silent_s=0.6,
            trainer=self.trainer,
            report=self.reports.reporter("learner"),
            end=self._end,
            grace_s=0.3,
            module="tests.support.fake_rank",
            here=self._made,  # type: ignore[arg-type]
        )
        weights = random_policy(CONFIG, seed=3).weights
        self.state = LearnerState(version=2, weights=weights, optimizer_state=adamw_init(weights))
        mx.eval(weights, self.state.optimizer_state)

    def _end(self, message: str) -> None:
        self.ended.append(message)
        self.hung.set()

    def _made(self, meeting: Meeting, rank: int) -> Here:
        self.here.append(Here(meeting, rank))
        return self.here[0]

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        device = device_thread("learner")
        try:
            await self.ranks.start(self.state, device)
            await self.ranks.meet(device)
            yield
        finally:
            await self.ranks.aclose()


async def test_a_step_is_told_and_a_rank_that_dies_of_it_ends_the_others(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "none", "dies")
    rig.trainer.set_rate(2, 0.125)

    async def learn() -> None:
        async with rig.started(), anyio.create_task_group() as tasks:
            tasks.start_soon(rig.ranks.watch)
            rig.trainer.told(2, None, rig.trainer.learning_rates(2))
            with anyio.fail_after(10):
                await anyio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await learn()
    assert caught.group_contains(RunError, match=r"rank 2: .*exit code 5[\s\S]*asked to learn at \[0.125, 0.125\]")
    (told,) = await rig.reports.incidents()
    assert (told.kind, told.message) == ("rank_lost", rig.here[0].broken)
    assert rig.ranks.statuses() == ()
    assert not rig.ended


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        ("silent", "rank 1: not heard of"),
        pytest.param("stuck", "all of them have waited", marks=[pytest.mark.slow, pytest.mark.alone]),
    ],
)
async def test_ranks_that_hang_with_this_one_end_the_process(tmp_path: Path, harm: str, why: str) -> None:
    rig = Rig(tmp_path, harm)
    async with rig.started(), anyio.create_task_group() as tasks:
        tasks.start_soon(rig.ranks.watch)
        rig.here[0].waiting_since_s = 1.0  # in a collective that never returns
        with anyio.fail_after(10):
            await rig.hung.wait()
        assert [status.state for status in rig.ranks.statuses()] == ["lost"]
        tasks.cancel_scope.cancel()
    assert why in rig.ended[0]


async def test_a_rank_that_cannot_begin_says_why(tmp_path: Path) -> None:
    rig = Rig(tmp_path, "refuses")
    with pytest.raises(BaseExceptionGroup) as caught:
        async with rig.started():
            raise AssertionError
    assert caught.group_contains(RunError, match="rank 1 could not be started: no room")


def test_a_batch_comes_over_as_it_is() -> None:
    nan = float("nan")
    batch = make_batch(
        [(1, 2), (3,)], [(4, 5, 6), ()], [(-0.5, nan, -1e-30), ()], [0.25, -3.0], pad_id=7, truncated=[True, False]
    )
    for advantages in (batch.advantages, mx.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])):
        whole = type(batch)(**{**vars(batch), "advantages": advantages, "keys": ((1, 2), (3, 4)), "samples": (0, 0)})
        found = unpack_batch(pack_batch(whole))
        for name in ("prompts", "completions", "truncated", "pad_id", "keys", "experts", "samples"):
            assert getattr(found, name) == getattr(whole, name)
        for name in ("completion_mask", "advantages", "sampling_log_probs"):
            assert mx.array_equal(getattr(found, name), getattr(whole, name), equal_nan=True).item()
