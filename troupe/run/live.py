"""LiveRun: one run from its first reward to its last file.

It is given a prepared run and a built pipeline, runs them to the end, and keeps what came of it.
"""

import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

import anyio
import msgspec

from troupe.actors.checkpointer import UNSETTLED
from troupe.errors import FolderGoneError, InputError, RewardError, RunError
from troupe.messages import Activity, Incident, Phase, Status, Update
from troupe.messages.evaluations import HELD_OUT
from troupe.rewards import RewardManager
from troupe.rewards.estimates import reward_figure
from troupe.run.beside import RequestHandler, Requests, StallWatch, groups_of, watch_folder
from troupe.run.cluster import Hub
from troupe.run.folder import RunFolder
from troupe.run.pipeline import Pipeline, members_of
from troupe.run.prepare import Prepared
from troupe.run.result import RunResult, write_summary
from troupe.run.sets import OF_EVALUATION, early_stop
from troupe.run.status import Progress, doing, of_actors, queues, with_needs, with_waits
from troupe.runtime import linux_cpu
from troupe.runtime.device import DeviceThread
from troupe.runtime.memory import memory_limited, memory_wired
from troupe.runtime.roles import run_roles, together

_STATUS_EVERY_S = 1.0
"""For sinks that show what the run is doing."""


