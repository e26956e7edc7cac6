"""What goes on beside the actors of a run. Requests from outside that are not their work are done: settings, and other
rewards in the place of those there. It is watched that something moves, and that the run folder stays in its place.

What changes the run is written down first, so that whoever resumes it makes the change again at the same step.
"""

import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import msgspec

from troupe.errors import FolderGoneError
from troupe.messages import LiveGroup, SetCheckpointEvery, SetLearningRate, Update
from troupe.records.layout import RUN_TOML
from troupe.records.standing import Change
from troupe.rewards import Reward
from troupe.rewards.exchange import RewardVersion
from troupe.run.folder import RunFolder
from troupe.run.pipeline import Pipeline
from troupe.run.prepare import Prepared
from troupe.run.resume.changes import ChangesLog
from troupe.run.status import last_movement_s, live_groups, stall
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Mailbox

_MOST_WAITING = 64
"""Exchanges of rewards, and settings, before the oldest is forgotten."""


class Exchange(msgspec.Struct, frozen=True):
    """A reward to be put in the place of another."""

    name: str
    reward: Reward | str


class Setting(msgspec.Struct, frozen=True):
    """A key of the config, checked, that is to have another value."""

    key: str
    value: Any


class Requests:
    """What is asked of a run; may be asked before there is one."""

    def __init__(self) -> None:
        self.inbox = Mailbox("supervisor")
        self.exchanges = self.inbox.channel("exchanges", Exchange, bound=_MOST_WAITING, overflow="drop_oldest")
        self.settings = self.inbox.channel("settings", Setting, bound=_MOST_WAITING, overflow="drop_oldest")


