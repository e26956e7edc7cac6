"""Supervisor: the public face of a run. Start it, listen to it, ask it to end, read what became of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe import linux_cpu
from troupe.budget import memory_limited
from troupe.config import RunConfig
from troupe.errors import InputError, RunError
from troupe.messages import Checkpoint, Drain, Incident, LiveGroup, Pause, Phase, Resume, Status, Step, Update
from troupe.pipeline import Pipeline, build_pipeline
from troupe.policy import Policy, load_policy
from troupe.prepare import Prepared, prepare
from troupe.rewards import Reward
from troupe.rollouts import Evaluation, evaluate
from troupe.run_folder import RunFolder
from troupe.runtime import DeviceThread, Mailbox, play, together
from troupe.runtime.watchdog import watch
from troupe.status import doing, last_movement_s, live_groups, queues, stall

_LISTENER_BOUND = 64
_EXCHANGES = 64
"""Exchanges of rewards that may wait for the one in hand before the oldest is forgotten."""


_NOT_LOADED = Status(
    phase="starting",
    step=0,
    total_steps=0,
    policy_version=0,
    groups=(),
    queues={},
    doing={},
    held=(),
    rewards_down={},
    restarts={},
    incidents={},
    metrics={},
)


class _Exchange(msgspec.Struct, frozen=True):
    """A reward to be put in the place of another."""

    name: str
    reward: Reward | str


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run; stored as `summary.json`."""

    folder: str
    steps: int
    """Learner batches completed, those before a resume included."""
    total_steps: int
    version: int
    """Policy version in `final/`."""
    wall_s: float
    """Seconds of this start, evaluation included."""
    closed_groups: dict[str, int]
    """Groups of this start by the state in which they closed."""
    incidents: dict[str, int]
    """Incidents of this start by kind."""
    switched_off_sinks: dict[str, str]
    accuracy_before: float | None = None
    """Share of held-out rows that the untrained policy, decoding greedily, answers exactly; None without such rows."""
    accuracy_after: float | None = None
    rewards_before: dict[str, float] = {}
    """Mean score of each reward on the held-out rows, greedy, before training."""
    rewards_after: dict[str, float] = {}

    @property
    def complete(self) -> bool:
        """Whether every step was made; otherwise the run can be resumed."""
        return self.steps >= self.total_steps


