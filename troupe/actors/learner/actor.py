"""Learner: makes the gradient steps. It collects a step's scored groups, has those sampled anew that it cannot use,
learns, publishes, and closes the groups."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import anyio
import mlx.core as mx
import msgspec

from troupe.actors.learner.gathering import Gathering, StepGroups, gid_of, slot_of, stale_tokens
from troupe.actors.learner.statistics import RunningMean, num_tokens, weighted_rewards
from troupe.actors.learner.train import BatchTrainer, Learned, LearnerState
from troupe.actors.ledgers import OpenGroups
from troupe.errors import RunError
from troupe.grpo import LearnerConfig
from troupe.messages import (
    Checkpoint,
    GroupClosed,
    Incident,
    Replace,
    ScoredGroup,
    SetCheckpointEvery,
    SetLearningRate,
    Snapshot,
    Update,
)
from troupe.policy import Qwen3Config, Weights
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter
from troupe.runtime.roles import finishing

_TELLING_S = 10.0
"""That telling of a step may take when the run is being stopped."""


class LearnerOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The learner's channels, by who receives."""

    closed_to_prompter: Channel[GroupClosed | Replace]
    closed_to_metrics: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]


class Learner(Actor):
    """Receives ScoredGroup and Checkpoint; publishes weights on the board; sends Update, GroupClosed, Replace and
    Snapshot.

    A step is learned when the gathering says that its groups are here, sorted by slot; so in the pinned schedule what
    is computed never depends on the order in which scores came in.
    """

    name = "learner"

    def __init__(
        self,
        inbox: Mailbox,
        outputs: LearnerOutputs,
        *,
        device: DeviceThread,
        config: LearnerConfig,
        policy_config: Qwen3Config,
        state: LearnerState,
        board: PolicyBoard[Weights],
        reward_weights: Mapping[str, float],
        temperature: float,
        max_completion_length: int,
        gathering: Gathering,
        pad_id: int,
        prompts_per_epoch: int,
        total_steps: int,
        checkpoint_every: int,
        learns_beside_checkpoints: bool = True,
        open_groups: OpenGroups | None = None,
        recorded: Mapping[int, ScoredGroup] | None = None,
        next_prompt: Callable[[], int] = lambda: 0,
        streams: int = 1,
        rates: Sequence[tuple[int, float]] = (),
        keep_rate: Callable[[int, float], None] = lambda step, lr: None,
        report: Reporter | None = None,
    ) -> None:
        """`streams`: micro-batches that are differentiated at a time. `open_groups`: shared with who begins them.
        `recorded`: gid → groups that had their scores when the run was resumed and have not come here yet.
        `next_prompt`: number of the prompt that will be begun next. `rates`: first step → peak learning rate, rising,
        where it is not the config's. `keep_rate`: writes down that it changes, before it does; OSError where it cannot
        be."""
        super().__init__(
            inbox,
            [outputs.closed_to_prompter, outputs.closed_to_metrics, outputs.updates, outputs.snapshots],
            report,
        )
        self._to = outputs
        self._config = config
        self._state = state
        self._board = board
        self._reward_weights = reward_weights
        self._trainer = BatchTrainer(
            config,
            policy_config,
            reward_weights=reward_weights,
            temperature=temperature,
            max_completion_length=max_completion_length,
            pad_id=pad_id,
            total_steps=total_steps,
            streams=streams,
            rates=rates,
        )
        self._gathering = gathering
        self._prompts_per_epoch = prompts_per_epoch
        self._total_steps = total_steps
        self._checkpoint_every = checkpoint_every
        self._learns_beside_checkpoints = learns_beside_checkpoints
        self._open = OpenGroups() if open_groups is None else open_groups
        self._recorded = {} if recorded is None else recorded
        self._next_prompt = next_prompt
        self._keep_rate = keep_rate
        self._since_snapshot: defaultdict[str, RunningMean] = defaultdict(RunningMean)
        self._last_end_s = time.perf_counter()
        self._device = device

    @property
    def version(self) -> int:
        """Learner batches completed."""
        return self._state.version

    @property
    def weights(self) -> Weights:
        """The weights of that version."""
        return self._state.weights

    async def handle(self, message: ScoredGroup | Checkpoint | SetLearningRate | SetCheckpointEvery) -> None:
        """Collect groups and learn every step that is complete; or do as is requested."""
        match message:
            case Checkpoint():
                await self._send_snapshot()
            case SetLearningRate(lr=lr):
                await self._set_rate(lr)
            case SetCheckpointEvery(steps=steps):
                self._checkpoint_every = steps
            case ScoredGroup():
                if groups := self._gathering.add(message):
                    await self._examine(groups)
                await self._learn_what_is_ready()

    async def start(self) -> None:
        """Time and peak memory of the first step count from here. A start before may have left one that is whole."""
        self._last_end_s = time.perf_counter()
        mx.reset_peak_memory()
        await self._device.run(self._trainer.open)
        await self._learn_what_is_ready()

    async def finish(self) -> None:
        """The run is over: its last version becomes the final policy."""
        await self._send_snapshot(final=True)

    async def _examine(self, groups: Sequence[ScoredGroup]) -> None:
        """Have those sampled anew that nothing can be learned from, as often as a place may be."""
        without: set[int] = set()
        if self._config.dynamic_sampling:
            without = await self._device.run(self._trainer.without_signal, groups)
        if replace := self._gathering.examine(groups, without, self.version):
            self._open.replace(replace)
            await self._to.closed_to_prompter.send(replace)

    async def _learn_what_is_ready(self) -> None:
        while self._gathering.is_ready(self.version):
            if not self._learns_beside_checkpoints:
                with self.report.span("wait for checkpoint", step=self.version, kind="wait"):
                    await self._to.snapshots.settled()
            if step := self._gathering.take(self.version):  # not before: who stops us finds it where it was gathered
                await self._learn(step)

    async def _learn(self, step: StepGroups) -> None:
        started_s = time.perf_counter()
        with self.report.span("learn", step=self.version, gids=[gid_of(group) for group in step.groups]):
            with anyio.CancelScope(shield=True):  # the optimizer's state is used up: whoever stops us gets the new one
                learned = await self._device.run(self._trainer.train, self._state, step)
            for name, start_s, end_s in learned.parts:
                self.report.record(name, start_s, end_s, step=self.version)
        self._state = learned.state
        self._open.end(slot_of(group) for group in step.groups)
        with self.report.span("publish", step=self.version - 1):
            self._board.publish(self.version, self.weights)
        async with finishing(_TELLING_S):  # the step counts: whoever stops us, its end is told
            await self._close(step, learned.advantages)
            update = self._update(step, learned.metrics, time.perf_counter() - started_s)
            await self._to.updates.send(update)
            for name, value in update.metrics.items():
                if math.isfinite(value):
                    self._since_snapshot[name].add(value)
        await self._check_finite(learned)
        if self.version % self._checkpoint_every == 0 and self.version < self._total_steps:
            await self._send_snapshot()

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
        if skipped_in_a_row >= self._config.max_nonfinite_steps:
            raise RunError(
                f"{message}, as were all of the last {skipped_in_a_row} (learner.max_nonfinite_steps); "
                "lower learner.lr, or look for scores that are huge"
            )

    async def _close(self, step: StepGroups, advantages: Mapping[int, tuple[float, ...]]) -> None:
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
                rewards=weighted_rewards(group, self._reward_weights),
                advantages=advantages.get(prompt.gid),
            )
            await self._to.closed_to_metrics.send(closed)
            if prompt.gid not in step.replaced:
                await self._to.closed_to_prompter.send(closed)

    def _update(self, step: StepGroups, metrics: Mapping[str, float], learn_s: float) -> Update:
        now_s = time.perf_counter()
        step_s, self._last_end_s = now_s - self._last_end_s, now_s
        groups, sampled = step.groups, max(_sampled_tokens(step.groups), 1)
        stale = sum(stale_tokens(group, step.oldest) for group in groups)
        peak_bytes = mx.get_peak_memory()
        mx.reset_peak_memory()
        return Update(
            step=self.version,
            version=self.version,
            total_steps=self._total_steps,
            metrics={
                **metrics,
                **_staleness(groups, self.version - 1),
                "num_tokens": float(self._state.num_tokens),
                "groups/trained": float(len(step.ending("trained"))),
                "groups/filtered": float(len(step.ending("filtered"))),
                "groups/stale": float(len(step.ending("stale"))),
                "groups/quarantined": float(len(step.ending("quarantined"))),
                "groups/resampled": float(sum(slot_of(group).attempt > 0 for group in groups)),
                "groups/filtered_token_fraction": _sampled_tokens(step.ending("filtered")) / sampled,
                "tokens/stale_fraction": stale / sampled,
                "epoch": self.version * self._config.batch_size / self._prompts_per_epoch,
                "step_time": step_s,
                "learn_time": learn_s,
                "tokens_per_second": _sampled_tokens(groups) / step_s,
                "learn_tokens_per_second": num_tokens(step.ending("trained")) / learn_s,
                "peak_memory_gb": peak_bytes / 1e9,
            },
        )

    async def _send_snapshot(self, *, final: bool = False) -> None:
        """Have a checkpoint written when the one before is, so that no more than one is held beside the state."""
        with self.report.span("wait for checkpointer", step=self.version, kind="wait"):
            await self._to.snapshots.settled()
        await self._to.snapshots.send(self.snapshot(final=final))
        self._since_snapshot.clear()

    def snapshot(self, *, final: bool = False) -> Snapshot:
        """Everything a checkpoint of the last completed batch needs, by reference."""
        state = self._state
        behind = {version: weights for version, weights in self._board.kept.items() if version < state.version}
        gathered = self._gathering.unfinished()
        return Snapshot(
            version=state.version,
            weights=state.weights,
            optimizer_state=dict(state.optimizer_state),  # its own: the next step takes the learner's apart
            behind=behind,
            reference=state.reference if self._config.sync_ref_model else None,
            num_tokens=state.num_tokens,
            skipped_in_a_row=state.skipped_in_a_row,
            metrics={name: mean.value for name, mean in self._since_snapshot.items() if math.isfinite(mean.value)},
            unfinished=msgspec.structs.replace(
                gathered,
                next=self._next_prompt(),
                open=self._open.all(),
                scored=self._scored(gathered.collected),
            ),
            final=final,
        )

    def _scored(self, collected: Sequence[ScoredGroup]) -> tuple[ScoredGroup, ...]:
        """The groups that have their scores and are not collected: one that is being looked at, those that wait, and
        those from before a resume that are still on their way."""
        there = set(map(gid_of, collected))
        scored: dict[int, ScoredGroup] = {}
        for message in self.inbox.in_hand:
            if isinstance(message, ScoredGroup) and self._open.has(slot_of(message)):
                scored[gid_of(message)] = message
        for message in self.inbox.waiting:
            if isinstance(message, ScoredGroup):
                scored[gid_of(message)] = message
        for gid, group in self._recorded.items():
            if slot_of(group).step >= self.version or self._open.has(slot_of(group)):
                scored.setdefault(gid, group)
        return tuple(group for gid, group in scored.items() if gid not in there)


def _sampled_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(rollout.token_ids) for group in groups for rollout in group.group.rollouts)


def _staleness(groups: Sequence[ScoredGroup], newest: int) -> dict[str, float]:
    """How many versions the weights that sampled a token were behind `newest`: the mean and the largest over tokens."""
    behind = [newest - v for group in groups for rollout in group.group.rollouts for v in rollout.versions] or [0]
    return {"staleness": sum(behind) / len(behind), "staleness/max": float(max(behind))}