class RequestHandler:
    """Does what is asked of one run while its actors run."""

    def __init__(
        self,
        prepared: Prepared,
        pipeline: Pipeline,
        place: RunFolder,
        requests: Requests,
        *,
        set_watchdog: Callable[[float], None],
    ) -> None:
        """`set_watchdog`: called with `schedule.watchdog_s` when it is set."""
        self._batch_size = prepared.config.learner.batch_size
        self._is_pinned = prepared.config.schedule.mode == "pinned"
        self._later = [each for each in prepared.live.exchanges if each[0] > prepared.start.first_step]
        self._rewards = prepared.inputs.rewards
        self._changes = ChangesLog(prepared.folder)
        self._pipeline = pipeline
        self._report = pipeline.wiring.supervisor_report
        self._place = place
        self._requests = requests
        self._set_watchdog = set_watchdog
        self._replaced: list[tuple[str, RewardVersion, int]] = []

    async def exchange_as_before(self) -> None:
        """Have the rewards ready that take over at later steps, because they did so in a start before this one."""
        for step, name, spec in self._later:

            def at(was_down: bool, step: int = step) -> int:
                return step

            old = await self._rewards.replace(name, spec, at)
            self._replaced.append((name, old, step))

    async def run(self) -> None:
        """Do what is asked, for as long as it is awaited."""
        async with anyio.create_task_group() as tasks:
            for replaced in self._replaced:
                tasks.start_soon(self._stop_replaced, *replaced)
            async for request in self._requests.inbox:  # not in turn: an old reward that hangs would hold up all
                if isinstance(request, Exchange):
                    tasks.start_soon(self._exchange, request.name, request.reward)
                else:
                    await self._set(request.key, request.value)

    async def _set(self, key: str, value: Any) -> None:
        """Write down what is set, then do it; the learner writes down itself what it must do at a step."""
        if key == "learner.lr":
            self._pipeline.wiring.settings.send_nowait(SetLearningRate(lr=value))
            return
        change = Change(step=self._pipeline.learner.version, key=key, value=value)
        self._place.check()
        try:
            await anyio.to_thread.run_sync(self._changes.add, change)
        except OSError as error:
            self._pipeline.note(
                "change_failed", f"{key} was not set to {value}, since that could not be written down: {error}"
            )
            return
        if key == "checkpoint.every":
            self._pipeline.wiring.settings.send_nowait(SetCheckpointEvery(steps=value))
        else:
            self._set_watchdog(value)

    async def _exchange(self, name: str, reward: Reward | str) -> None:
        """A reward that a text names takes over with a step, so that whoever resumes can do the same."""
        step = 0

        def first_step(was_down: bool) -> int:
            nonlocal step
            if not isinstance(reward, str):
                return 0
            begun = -(-self._pipeline.ledgers.prompts.next // self._batch_size)
            step = begun if self._is_pinned and not was_down else self._pipeline.learner.version
            self._place.check()
            self._changes.add(Change(step=step, key=f"rewards.{name}", value=reward))  # no await: none begins meanwhile
            return step if self._is_pinned else 0

        try:
            old = await self._rewards.replace(name, reward, first_step)
        except Exception as error:
            message = f"the reward {name} was not exchanged, the old one goes on: {error}"
            self._pipeline.note("reward_exchange_failed", message)
            return
        await self._stop_replaced(name, old, step)

    async def _stop_replaced(self, name: str, old: RewardVersion, step: int) -> None:
        """Stop a reward that another takes over from in a step, when all steps before have ended."""
        await self._pipeline.ledgers.board.newer_than(step - 1)
        for incident in await self._rewards.stop_replaced(name, old):
            self._report.incident_nowait(incident)


class StallWatch:
    """Tells when nothing has moved for a while."""

    def __init__(self, pipeline: Pipeline, limit_s: float, may_rest: Callable[[], bool]) -> None:
        """`limit_s`: 0 is never. `may_rest`: whether it is no wonder that nothing moves where no group is alive."""
        self._pipeline = pipeline
        self._limit_s = limit_s
        self._may_rest = may_rest
        self._watching = anyio.CancelScope()

    def set_limit(self, limit_s: float) -> None:
        """Begin anew with another limit."""
        self._limit_s = limit_s
        self._watching.cancel()

    async def run(self) -> None:
        """Watch for as long as it is awaited."""
        begun_s = time.perf_counter()

        def moved_s() -> float:
            return max(begun_s, last_movement_s(self._pipeline.actors))

        while True:  # once more whenever the limit is set
            with anyio.CancelScope() as self._watching:
                if not self._limit_s:
                    await anyio.Event().wait()  # without a timer, which would hide that nothing can go on
                await watch(self._limit_s, moved_s, self._tell_of_stall, clock=time.perf_counter)

    def _tell_of_stall(self, still_s: float) -> None:
        now_s = time.perf_counter()
        groups = groups_of(self._pipeline, now_s)
        if groups or not self._may_rest():
            incident = stall(groups, self._pipeline.actors, now_s, still_s)
            self._pipeline.wiring.supervisor_report.incident_nowait(incident)


async def watch(
    limit_s: float,
    moved_s: Callable[[], float],
    tell: Callable[[float], None],
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
) -> None:
    """Call `tell(seconds without movement)` when nothing has moved for `limit_s`, and again each time that much has
    passed, until cancelled. `moved_s` says when something moved last, on `clock`."""
    told_s = -math.inf
    while True:
        await sleep(max(max(moved_s(), told_s) + limit_s - clock(), 0.0))
        now_s, last_s = clock(), moved_s()
        if now_s >= max(last_s, told_s) + limit_s:
            told_s = now_s
            tell(now_s - last_s)


def groups_of(pipeline: Pipeline, now_s: float) -> tuple[LiveGroup, ...]:
    """Groups between prompting and the end of their training, the oldest first."""
    ledgers = pipeline.ledgers
    return live_groups(ledgers.prompts.alive, pipeline.actors, now_s, handed_over=ledgers.handed_over)


async def watch_folder(place: RunFolder, pipeline: Pipeline, device: DeviceThread) -> None:
    """End the run where its folder is taken away: what would be written from then on is half a run."""

    def is_restored() -> bool:
        place.check()
        with suppress(OSError):  # a disk that fails now may not at the next step
            return place.restore_config()
        return False

    async for _ in pipeline.wiring.news.listen(1, Update):
        try:
            if await device.run(is_restored):
                pipeline.note("file_lost", f"{place.path / RUN_TOML} was removed under the run; it is stored again")
        except FolderGoneError as error:
            pipeline.note("folder_gone", str(error))
            raise
