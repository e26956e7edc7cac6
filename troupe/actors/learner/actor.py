"""Learner: makes the gradient steps. It collects a step's scored groups, has those sampled anew that it cannot use,
learns, publishes, and closes the groups."""

import time
from collections.abc import Callable, Mapping, Sequence

import anyio
import msgspec
from anyio.abc import TaskGroup

from troupe.actors.evaluator.asking import Evaluations
from troupe.actors.learner.gathering import Gathering, StepGroups, gid_of, slot_of
from troupe.actors.learner.measures import (
    StepMeter,
    end_statistics,
    num_tokens,
    sampled_tokens,
    staleness_statistics,
)
from troupe.actors.learner.scores import pass_rates, weighted_rewards
from troupe.actors.learner.snapshots import Snapshots
from troupe.actors.learner.train import BatchTrainer, Learned, LearnerState
from troupe.errors import RunError
from troupe.messages import (
    Checkpoint,
    GroupClosed,
    Incident,
    MemberStatus,
    Replace,
    ScoredGroup,
    SetCheckpointEvery,
    SetLearningRate,
    Snapshot,
    Update,
)
from troupe.policy import Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import finishing


class LearnerOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The learner's channels, by who receives."""

    closed_to_prompter: Channel[GroupClosed | Replace]
    closed_to_metrics: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]
    evaluations: Evaluations | None = None
    """To the evaluator, where there is one."""


