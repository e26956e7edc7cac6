"""LiveRun: one run from its first reward to its last file, with all that goes on beside the play.

It is given a prepared run and a built pipeline, plays them to the end, and keeps what came of it. Knows nothing of who
asks for what: that is the Supervisor's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import msgspec

from troupe.errors import FolderGoneError, InputError, RewardError, RunError
from troupe.messages import Activity, Incident, LiveGroup, Phase, SetCheckpointEvery, SetLearningRate, Status, Update
from troupe.policy import Policy, load_policy
from troupe.records.layout import RUN_TOML
from troupe.rewards import Reward
from troupe.rewards.exchange import RewardVersion
from troupe.run.activity import Progress, of_actors, with_waits
from troupe.run.evaluate import Evaluation, evaluate
from troupe.run.folder import RunFolder
from troupe.run.pipeline import Pipeline
from troupe.run.prepare import Prepared
from troupe.run.result import RunResult, write_summary
from troupe.run.resume.changes import Change, ChangesLog
from troupe.run.status import doing, last_movement_s, live_groups, queues, stall
from troupe.runtime import linux_cpu
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.memory import memory_limited, memory_wired
from troupe.runtime.roles import run_roles, together
from troupe.runtime.watchdog import watch

_EXCHANGES = 64
"""Exchanges of rewards, and settings, that may wait before the oldest is forgotten."""
_STATUS_EVERY_S = 1.0
"""For sinks that show what the run is doing."""


class Exchange(msgspec.Struct, frozen=True):
    """A reward to be put in the place of another."""

    name: str
    reward: Reward | str


class Setting(msgspec.Struct, frozen=True):
    """A key of the config, checked, that is to have another value."""

    key: str
    value: Any


class Errands:
    """What is asked of a run that is not its actors' work; may be asked before there is one."""

    def __init__(self) -> None:
        self.inbox = Mailbox("supervisor")
        self.exchanges = self.inbox.channel("exchanges", Exchange, bound=_EXCHANGES, overflow="drop_oldest")
        self.settings = self.inbox.channel("settings", Setting, bound=_EXCHANGES, overflow="drop_oldest")


