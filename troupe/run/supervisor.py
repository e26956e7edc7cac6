"""Supervisor: the public face of a run. Start it, listen to it, ask it to end, read what became of it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe.dataset import stop_making_rows
from troupe.environments.loading import Factory
from troupe.messages import (
    NOT_STARTED,
    Checkpoint,
    Drain,
    GroupClosed,
    Incident,
    Pause,
    Resume,
    Status,
    Step,
    Update,
)
from troupe.rewards import Reward
from troupe.run.acting import Acting
from troupe.run.beside import Exchange, Requests, Setting
from troupe.run.cluster import opened
from troupe.run.config import RunConfig, check_config
from troupe.run.folder import RunFolder
from troupe.run.ledgers import Factories
from troupe.run.live import LiveRun
from troupe.run.pipeline import Pipeline, build_pipeline
from troupe.run.prepare import Prepared
from troupe.run.result import RunResult, remove_summary
from troupe.run.resume.changes import ChangesLog, check_change
from troupe.run.status import Progress
from troupe.run.tables import anchored_reward

_LISTENER_BOUND = 64

T = TypeVar("T", Update, Incident, GroupClosed)


class Supervisor:
    """Runs a run: `async with Supervisor(config, rewards=[...]) as run`.

    Entering loads and checks everything (InputError before anything is written) and starts the run; leaving waits
    until it has ended and raises what made it fail. An error in the body cancels the run.

    `pause`, `resume`, `step`, `drain`, `checkpoint`, `stop`, `set` and `exchange_reward` are requests: they return at
    once and may be made at any time, also by who reads `updates()`. What is asked before entering happens when the run
    has been loaded; after the end it changes nothing.
    """

    def __init__(
        self,
        config: RunConfig,
        rewards: Sequence[Reward] = (),
        *,
        resume: bool = False,
        allow_changes: Sequence[str] = (),
        tools: Sequence[Callable[..., Any]] = (),
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        factories: Factories | None = None,
    ) -> None:
        """`allow_changes`: keys in which the config may differ from that of the run that is resumed. `tools`: functions
        that the policy may call; `environment_factory`: what makes the environment that it acts in, or a table of such,
        one of which a row's column `environment` names; as in TRL. `factories`: what the run makes of threads, engines,
        files and sinks."""
        self.config = config
        self.notices: tuple[str, ...] = ()
        """What the user should know, one line each; filled on entering."""
        self.lost: tuple[str, ...] = ()
        """Those of them that tell of steps which files of the run have lost since it ran last."""
        self._rewards = rewards
        self._resume = resume
        self._allow_changes = tuple(allow_changes)
        self._acting = Acting(tools, environment_factory)
        self._entered = self._stopping = self._pausing = False
        self._requests: list[Callable[[Pipeline], None]] = []
        self._outside = Requests()
        self._progress = Progress()
        self._ended = anyio.Event()
        self._factories = Factories() if factories is None else factories
        self._device = self._factories.device("supervisor")
        self._place: RunFolder | None = None
        self._network = AsyncExitStack()
        self._live: LiveRun | None = None
        """There when everything is loaded."""
        self._pipeline: Pipeline
        self._prepared: Prepared
        """Without arrays, which belong to who works with them."""
        self._tasks: TaskGroup

    async def __aenter__(self) -> Supervisor:
        if self._entered:
            raise RuntimeError("this supervisor has been entered before; make another one for another run, or start")
        self._entered = True
        began_s = time.perf_counter()
        try:
            with self._progress.at("loading the model and the prompts"):
                place = await self._device.run(self._take_folder)
                prepared = await self._device.run(self._prepare, place, on_cancel=stop_making_rows)
            self.config, self.notices, self._prepared = prepared.config, prepared.notices, prepared.without_arrays()
            self.lost = prepared.start.lost
            hub = None
            if prepared.config.cluster.serve is not None:
                with self._progress.at("starting the message server"):
                    network = opened(prepared.config, place.path, self._factories.network)
                    hub = await self._network.enter_async_context(network)
                self.notices += hub.notices
            self._pipeline = build_pipeline(prepared, self._factories, check_folder=place.check, hub=hub)
            live = LiveRun(
                prepared,
                self._pipeline,
                place,
                self._device,
                self._outside,
                ended=self._ended,
                began_s=began_s,
                hub=hub,
            )
            self._tasks = anyio.create_task_group()
            await self._tasks.__aenter__()
        except BaseException:
            if self._place is not None:
                self._place.remove_traces()
            with anyio.CancelScope(shield=True):
                await self._network.aclose()
                self._leave()
                await self._device.close()
            raise
        self._live = live
        for request in self._requests:
            request(self._pipeline)
        if self._stopping:
            live.stop()
        self._tasks.start_soon(live.run, name="run")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # the body's error goes on as itself, not in a group
        finally:
            with anyio.CancelScope(shield=True):
                await self._network.aclose()
                self._leave()
                for device in (*self._pipeline.ledgers.devices.values(), self._device):
                    await device.close()
            if self._pipeline.ledgers.files is not None:
                self._pipeline.ledgers.files.close()
        fault = None if self._live is None else self._live.fault
        if fault is not None and error is None:
            raise fault

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._prepared.folder

    @property
    def result(self) -> RunResult:
        """What became of the run; RuntimeError before it has ended."""
        result = None if self._live is None else self._live.result
        if result is None:
            raise RuntimeError("the run has no result yet: leave the `async with` block, or await wait(), first")
        return result

    def updates(self, most_waiting: int = _LISTENER_BOUND) -> AsyncGenerator[Update, None]:
        """Every step's Update from now on, until the run ends. A slow reader gets the newest ones only.

        Raises RuntimeError where the supervisor was not entered.
        """
        return self._listen(Update, most_waiting)

    def incidents(self) -> AsyncGenerator[Incident, None]:
        """Every incident from now on; otherwise as `updates`."""
        return self._listen(Incident)

    def closed_groups(self) -> AsyncGenerator[GroupClosed, None]:
        """Every group that ends from now on, with its completions and their scores; otherwise as `updates`."""
        return self._listen(GroupClosed)

    async def _listen(self, kind: type[T], most_waiting: int = _LISTENER_BOUND) -> AsyncGenerator[T, None]:
        if self._live is None:
            raise RuntimeError("there is nothing to listen to yet: enter the supervisor with `async with` first")
        mailbox = self._pipeline.wiring.news.listen(most_waiting, kind)
        try:
            async for message in mailbox:
                yield message
        finally:
            self._pipeline.wiring.news.leave(mailbox)

    async def wait(self) -> None:
        """Wait until the run has ended, well or not."""
        await self._ended.wait()

    def status(self) -> Status:
        """What the run is doing now. May be asked at any time; it is put together when asked and costs little."""
        if self._live is not None:
            return self._live.status()
        return msgspec.structs.replace(NOT_STARTED, activity=self._progress.activity(time.perf_counter()))

    @property
    def pausing(self) -> bool:
        """Whether `pause` was asked for last, not `resume`; the status says so a moment later, when it is acted on."""
        return self._pausing

    def pause(self) -> None:
        """Ask that no step is begun until `resume`; steps begun are finished."""
        self._pausing = True
        self._ask(lambda pipeline: pipeline.wiring.control.send_nowait(Pause()))

    def resume(self) -> None:
        """Ask a paused run to go on."""
        self._pausing = False
        self._ask(lambda pipeline: pipeline.wiring.control.send_nowait(Resume()))

    def step(self, n: int = 1) -> None:
        """Ask a paused run to begin `n` ≥ 1 more steps and then to be paused still."""
        if n < 1:
            raise ValueError(f"step({n}): a run can go on by 1 step or more")
        self._ask(lambda pipeline: pipeline.wiring.control.send_nowait(Step(steps=n)))

    def drain(self) -> None:
        """Ask the run to end after the steps already begun, with checkpoint and final policy."""
        self._ask(lambda pipeline: pipeline.wiring.drain.send_nowait(Drain()))

    def checkpoint(self) -> None:
        """Ask for a checkpoint at the end of the step in hand."""
        self._ask(lambda pipeline: pipeline.wiring.checkpoint.send_nowait(Checkpoint()))

    def stop(self) -> None:
        """Ask the run to end now, with a checkpoint of the last completed step."""
        self._stopping = True
        if self._live is not None:
            self._live.stop()

    def remind(self, hint: str) -> None:
        """Have the status say in its `notice`, while the run is ending on request, what can be done next."""
        if self._live is not None:
            self._live.remind(hint)

    def exchange_reward(self, name: str, reward: Reward | str) -> None:
        """Ask for `reward`, or the one that a text names as the config does, in the place of the one called `name`, for
        all groups whose scoring begins afterwards.

        In the pinned schedule one that a text names takes over with the next step that is begun, unless the old one is
        down, and a resume keeps to that; one given in Python is gone with the process. One that is refused or does not
        start is an incident, and the old one goes on.
        """
        self._outside.exchanges.send_nowait(Exchange(name, anchored_reward(reward, Path.cwd())))

    async def check(self, key: str, value: Any) -> None:
        """See whether a value can be `set`, also where that takes a while: a reward is loaded in a process of its own
        first, and in this one then, within a minute. Raises InputError where it cannot."""
        names = self._prepared.inputs.rewards.names if self._live is not None else None
        value = check_change(self.config, key, value, names)
        section, _, name = key.partition(".")
        if section == "rewards" and names is not None:
            await self._prepared.inputs.rewards.examine(name, anchored_reward(value, Path.cwd()))

    def set(self, key: str, value: Any) -> None:
        """Ask for another value of one of the keys that may change while a run is live: `learner.lr`, from the next
        step on; `rewards.NAME`, a text as the config's, from the next step that is begun; `checkpoint.every`;
        `schedule.watchdog_s`. A resume keeps to it.

        ConfigError for another key, or a value that the config would refuse. What fails later is an incident.
        """
        names = self._prepared.inputs.rewards.names if self._live is not None else None
        value = check_change(self.config, key, value, names)
        section, _, name = key.partition(".")
        if section == "rewards":
            self.exchange_reward(name, value)
        else:
            self._outside.settings.send_nowait(Setting(key, value))

    def _ask(self, request: Callable[[Pipeline], None]) -> None:
        if self._live is not None:
            request(self._pipeline)
        else:
            self._requests.append(request)

    def _take_folder(self) -> RunFolder:
        """Before anything is loaded: where another run writes, that is all that there is to say."""
        self._place = RunFolder.take(check_config(self.config), resume=self._resume)
        return self._place  # who is cancelled meanwhile does not get it

    def _prepare(self, place: RunFolder) -> Prepared:
        config = msgspec.structs.replace(self.config, output=str(place.path))
        prepared = self._factories.prepare(
            config, self._rewards, resume=self._resume, allow_changes=self._allow_changes, acting=self._acting
        )
        place.check()  # loading takes a while
        remove_summary(place.path)  # before run.toml asks for more steps than it speaks of
        place.begin(prepared.config, prepared.start.evaluated)
        for change in prepared.start.new_changes:
            ChangesLog(place.path).add(change)
        return prepared

    def _leave(self) -> None:
        if self._place is not None:
            self._place.leave()


def train(
    config: RunConfig,
    rewards: Sequence[Reward] = (),
    *,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    tools: Sequence[Callable[..., Any]] = (),
    environment_factory: Factory | Mapping[str, Factory] | None = None,
    factories: Factories | None = None,
) -> RunResult:
    """Run to the end and return what became of it; the blocking form of `Supervisor`."""

    async def run() -> RunResult:
        async with Supervisor(
            config,
            rewards,
            resume=resume,
            allow_changes=allow_changes,
            tools=tools,
            environment_factory=environment_factory,
            factories=factories,
        ) as supervisor:
            await supervisor.wait()
        return supervisor.result

    return anyio.run(run)