class Learner(Actor):
    """Receives ScoredGroup and Checkpoint; publishes weights on the board; sends Update, GroupClosed, Replace and
    Snapshot.

    A step is learned when the gathering says that its groups are here, sorted by slot; so in the pinned schedule what
    is computed never depends on the order in which scores came in.
    """

    name = "learner"
    _watching: TaskGroup
    closing_s = 10.0
    """That sending the end of a step may take when the run is being stopped."""

    def __init__(
        self,
        inbox: Mailbox,
        outputs: LearnerOutputs,
        *,
        device: DeviceThread,
        trainer: BatchTrainer,
        state: LearnerState,
        board: PolicyBoard[Weights],
        gathering: Gathering,
        snapshots: Snapshots,
        epoch: Callable[[int], float],
        keep_rate: Callable[[int, float], None] = lambda step, lr: None,
        meter: StepMeter | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`epoch`: how often rows have been seen with a version. `keep_rate`: writes down that the
        peak learning rate changes, before it does; OSError where it cannot be."""
        super().__init__(
            inbox,
            [
                outputs.closed_to_prompter,
                outputs.closed_to_metrics,
                outputs.updates,
                outputs.snapshots,
                *([] if outputs.evaluations is None else [outputs.evaluations.channel]),
            ],
            report,
        )
        self._to = outputs
        self._device = device
        self._trainer = trainer
        self._state = state
        self._board = board
        self._gathering = gathering
        self._snapshots = snapshots
        self._epoch = epoch
        self._keep_rate = keep_rate
        self._meter = StepMeter() if meter is None else meter

    @property
    def version(self) -> int:
        """Learner batches completed."""
        return self._state.version

    @property
    def weights(self) -> Weights:
        """The weights of that version."""
        return self._state.weights

    def members(self) -> tuple[MemberStatus, ...]:
        """The other ranks, where there are any."""
        return () if self._trainer.others is None else self._trainer.others.statuses()

    async def run(self) -> None:
        """Run while the other ranks are watched."""
        if self._trainer.others is None:
            await super().run()
            return
        async with anyio.create_task_group() as self._watching:
            await super().run()
            self._watching.cancel_scope.cancel()

    async def handle(self, message: ScoredGroup | Checkpoint | SetLearningRate | SetCheckpointEvery) -> None:
        """Collect groups and learn every step that is complete; or do as is requested."""
        match message:
            case Checkpoint():
                await self._send_snapshot()
            case SetLearningRate(lr=lr):
                await self._set_rate(lr)
            case SetCheckpointEvery(steps=steps):
                self._snapshots.every = steps
            case ScoredGroup():
                if groups := self._gathering.add(message):
                    await self._examine(groups)
                await self._learn_what_is_ready()

    async def start(self) -> None:
        """Time and peak memory of the first step count from here. A start before may have left one that is whole."""
        self._meter.begin()
        if (others := self._trainer.others) is not None:
            await others.start(self._state, self._device)
            self._watching.start_soon(others.watch)
            await others.meet(self._device)
        await self._device.run(self._trainer.open)
        if (evaluations := self._to.evaluations) is not None:
            await evaluations.begin(self.version, self.weights)
            await self._end_early()
        await self._learn_what_is_ready()

    async def finish(self) -> None:
        """The run is over: its last version becomes the final policy."""
        await self._send_snapshot(final=True)
        if (evaluations := self._to.evaluations) is not None:
            await evaluations.ask_last(self.version, self.weights)
            evaluations.channel.close()
        if self._trainer.others is not None:
            await self._trainer.others.until_alone()

    async def stop(self) -> None:
        """End the other ranks."""
        if self._trainer.others is not None:
            await self._trainer.others.aclose()

    async def _examine(self, groups: Sequence[ScoredGroup]) -> None:
        """Have those sampled anew that nothing can be learned from, as often as a place may be."""
        without: set[int] = set()
        if self._trainer.config.dynamic_sampling:
            without = await self._device.run(self._trainer.without_signal, groups)
        if replace := self._gathering.examine(groups, without, self.version):
            self._snapshots.open_groups.replace(replace)
            await self._to.closed_to_prompter.send(replace)

    async def _learn_what_is_ready(self) -> None:
        while self._gathering.is_ready(self.version):
            await self._end_early()
            if not self._snapshots.beside_learning:
                with self.report.span("wait for checkpoint", step=self.version, kind="wait"):
                    await self._to.snapshots.settled()
            # not before: who stops us finds it where it was gathered
            if step := self._gathering.take_step(self.version):
                await self._learn(step)

    async def _learn(self, step: StepGroups) -> None:
        started_s = time.perf_counter()
        with self.report.span("learn", step=self.version, gids=[gid_of(group) for group in step.groups]):
            with anyio.CancelScope(shield=True):  # the optimizer's state is used up: whoever stops us gets the new one
                learned = await self._device.run(self._trainer.train, self._state, step)
            for name, start_s, end_s in learned.parts:
                self.report.record(name, start_s, end_s, step=self.version)
        self._state = learned.state
        self._snapshots.open_groups.end(slot_of(group) for group in step.groups)
        of_rows, retired = self._count_rows(step)
        with self.report.span("publish", step=self.version - 1):
            self._board.publish(self.version, self.weights)
        async with finishing(self.closing_s):  # the step counts: whoever stops us, its end is reported
            await self._close(step, learned)
            update = self._update(step, {**learned.metrics, **of_rows}, time.perf_counter() - started_s)
            await self._to.updates.send(update)
            self._snapshots.add(update.metrics)
        if retired:
            await self.report.incident(Incident(actor=self.name, kind="rows_retired", message=retired))
        await self._check_finite(learned)
        if self.version % self._snapshots.every == 0 and self.version < self._trainer.total_steps:
            await self._send_snapshot()
        if (evaluations := self._to.evaluations) is not None:
            await evaluations.ask(self.version, self.weights)

    async def _end_early(self) -> None:
        """Go no further where the run gets no better: who runs it ends it."""
        evaluations = self._to.evaluations
        if evaluations is not None and await evaluations.end_run(self.version):
            await anyio.sleep_forever()

    def _count_rows(self, step: StepGroups) -> tuple[dict[str, float], str]:
        """Have the curriculum know what the step came to; its metrics, and what to tell where no row is left."""
        curriculum = self._snapshots.curriculum
        if curriculum is None or self._trainer.is_supervised(self.version - 1):
            return {}, ""
        rates = pass_rates(step.groups, self._trainer.reward_weights, curriculum.config)
        metrics = curriculum.learned(self.version, rates, self._snapshots.oldest_open(self._trainer.config.batch_size))
        return metrics, curriculum.news()

    async def _set_rate(self, lr: float) -> None:
        """Another peak for the next step and all that follow."""
        step = self.version
        try:
            await self._device.run(self._keep_rate, step, lr)
        except OSError as error:
            message = f"learner.lr was not set to {lr}, since that could not be written down: {error}"
            await self.report.incident(Incident(actor=self.name, kind="change_failed", message=message))
            return
        self._trainer.set_rate(step, lr)

    async def _check_finite(self, learned: Learned) -> None:
        skipped_in_a_row = learned.state.skipped_in_a_row
        if not skipped_in_a_row:
            return
        metrics = learned.metrics
        message = (
            f"step {self.version - 1}: the loss ({metrics.get('loss')}), gradient norm ({metrics.get('grad_norm')}) or "
            "updated weights are not finite; the update was skipped"
        )
        await self.report.incident(Incident(actor=self.name, kind="nonfinite_step", message=message))
        if skipped_in_a_row >= self._trainer.config.max_nonfinite_steps:
            raise RunError(
                f"{message}, as were all of the last {skipped_in_a_row} (learner.max_nonfinite_steps); "
                "lower learner.lr, or look for scores that are huge"
            )

    async def _close(self, step: StepGroups, learned: Learned) -> None:
        for state in dict.fromkeys(step.states.values()):
            gids = [gid_of(group) for group in step.ending(state)]
            self.report.mark(f"close: {state}", step=self.version - 1, gids=gids)
        for group in step.groups:
            prompt = group.group.prompt
            state = step.states[prompt.gid]
            if state == "quarantined":
                message = f"group {prompt.gid} (dataset row {prompt.row}) has too few scores and was not trained on"
                await self.report.incident(
                    Incident(actor=self.name, kind="group_quarantined", message=message, gid=prompt.gid)
                )
            closed = GroupClosed(
                gid=prompt.gid,
                slot=prompt.slot,
                state=state,
                version=self.version,
                scored=group,
                rewards=weighted_rewards(group, self._trainer.reward_weights),
                advantages=learned.advantages.get(prompt.gid),
                token_figures=learned.figures.get(prompt.gid, ()),
            )
            await self._to.closed_to_metrics.send(closed)
            if prompt.gid not in step.replaced:
                await self._to.closed_to_prompter.send(closed)

    def _update(self, step: StepGroups, metrics: Mapping[str, float], learn_s: float) -> Update:
        step_s, peak_bytes = self._meter.measure_step()
        return Update(
            step=self.version,
            version=self.version,
            total_steps=self._trainer.total_steps,
            metrics={
                **metrics,
                **staleness_statistics(step.groups, self.version - 1),
                "num_tokens": float(self._state.num_tokens),
                **end_statistics(step),
                "epoch": self._epoch(self.version),
                "step_time": step_s,
                "learn_time": learn_s,
                "tokens_per_second": sampled_tokens(step.groups) / step_s,
                "learn_tokens_per_second": num_tokens(step.ending("trained")) / learn_s,
                "peak_memory_gb": peak_bytes / 1e9,
            },
        )

    async def _send_snapshot(self, *, final: bool = False) -> None:
        """Have a checkpoint written when the one before is, so that no more than one is held beside the state."""
        with self.report.span("wait for checkpointer", step=self.version, kind="wait"):
            await self._to.snapshots.settled()
        await self._to.snapshots.send(self.snapshot(final=final))
        self._snapshots.forget_metrics()

    def snapshot(self, *, final: bool = False) -> Snapshot:
        """Everything a checkpoint of the last completed batch needs, by reference."""
        needed, evaluations = self._board.kept, self._to.evaluations
        if evaluations is not None:
            needed = {**evaluations.pending, **needed}
        return self._snapshots.make(self._state, self.inbox, needed, self._gathering.unfinished(), final=final)