class LiveRun:
    """Made and `run` within an event loop, once."""

    def __init__(
        self,
        prepared: Prepared,
        pipeline: Pipeline,
        place: RunFolder,
        device: DeviceThread,
        requests: Requests,
        *,
        ended: anyio.Event,
        began_s: float,
        hub: Hub | None = None,
    ) -> None:
        """`device`: the thread that the last checkpoint of a run that was stopped is written in. `ended`: set at the
        end. `began_s`: when the run was begun (`time.perf_counter`). `hub`: what workers speak to, where the run is
        served."""
        self.result: RunResult | None = None
        self.fault: BaseException | None = None
        """What made the run fail."""
        self._ended = ended
        self._began_s = began_s
        self._prepared = prepared
        self._pipeline = pipeline
        self._place = place
        self._device = device
        self._scope = anyio.CancelScope()
        self._stopping = self._running = False
        self._hint = ""
        self._stopped_early = ""
        self._progress = Progress()
        self._stall = StallWatch(pipeline, prepared.live.watchdog_s, lambda: self.phase in ("paused", "held"))
        self._requests = RequestHandler(prepared, pipeline, place, requests, set_watchdog=self._stall.set_limit)
        self._hub = hub
        if hub is not None:
            hub.follow(lambda: "paused" if self.phase in ("paused", "held") else "running")
        self._newest_update = pipeline.wiring.news.listen(1, Update)

    def stop(self) -> None:
        """End now, with a checkpoint of the last completed step."""
        if not self._ended.is_set():
            self._stopping = True
            self._scope.cancel()

    def remind(self, hint: str) -> None:
        """Say with the notice what can be done next; at once where the status is shown."""
        self._hint = hint
        if self._pipeline.ledgers.sinks.do_take(Status):
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
            (not self._running, "starting"),
            (ledger.draining, "draining"),
            (ledger.steps_allowed is not None, "paused"),
            (bool(ledger.held), "held"),
        ]
        return next((phase for holds, phase in phases if holds), "running")

    @property
    def _rewards(self) -> list[RewardManager]:
        """Of training, and those that sets have of their own."""
        inputs = self._prepared.inputs
        return [inputs.rewards, *(each.rewards for each in inputs.sets if each.has_own_rewards)]

    def status(self) -> Status:
        """What the run is doing now."""
        pipeline, now_s = self._pipeline, time.perf_counter()
        updates = self._newest_update.waiting
        return Status(
            phase=self.phase,
            step=pipeline.learner.version,
            total_steps=self._prepared.inputs.total_steps,
            policy_version=pipeline.learner.version,
            groups=groups_of(pipeline, now_s),
            queues=queues(pipeline.actors),
            doing={} if self._ended.is_set() else doing(pipeline.actors, now_s),
            held=pipeline.ledgers.prompts.held,
            rewards_down=dict(self._prepared.inputs.rewards.down),
            restarts={role.name: role.restarts for role in pipeline.roles if role.restarts},
            incidents=dict(pipeline.ledgers.tally.incidents),
            metrics=dict(updates[-1].metrics) if updates else {},
            activity=None if self._ended.is_set() else self._activity(now_s),
            notice=self.notice,
            members=tuple(members_of(pipeline.roles)),
            evaluated=pipeline.ledgers.evaluations.first_and_newest,
            findings=pipeline.ledgers.tally.diagnosis.findings,
        )

    def _activity(self, now_s: float) -> Activity | None:
        prepared, at = self._prepared, self._progress.activity(now_s)
        if at is not None and prepared.inputs.rewards.starting is not None:
            at = msgspec.structs.replace(at, what=f"starting the reward {prepared.inputs.rewards.starting}")
        if at is None and self._running:
            at = of_actors(self._pipeline.actors, now_s, prepared.config.generation.max_completion_length)
        return with_waits(with_needs(at, self._pipeline.actors), prepared.inputs.rewards.waits)

    async def run(self) -> None:
        """Go to the end, well or not; then `result` or `fault` is there, and `ended` is set."""
        try:
            await self._run()
        except InputError as error:
            self.fault = error
            if self._pipeline.learner.version == 0:
                self._place.remove_traces()
        except Exception as error:
            self.fault = error if isinstance(error, FolderGoneError) else self._place.gone() or error
        finally:
            self._pipeline.wiring.news.close()
            self._ended.set()

    async def _run(self) -> None:
        acting_setup, pipeline = self._prepared.inputs.acting_setup, self._pipeline
        pipeline.ledgers.sinks.open()
        try:
            await _beside(self._work if self._hub is None else self._served, self._tell_sinks)
        finally:
            with self._progress.at("stopping the rewards"):
                for rewards in self._rewards:
                    for incident in await rewards.stop():
                        pipeline.tell(incident)
            if acting_setup is not None:
                acting_setup.manager.listen(pipeline.tell)
                await acting_setup.manager.stop()
            for incident in pipeline.unread_incidents:
                pipeline.tell(incident)
            with anyio.CancelScope(shield=True):
                for incident in await pipeline.ledgers.sinks.close():
                    pipeline.tell(incident)
            pipeline.ledgers.tally.switched_off_sinks.update(pipeline.ledgers.sinks.switched_off)
        self._place.check()
        self.result = self._result()
        write_summary(self.result)

    async def _served(self) -> None:
        """Work while workers are answered, and let them know that it is done."""
        hub = self._hub
        assert hub is not None

        async def work() -> None:
            await self._work()
            await hub.say_over()

        await _beside(work, hub.run)

    async def _work(self) -> None:
        """All that sinks are told of."""
        threads = self._prepared.config.schedule.blas_threads
        limit_gb, wired_gb = self._prepared.memory.limit_gb, self._prepared.config.wired_limit_gb
        with self._scope, memory_limited(limit_gb), memory_wired(wired_gb), linux_cpu.blas_limited(threads):
            if self._prepared.start.checkpoint is not None:
                self._prepared.inputs.rewards.trust()
            with self._progress.at("starting the rewards"):
                await self._start_rewards()
            if (acting_setup := self._prepared.inputs.acting_setup) is not None:
                if self._prepared.start.checkpoint is not None:
                    acting_setup.manager.trust()
                with self._progress.at("starting the environments"):
                    await acting_setup.manager.start()
            await _beside(self._train, self._requests.run)
        if self._stopping:
            with self._progress.at(f"saving step {self._pipeline.learner.version:,}"):
                await self._write_checkpoint(final=bool(self._stopped_early))

    async def _start_rewards(self) -> None:
        """RunError where one does not start that an earlier start had: a judge that is away may come back."""
        try:
            for rewards in self._rewards:
                await rewards.start()
            await self._requests.exchange_as_before()
        except RewardError as error:
            if not self._prepared.rewards_worked:
                raise
            raise RunError(f"{error}; an earlier start named it too, so it may come back") from error

    async def _train(self) -> None:
        """Have the actors run under watch."""
        self._prepared = self._prepared.without_arrays()
        self._running = True
        for message in self._prepared.start.lost:
            self._pipeline.note("steps_lost", message)
        actors = partial(_beside, partial(run_roles, self._pipeline.roles), self._stall.run)
        watched = partial(_beside, actors, partial(watch_folder, self._place, self._pipeline, self._device))
        await _beside(watched, self._end_early)

    async def _end_early(self) -> None:
        """Stop a run that gets no better."""
        ledger = self._pipeline.ledgers.evaluations
        await ledger.ends_run.wait()
        stop = early_stop(self._prepared.config, self._prepared.inputs.sets)
        assert stop is not None
        self._stopped_early = stop.reason(ledger.values(stop.metric))
        self._pipeline.note("stopped_early", self._stopped_early)
        self.stop()

    async def _tell_sinks(self) -> None:
        """Have those sinks that show it know what the run is doing."""
        while self._pipeline.ledgers.sinks.do_take(Status):
            self._pipeline.ledgers.sinks.write(self.status())
            await anyio.sleep(_STATUS_EVERY_S)

    async def _write_checkpoint(self, *, final: bool) -> None:
        pipeline, snapshot = self._pipeline, self._pipeline.learner.snapshot(final=final)
        try:
            with anyio.CancelScope(shield=True):
                pipeline.ledgers.sinks.settle(snapshot.version)  # Metrics has read all that was told, and has ended
                if not await pipeline.ledgers.sinks.settled(snapshot.version):
                    message = UNSETTLED.format(snapshot.version)
                    pipeline.tell(Incident(actor="supervisor", kind="checkpoint_unsettled", message=message))
                await self._device.run(pipeline.ledgers.writer.write, snapshot)
        except OSError as error:
            raise RunError(
                f"{self._prepared.folder}: the checkpoint of step {snapshot.version} could not be written: {error}; "
                "the one before it stays"
            ) from error

    def _result(self) -> RunResult:
        tally, version = self._pipeline.ledgers.tally, self._pipeline.learner.version
        before, after = self._held_out(0), self._held_out(version)
        return RunResult(
            folder=str(self._prepared.folder),
            steps=version,
            total_steps=self._prepared.inputs.total_steps,
            version=version,
            wall_s=time.perf_counter() - self._began_s,
            closed_groups=dict(tally.closed_groups),
            incidents=dict(tally.incidents),
            switched_off_sinks=dict(tally.switched_off_sinks),
            findings=tally.diagnosis.all_findings,
            accuracy_before=before.get("accuracy"),
            accuracy_after=after.get("accuracy"),
            rewards_before=self._of_rewards(before),
            rewards_after=self._of_rewards(after),
            stopped_early=self._stopped_early or self._out_of_rows(version),
            unevaluated=tuple(sorted(self._pipeline.ledgers.evaluations.pending)),
        )

    def _out_of_rows(self, version: int) -> str:
        """Why no row was left, where that ended the run."""
        inputs = self._prepared.inputs
        curriculum = inputs.schedule.curriculum
        return "" if curriculum is None or version >= inputs.total_steps else curriculum.why_over(version)

    def _held_out(self, version: int) -> dict[str, float]:
        """What a version came to on the set of `data.eval_path`."""
        metrics = self._pipeline.ledgers.evaluations.metrics_of(version, HELD_OUT)
        return {name.removeprefix(f"{OF_EVALUATION}{HELD_OUT}/"): value for name, value in metrics.items()}

    def _of_rewards(self, figures: Mapping[str, float]) -> dict[str, float]:
        names = self._prepared.inputs.rewards.names
        found = {name: figures.get(reward_figure(name)) for name in names}
        return {name: mean for name, mean in found.items() if mean is not None}


async def _beside(
    work: Callable[[], Coroutine[Any, Any, None]], other: Callable[[], Coroutine[Any, Any, None]]
) -> None:
    """Do the work; the other goes on beside it as long as it lasts."""
    over = anyio.CancelScope()

    async def do_work() -> None:
        await work()
        over.cancel()

    async def do_other() -> None:
        with over:
            await other()

    await together([do_work, do_other])