class Supervisor:
    """Plays a run: `async with Supervisor(config, rewards=[...]) as run`.

    Entering loads and checks everything (InputError before anything is written) and starts the run; leaving waits
    until it has ended and raises what made it fail. An error in the body cancels the run.

    `pause`, `resume`, `step`, `drain`, `checkpoint`, `stop` and `exchange_reward` are requests: they return at once and
    may be made at any time, also by who reads `updates()`. What is asked before entering happens when the run has been
    loaded; after the end it changes nothing.
    """

    def __init__(self, config: RunConfig, rewards: Sequence[Reward] = (), *, resume: bool = False) -> None:
        self.config = config
        self.notices: tuple[str, ...] = ()
        """What the user should know, one line each; filled on entering."""
        self._rewards = rewards
        self._resume = resume
        self._result: RunResult | None = None
        self._fault: BaseException | None = None
        self._stopping = False
        self._loaded = self._playing = False
        self._requests: list[Callable[[Pipeline], None]] = []
        self._errands = Mailbox("supervisor")
        self._exchanges = self._errands.channel("exchanges", _Exchange, bound=_EXCHANGES, overflow="drop_oldest")
        self._ended = anyio.Event()
        self._device = DeviceThread("supervisor")
        self._place: RunFolder | None = None
        self._pipeline: Pipeline
        self._scope: anyio.CancelScope
        self._prepared: Prepared
        self._newest_update: Mailbox
        self._tasks: TaskGroup

    async def __aenter__(self) -> Supervisor:
        self._started_s = time.perf_counter()
        self._scope = anyio.CancelScope()  # not before: one can be made only where an event loop runs
        try:
            self._prepared = await self._device.run(self._prepare)
            self.config, self.notices = self._prepared.config, self._prepared.notices
            self._place = RunFolder(self._prepared.folder)
            self._place.take(self.config)
            self._pipeline = build_pipeline(self._prepared)
            self._newest_update = self._pipeline.updates.listen(1)
            self._tasks = anyio.create_task_group()
            await self._tasks.__aenter__()
        except BaseException:
            self._leave()
            with anyio.CancelScope(shield=True):
                await self._device.close()
            raise
        self._loaded = True
        for request in self._requests:
            request(self._pipeline)
        if self._stopping:
            self._scope.cancel()
        self._tasks.start_soon(self._run, name="run")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)  # the body's error goes on as itself, not in a group
        finally:
            self._leave()
            with anyio.CancelScope(shield=True):
                for device in (*self._pipeline.devices, self._device):
                    await device.close()
            if self._pipeline.files is not None:
                self._pipeline.files.close()
        if self._fault is not None and error is None:
            raise self._fault

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._prepared.folder

    @property
    def result(self) -> RunResult:
        """What became of the run; RuntimeError before it has ended."""
        if self._result is None:
            raise RuntimeError("the run has no result yet: leave the `async with` block, or await wait(), first")
        return self._result

    async def updates(self) -> AsyncIterator[Update]:
        """Every step's Update from now on, until the run ends. A slow reader gets the newest ones only.

        Raises RuntimeError where the supervisor was not entered.
        """
        if not self._loaded:
            raise RuntimeError("there are no updates yet: enter the supervisor with `async with` first")
        mailbox = self._pipeline.updates.listen(_LISTENER_BOUND)
        try:
            async for update in mailbox:
                yield update
        finally:
            self._pipeline.updates.leave(mailbox)

    async def wait(self) -> None:
        """Wait until the run has ended, well or not."""
        await self._ended.wait()

    def status(self) -> Status:
        """What the run is doing now. May be asked at any time; it is put together when asked and costs little."""
        if not self._loaded:
            return _NOT_LOADED
        pipeline, now_s = self._pipeline, time.perf_counter()
        updates = self._newest_update.waiting
        return Status(
            phase=self._phase,
            step=pipeline.learner.version,
            total_steps=self._prepared.total_steps,
            policy_version=pipeline.learner.version,
            groups=self._live_groups(now_s),
            queues=queues(pipeline.actors),
            doing={} if self._ended.is_set() else doing(pipeline.actors, now_s),
            held=pipeline.ledger.held,
            rewards_down=dict(self._prepared.rewards.down),
            restarts={role.name: role.restarts for role in pipeline.roles if role.restarts},
            incidents=dict(pipeline.tally.incidents),
            metrics=dict(updates[-1].metrics) if updates else {},
        )

    def pause(self) -> None:
        """Ask that no step is begun until `resume`; steps begun are finished."""
        self._ask(lambda pipeline: pipeline.control.send_nowait(Pause()))

    def resume(self) -> None:
        """Ask a paused run to go on."""
        self._ask(lambda pipeline: pipeline.control.send_nowait(Resume()))

    def step(self, n: int = 1) -> None:
        """Ask a paused run to begin `n` ≥ 1 more steps and then to be paused still."""
        if n < 1:
            raise ValueError(f"step({n}): a run can go on by 1 step or more")
        self._ask(lambda pipeline: pipeline.control.send_nowait(Step(steps=n)))

    def drain(self) -> None:
        """Ask the run to end after the steps already begun, with checkpoint and final policy."""
        self._ask(lambda pipeline: pipeline.drain.send_nowait(Drain()))

    def checkpoint(self) -> None:
        """Ask for a checkpoint at the end of the step in hand."""
        self._ask(lambda pipeline: pipeline.checkpoint.send_nowait(Checkpoint()))

    def stop(self) -> None:
        """Ask the run to end now, with a checkpoint of the last completed step."""
        if self._ended.is_set():
            return
        self._stopping = True
        if self._loaded:
            self._scope.cancel()

    def exchange_reward(self, name: str, reward: Reward | str) -> None:
        """Ask for `reward`, or the one that a text names as the config does, in the place of the one called `name`, for
        all groups whose scoring begins afterwards.

        One that is refused or does not start is an incident, and the old one goes on.
        """
        self._exchanges.send_nowait(_Exchange(name, reward))

    def _ask(self, request: Callable[[Pipeline], None]) -> None:
        if self._loaded:
            request(self._pipeline)
        else:
            self._requests.append(request)

    @property
    def _phase(self) -> Phase:
        ledger = self._pipeline.ledger
        phases: list[tuple[bool, Phase]] = [
            (self._fault is not None, "failed"),
            (self._ended.is_set(), "ended"),
            (self._stopping, "stopping"),
            (not self._playing, "starting"),
            (ledger.draining, "draining"),
            (ledger.steps_allowed is not None, "paused"),
            (bool(ledger.held), "held"),
        ]
        return next((phase for holds, phase in phases if holds), "running")

    def _live_groups(self, now_s: float) -> tuple[LiveGroup, ...]:
        pipeline = self._pipeline
        return live_groups(pipeline.ledger.alive, pipeline.actors, now_s, handed_over=pipeline.handed_over)

    def _prepare(self) -> Prepared:
        return prepare(self.config, self._rewards, resume=self._resume)

    def _leave(self) -> None:
        if self._place is not None:
            self._place.leave()

    async def _run(self) -> None:
        try:
            await self._play()
        except InputError as error:
            self._fault = error
            if self._place is not None and self._pipeline.learner.version == 0:
                self._place.remove_traces()
        except Exception as error:
            self._fault = error
        finally:
            self._pipeline.updates.close()
            self._ended.set()

    async def _play(self) -> None:
        rewards, tally = self._prepared.rewards, self._pipeline.tally
        before = after = None
        try:
            threads = self.config.schedule.blas_threads
            with self._scope, memory_limited(self._prepared.memory.limit_gb), linux_cpu.blas_limited(threads):
                await rewards.start()
                before = await self._evaluate(await self._untrained_policy())
                self._prepared = self._prepared.without_arrays()
                await self._perform()
                after = await self._evaluate(self._trained_policy())
            if self._stopping:
                await self._write_checkpoint()
        finally:
            for incident in (*await rewards.stop(), *self._pipeline.untold):
                tally.incidents[incident.kind] += 1
            with anyio.CancelScope(shield=True):
                await self._pipeline.sinks.close()
        self._write_summary(before, after)

    async def _perform(self) -> None:
        """Play; meanwhile watch, and run errands."""
        beside = anyio.CancelScope()

        async def performance() -> None:
            await play(self._pipeline.roles)
            beside.cancel()

        async def company() -> None:
            with beside:
                await together([self._watch, self._run_errands])

        self._playing = True
        await together([performance, company])

    async def _watch(self) -> None:
        limit_s = self.config.schedule.watchdog_s
        begun_s = time.perf_counter()

        def moved_s() -> float:
            return max(begun_s, last_movement_s(self._pipeline.actors))

        if limit_s:
            await watch(limit_s, moved_s, self._tell_of_stall, clock=time.perf_counter)

    def _tell_of_stall(self, still_s: float) -> None:
        now_s = time.perf_counter()
        groups = self._live_groups(now_s)
        if groups or self._phase not in ("paused", "held"):
            self._pipeline.incidents.incident_nowait(stall(groups, self._pipeline.actors, now_s, still_s))

    async def _run_errands(self) -> None:
        async with anyio.create_task_group() as tasks:
            async for errand in self._errands:  # not one after the other: an old reward that hangs would hold up all
                tasks.start_soon(self._exchange, errand.name, errand.reward)

    async def _exchange(self, name: str, reward: Reward | str) -> None:
        tell = self._pipeline.incidents.incident_nowait
        try:
            for incident in await self._prepared.rewards.exchange(name, reward):
                tell(incident)
        except Exception as error:
            message = f"the reward {name} was not exchanged, the old one goes on: {error}"
            tell(Incident(actor="supervisor", kind="reward_exchange_failed", message=message))

    async def _write_checkpoint(self) -> None:
        snapshot = self._pipeline.learner.snapshot()
        try:
            with anyio.CancelScope(shield=True):
                await self._device.run(self._pipeline.write_snapshot, snapshot)
        except OSError as error:
            raise RunError(
                f"{self.folder}: the checkpoint of step {snapshot.version} could not be written: {error}; the one "
                "before it stays"
            ) from error

    async def _untrained_policy(self) -> Policy:
        """The policy as it was before step 0, read again where this start goes on from a checkpoint."""
        if self._prepared.checkpoint is None or self._prepared.evaluation is None:
            return self._prepared.policy
        return await self._device.run(load_policy, self._prepared.source, self.config.model.dtype)

    def _trained_policy(self) -> Policy:
        policy = self._prepared.policy
        return Policy(policy.config, self._pipeline.learner.weights, policy.path)

    async def _evaluate(self, policy: Policy) -> Evaluation | None:
        held_out = self._prepared.evaluation
        if held_out is None:
            return None
        greedy = msgspec.structs.replace(self.config.generation, temperature=0.0)
        evaluation = await evaluate(
            policy,
            held_out.dataset,
            held_out.prompt_ids,
            generation=greedy,
            device=self._device,
            rewards=self._prepared.rewards,
        )
        self._pipeline.tally.incidents.update(incident.kind for incident in evaluation.incidents)
        return evaluation

    def _write_summary(self, before: Evaluation | None, after: Evaluation | None) -> None:
        tally, version = self._pipeline.tally, self._pipeline.learner.version
        self._result = RunResult(
            folder=str(self.folder),
            steps=version,
            total_steps=self._prepared.total_steps,
            version=version,
            wall_s=time.perf_counter() - self._started_s,
            closed_groups=dict(tally.closed_groups),
            incidents=dict(tally.incidents),
            switched_off_sinks=dict(tally.switched_off_sinks),
            accuracy_before=before.accuracy if before else None,
            accuracy_after=after.accuracy if after else None,
            rewards_before=before.rewards if before else {},
            rewards_after=after.rewards if after else {},
        )
        summary = msgspec.json.format(msgspec.json.encode(self._result), indent=2)
        (self.folder / "summary.json").write_bytes(summary + b"\n")


def train(config: RunConfig, rewards: Sequence[Reward] = (), *, resume: bool = False) -> RunResult:
    """Play a run to its end and return what became of it; the blocking form of `Supervisor`."""

    async def run() -> RunResult:
        async with Supervisor(config, rewards, resume=resume) as supervisor:
            await supervisor.wait()
        return supervisor.result

    return anyio.run(run)