class LiveRun:
    """Made and `run` within an event loop, once."""

    def __init__(
        self,
        prepared: Prepared,
        pipeline: Pipeline,
        place: RunFolder,
        device: DeviceThread,
        errands: Errands,
        *,
        ended: anyio.Event,
        began_s: float,
    ) -> None:
        """`device`: the thread that held-out rows are answered in, and that the last checkpoint of a run that was
        stopped is written in. `ended`: set at the end. `began_s`: when the run was begun (`time.perf_counter`)."""
        self.result: RunResult | None = None
        self.fault: BaseException | None = None
        """What made the run fail."""
        self._ended = ended
        self._began_s = began_s
        self._prepared = prepared
        self._pipeline = pipeline
        self._place = place
        self._device = device
        self._errands = errands
        self._report = pipeline.wiring.supervisor_report
        self._scope = anyio.CancelScope()
        self._changes = ChangesLog(prepared.folder)
        self._watchdog_s = prepared.live.watchdog_s
        self._watching = anyio.CancelScope()
        self._stopping = self._playing = False
        self._hint = ""
        self._before: Evaluation | None = None
        self._after: Evaluation | None = None
        self._farewells: list[tuple[str, RewardVersion, int]] = []
        self._stage = Progress()
        self._newest_update = pipeline.wiring.news.listen(1, Update)

    def stop(self) -> None:
        """End now, with a checkpoint of the last completed step."""
        if not self._ended.is_set():
            self._stopping = True
            self._scope.cancel()

    def remind(self, hint: str) -> None:
        """Say with the notice what can be done next; at once where the status is shown."""
        self._hint = hint
        if self._pipeline.ledgers.sinks.take(Status):
            self._pipeline.ledgers.sinks.write(self.status())

    @property
    def notice(self) -> str:
        """What a run does that was asked to end; empty where it was not, and when it has ended."""
        version, ledger = self._pipeline.learner.version, self._pipeline.ledgers.prompts
        if self._ended.is_set() or not (self._stopping or ledger.draining or self._hint):
            return ""
        begun = -(-ledger.next // self._prepared.config.learner.batch_size)
        doing = f"finishing step {begun}" if begun <= version + 1 else f"finishing steps {version + 1} to {begun}"
        if self._stopping:
            doing = f"stopping, saving step {version}"
        elif begun <= version:
            doing = "finishing"
        return f"{doing}; {self._hint}" if self._hint else doing

    @property
    def phase(self) -> Phase:
        """Where the run stands."""
        ledger = self._pipeline.ledgers.prompts
        phases: list[tuple[bool, Phase]] = [
            (self.fault is not None, "failed"),
            (self._ended.is_set(), "ended"),
            (self._stopping, "stopping"),
            (not self._playing, "starting"),
            (ledger.draining, "draining"),
            (ledger.steps_allowed is not None, "paused"),
            (bool(ledger.held), "held"),
        ]
        return next((phase for holds, phase in phases if holds), "running")

    def status(self) -> Status:
        """What the run is doing now."""
        pipeline, now_s = self._pipeline, time.perf_counter()
        updates = self._newest_update.waiting
        return Status(
            phase=self.phase,
            step=pipeline.learner.version,
            total_steps=self._prepared.inputs.total_steps,
            policy_version=pipeline.learner.version,
            groups=self._live_groups(now_s),
            queues=queues(pipeline.actors),
            doing={} if self._ended.is_set() else doing(pipeline.actors, now_s),
            held=pipeline.ledgers.prompts.held,
            rewards_down=dict(self._prepared.inputs.rewards.down),
            restarts={role.name: role.restarts for role in pipeline.roles if role.restarts},
            incidents=dict(pipeline.ledgers.tally.incidents),
            metrics=dict(updates[-1].metrics) if updates else {},
            activity=None if self._ended.is_set() else self._activity(now_s),
            notice=self.notice,
        )

    def _activity(self, now_s: float) -> Activity | None:
        prepared, at = self._prepared, self._stage.activity(now_s)
        if at is not None and prepared.inputs.rewards.starting is not None:
            at = msgspec.structs.replace(at, what=f"starting the reward {prepared.inputs.rewards.starting}")
        if at is None and self._playing:
            at = of_actors(self._pipeline.actors, now_s, prepared.config.generation.max_completion_length)
        return with_waits(at, prepared.inputs.rewards.waits)

    def _live_groups(self, now_s: float) -> tuple[LiveGroup, ...]:
        """Groups between prompting and the end of their training, the oldest first."""
        pipeline = self._pipeline
        return live_groups(
            pipeline.ledgers.prompts.alive, pipeline.actors, now_s, handed_over=pipeline.ledgers.handed_over
        )

    async def run(self) -> None:
        """Play the run to its end, well or not; then `result` or `fault` is there, and `ended` is set."""
        try:
            await self._play()
        except InputError as error:
            self.fault = error
            if self._pipeline.learner.version == 0:
                self._place.remove_traces()
        except Exception as error:
            self.fault = error if isinstance(error, FolderGoneError) else self._place.gone() or error
        finally:
            self._pipeline.wiring.news.close()
            self._ended.set()

    async def _play(self) -> None:
        rewards, pipeline = self._prepared.inputs.rewards, self._pipeline
        pipeline.ledgers.sinks.open()
        try:
            await _beside(self._tell_sinks, self._play_told)
        finally:
            with self._stage.at("stopping the rewards"):
                for incident in await rewards.stop():
                    pipeline.tell(incident)
            for incident in pipeline.unread_incidents:
                pipeline.tell(incident)
            with anyio.CancelScope(shield=True):
                for incident in await pipeline.ledgers.sinks.close():
                    pipeline.tell(incident)
            pipeline.ledgers.tally.switched_off_sinks.update(pipeline.ledgers.sinks.switched_off)
        self._place.check()
        self.result = self._what_came_of_it()
        write_summary(self.result)

    async def _play_told(self) -> None:
        """All of it, while the sinks that show it are told."""
        threads = self._prepared.config.schedule.blas_threads
        limit_gb, wired_gb = self._prepared.memory.limit_gb, self._prepared.config.wired_limit_gb
        with self._scope, memory_limited(limit_gb), memory_wired(wired_gb), linux_cpu.blas_limited(threads):
            if self._prepared.start.checkpoint is not None:
                self._prepared.inputs.rewards.trust()
            with self._stage.at("starting the rewards"):
                await self._start_rewards()
            await _beside(self._run_errands, self._perform)
        if self._stopping:
            with self._stage.at(f"saving step {self._pipeline.learner.version:,}"):
                await self._write_checkpoint()

    async def _start_rewards(self) -> None:
        """RunError where one does not start that an earlier start had: a judge that is away may come back."""
        try:
            await self._prepared.inputs.rewards.start()
            await self._exchange_as_before()
        except RewardError as error:
            if not self._prepared.rewards_worked:
                raise
            raise RunError(f"{error}; an earlier start named it too, so it may come back") from error

    async def _perform(self) -> None:
        """Evaluate, play under watch, and evaluate again."""
        self._before = await self._evaluate(await self._untrained_policy(), "held-out rows")
        self._prepared = self._prepared.without_arrays()
        self._playing = True
        for message in self._prepared.start.lost:
            self._tell("steps_lost", message)
        playing = partial(_beside, self._watch, partial(run_roles, self._pipeline.roles))
        await _beside(self._watch_folder, playing)
        self._after = await self._evaluate(self._trained_policy(), "held-out rows after training")

    async def _tell_sinks(self) -> None:
        """Have those sinks that show it know what the run is doing."""
        while self._pipeline.ledgers.sinks.take(Status):
            self._pipeline.ledgers.sinks.write(self.status())
            await anyio.sleep(_STATUS_EVERY_S)

    async def _watch_folder(self) -> None:
        """End the run where its folder is taken away: what would be written from then on is half a run."""
        updates = self._pipeline.wiring.news.listen(1, Update)
        async for _ in updates:
            try:
                if await self._device.run(self._look_at_folder):
                    message = f"{self._place.path / RUN_TOML} was removed under the run; it is stored again"
                    self._tell("file_lost", message)
            except FolderGoneError as error:
                self._tell("folder_gone", str(error))
                raise

    def _look_at_folder(self) -> bool:
        """Whether the config had to be stored again. FolderGoneError where the folder is not in its place."""
        self._place.check()
        with suppress(OSError):  # a disk that fails now may not at the next step
            return self._place.restore_config()
        return False

    def _tell(self, kind: str, message: str) -> None:
        self._report.incident_nowait(Incident(actor="supervisor", kind=kind, message=message))

    async def _watch(self) -> None:
        begun_s = time.perf_counter()

        def moved_s() -> float:
            return max(begun_s, last_movement_s(self._pipeline.actors))

        while True:  # once more whenever the limit is set
            with anyio.CancelScope() as self._watching:
                if not self._watchdog_s:
                    await anyio.Event().wait()  # without a timer, which would hide that nothing can go on
                await watch(self._watchdog_s, moved_s, self._tell_of_stall, clock=time.perf_counter)

    def _tell_of_stall(self, still_s: float) -> None:
        now_s = time.perf_counter()
        groups = self._live_groups(now_s)
        if groups or self.phase not in ("paused", "held"):
            self._report.incident_nowait(stall(groups, self._pipeline.actors, now_s, still_s))

    async def _run_errands(self) -> None:
        async with anyio.create_task_group() as tasks:
            for farewell in self._farewells:
                tasks.start_soon(self._dismiss, *farewell)
            async for errand in self._errands.inbox:  # not in turn: an old reward that hangs would hold up all
                if isinstance(errand, Exchange):
                    tasks.start_soon(self._exchange, errand.name, errand.reward)
                else:
                    await self._set(errand.key, errand.value)

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
            message = f"{key} was not set to {value}, since that could not be written down: {error}"
            self._report.incident_nowait(Incident(actor="supervisor", kind="change_failed", message=message))
            return
        if key == "checkpoint.every":
            self._pipeline.wiring.settings.send_nowait(SetCheckpointEvery(steps=value))
        else:
            self._watchdog_s = value
            self._watching.cancel()

    async def _exchange_as_before(self) -> None:
        """Have the rewards ready that take over at later steps, because they did so in a start before this one."""
        for step, name, spec in self._prepared.live.exchanges:
            if step > self._prepared.start.first_step:
                old = await self._prepared.inputs.rewards.replace(name, spec, partial(_at, step))
                self._farewells.append((name, old, step))

    async def _exchange(self, name: str, reward: Reward | str) -> None:
        """A reward that a text names takes over with a step, so that whoever resumes can do the same."""
        pipeline, step = self._pipeline, 0

        def first_step(was_down: bool) -> int:
            nonlocal step
            if not isinstance(reward, str):
                return 0
            config, version = self._prepared.config, pipeline.learner.version
            begun = -(-pipeline.ledgers.prompts.next // config.learner.batch_size)
            step = begun if config.schedule.mode == "pinned" and not was_down else version
            self._place.check()
            self._changes.add(Change(step=step, key=f"rewards.{name}", value=reward))  # no await: none begins meanwhile
            return step if config.schedule.mode == "pinned" else 0

        try:
            old = await self._prepared.inputs.rewards.replace(name, reward, first_step)
        except Exception as error:
            message = f"the reward {name} was not exchanged, the old one goes on: {error}"
            self._report.incident_nowait(Incident(actor="supervisor", kind="reward_exchange_failed", message=message))
            return
        await self._dismiss(name, old, step)

    async def _dismiss(self, name: str, old: RewardVersion, step: int) -> None:
        """Stop a reward that another takes over from in a step, when all steps before have ended."""
        await self._pipeline.ledgers.board.newer_than(step - 1)
        for incident in await self._prepared.inputs.rewards.stop_replaced(name, old):
            self._report.incident_nowait(incident)

    async def _write_checkpoint(self) -> None:
        pipeline, snapshot = self._pipeline, self._pipeline.learner.snapshot()
        try:
            with anyio.CancelScope(shield=True):
                pipeline.ledgers.sinks.settle(snapshot.version)  # Metrics has read all that was told, and has ended
                if not await pipeline.ledgers.sinks.settled(snapshot.version):
                    message = (
                        f"not all that was told of the steps up to {snapshot.version} is on the disk yet, but its "
                        "checkpoint is written"
                    )
                    pipeline.tell(Incident(actor="supervisor", kind="checkpoint_unsettled", message=message))
                await self._device.run(pipeline.ledgers.writer.write, snapshot)
        except OSError as error:
            raise RunError(
                f"{self._prepared.folder}: the checkpoint of step {snapshot.version} could not be written: {error}; "
                "the one before it stays"
            ) from error

    async def _untrained_policy(self) -> Policy:
        """The policy as it was before step 0, read again where this start goes on from a checkpoint."""
        if self._prepared.start.checkpoint is None or self._prepared.inputs.evaluation is None:
            return self._prepared.start.policy
        with self._stage.at("loading the policy as it was before step 1"):
            read = await self._device.run(load_policy, self._prepared.inputs.source, self._prepared.config.model.dtype)
        return self._prepared.start.policy.having(read.weights)

    def _trained_policy(self) -> Policy:
        policy = self._prepared.start.policy
        return policy.having(self._pipeline.learner.weights)

    async def _evaluate(self, policy: Policy, what: str) -> Evaluation | None:
        held_out = self._prepared.inputs.evaluation
        if held_out is None:
            return None

        def tell(incident: Incident) -> None:  # its gid is the number of a row
            self._pipeline.tell(msgspec.structs.replace(incident, gid=None, message=f"{what}: {incident.message}"))

        greedy = msgspec.structs.replace(self._prepared.config.generation, temperature=0.0)
        with self._stage.at(what) as stage:
            return await evaluate(
                policy,
                held_out.dataset,
                held_out.prompt_ids,
                generation=greedy,
                device=self._device,
                rewards=self._prepared.inputs.rewards,
                progress=stage,
                tell=tell,
            )

    def _what_came_of_it(self) -> RunResult:
        before, after = self._before, self._after
        tally, version = self._pipeline.ledgers.tally, self._pipeline.learner.version
        return RunResult(
            folder=str(self._prepared.folder),
            steps=version,
            total_steps=self._prepared.inputs.total_steps,
            version=version,
            wall_s=time.perf_counter() - self._began_s,
            closed_groups=dict(tally.closed_groups),
            incidents=dict(tally.incidents),
            switched_off_sinks=dict(tally.switched_off_sinks),
            accuracy_before=before.accuracy if before else None,
            accuracy_after=after.accuracy if after else None,
            rewards_before=_means(before),
            rewards_after=_means(after),
        )


async def _beside(
    company: Callable[[], Coroutine[Any, Any, None]], work: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Do the work; `company` goes on beside it as long as it lasts."""
    over = anyio.CancelScope()

    async def working() -> None:
        await work()
        over.cancel()

    async def accompanying() -> None:
        with over:
            await company()

    await together([working, accompanying])


def _at(step: int, was_down: bool) -> int:
    return step


def _means(evaluation: Evaluation | None) -> dict[str, float]:
    """The mean score of each reward that scored anything."""
    means = {} if evaluation is None else evaluation.rewards
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
