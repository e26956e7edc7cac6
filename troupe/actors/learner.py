"""Learner: makes the gradient steps. It collects a step's scored groups, has those sampled anew that it cannot use,
learns, publishes, and closes the groups."""

from __future__ import annotations

import bisect
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import anyio
import mlx.core as mx
import msgspec

from troupe.errors import RunError
from troupe.gathering import Gathering, StepGroups, gid_of, slot_of, stale_tokens
from troupe.grpo import LearnerConfig, learning_rate, sync_reference, train_on_batch
from troupe.learning import assemble, completion_log_probs
from troupe.linux_cpu import blas_limited
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
from troupe.open_groups import OpenGroups
from troupe.policy import Qwen3Config, Weights
from troupe.runtime import Actor, Channel, DeviceThread, Mailbox, PolicyBoard, Reporter, finishing
from troupe.statistics import RunningMean, group_statistics, has_signal, num_tokens, weighted_rewards

_TELLING_S = 10.0
"""That telling of a step may take when the run is being stopped."""


class LearnerState(msgspec.Struct, frozen=True, kw_only=True):
    """What learning goes on from."""

    version: int
    """The version on the board."""
    weights: Weights
    optimizer_state: dict[str, mx.array]
    """Belongs to the learner alone: a step takes it apart."""
    reference: Weights | None = None
    """The reference policy; None where beta is 0."""
    num_tokens: int = 0
    """Prompt and completion tokens of the run so far."""
    skipped_in_a_row: int = 0
    """Steps, up to the last one, whose update was skipped because it was not finite."""


class LearnerOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The learner's channels, by who receives."""

    closed_to_prompter: Channel[GroupClosed | Replace]
    closed_to_metrics: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]


class _Learned(NamedTuple):
    """What a step's work on the device comes to, evaluated."""

    state: LearnerState
    metrics: dict[str, float]
    advantages: dict[int, tuple[float, ...]]
    """Gid → (G,) of the groups that were trained on."""
    parts: list[tuple[str, float, float]]
    """Parts of the work, with start and end (`time.perf_counter`)."""


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
        self._num_streams = streams
        self._streams: list[mx.Stream] = []
        self._state = state
        self._board = board
        self._reward_weights = reward_weights
        self._log_probs = completion_log_probs(
            policy_config,
            temperature,
            recompute=config.gradient_checkpointing or False,
            entropy_gradient=config.has_entropy_bonus,
        )
        self._max_completion_length = max_completion_length
        self._gathering = gathering
        self._pad_id = pad_id
        self._prompts_per_epoch = prompts_per_epoch
        self._total_steps = total_steps
        self._checkpoint_every = checkpoint_every
        self._learns_beside_checkpoints = learns_beside_checkpoints
        self._open = OpenGroups() if open_groups is None else open_groups
        self._recorded = {} if recorded is None else recorded
        self._next_prompt = next_prompt
        self._rates = list(rates)
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
        if self._num_streams > 1:
            self._streams = await self._device.run(_new_streams, self._num_streams)
        await self._learn_what_is_ready()

    async def finish(self) -> None:
        """The run is over: its last version becomes the final policy."""
        await self._send_snapshot(final=True)

    async def _examine(self, groups: Sequence[ScoredGroup]) -> None:
        """Have those sampled anew that nothing can be learned from, as often as a place may be."""
        without: set[int] = set()
        if self._config.dynamic_sampling:
            without = await self._device.run(self._without_signal, groups)
        if replace := self._gathering.examine(groups, without, self.version):
            self._open.replace(replace)
            await self._to.closed_to_prompter.send(replace)

    def _without_signal(self, groups: Sequence[ScoredGroup]) -> set[int]:
        return {gid_of(group) for group in groups if not has_signal(group, self._config, self._reward_weights)}

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
                learned = await self._device.run(self._train, step)
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

    def _train(self, step: StepGroups) -> _Learned:
        """One learner batch, on the device thread. Rewards and completions are told of all groups with scores, those
        left out of the batch too."""
        parts: list[tuple[str, float, float]] = []
        began_s = time.perf_counter()

        def end_part(name: str) -> None:
            parts.append((name, parts[-1][2] if parts else began_s, time.perf_counter()))

        state = self._state
        weights, optimizer_state, skipped_in_a_row = state.weights, state.optimizer_state, 0
        advantages: dict[int, tuple[float, ...]] = {}
        usable = step.ending("trained", "filtered", "stale")
        metrics = group_statistics(usable, self._config, self._reward_weights) if usable else {"reward": math.nan}
        if trained := step.ending("trained"):
            prepared = assemble(
                trained,
                self._config,
                weights=self._reward_weights,
                pad_id=self._pad_id,
                oldest=step.oldest if step.drops_stale else None,
            )
            with blas_limited(1 if self._streams else None):
                result = train_on_batch(
                    weights,
                    optimizer_state,
                    prepared.batch,
                    self._log_probs,
                    self._config,
                    lr=self._learning_rates(),
                    ref_weights=state.reference,
                    max_completion_length=self._max_completion_length,
                    on_part=end_part,
                    streams=self._streams,
                )
            weights, optimizer_state = result.weights, result.optimizer_state
            skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1
            advantages = {gid_of(group): a for group, a in zip(trained, prepared.advantages, strict=True)}
            metrics = {**prepared.metrics, **metrics, **result.metrics}
        state = LearnerState(
            version=state.version + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            reference=self._followed(state.reference, weights),
            num_tokens=state.num_tokens + num_tokens(step.groups),
            skipped_in_a_row=skipped_in_a_row,
        )
        return _Learned(state, metrics, advantages, parts)

    def _learning_rates(self) -> list[float]:
        """One for each update of the batch; the schedule counts updates, as TRL's does."""
        passes = self._config.num_iterations
        first, total = self._state.version * passes, self._total_steps * passes
        config = self._config
        if changed := bisect.bisect_right(self._rates, self._state.version, key=_first_step):
            config = msgspec.structs.replace(config, lr=self._rates[changed - 1][1])
        return [learning_rate(first + i, total, config) for i in range(passes)]

    async def _set_rate(self, lr: float) -> None:
        """Another peak for the next step and all that follow."""
        step = self.version
        try:
            await self._device.run(self._keep_rate, step, lr)
        except OSError as error:
            message = f"learner.lr was not set to {lr}, since that could not be written down: {error}"
            await self.report.incident(Incident(actor=self.name, kind="change_failed", message=message))
            return
        self._rates = [rate for rate in self._rates if rate[0] < step] + [(step, lr)]

    def _followed(self, reference: Weights | None, weights: Weights) -> Weights | None:
        """The reference after the step: synchronized once for every `ref_model_sync_steps` updates that it completes.

        Updates are counted as the learning-rate schedule counts them. The reference serves whole batches, so a
        synchronization that falls due between the passes of one comes at its end.
        """
        config = self._config
        if reference is None or not config.sync_ref_model:
            return reference
        before = self._state.version * config.num_iterations
        due = (before + config.num_iterations) // config.ref_model_sync_steps - before // config.ref_model_sync_steps
        for _ in range(due):
            reference = sync_reference(reference, weights, config.ref_model_mixup_alpha)
        return reference

    async def _check_finite(self, learned: _Learned) -> None:
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


def _new_streams(count: int) -> list[mx.Stream]:
    return [mx.new_stream(mx.default_device()) for _ in range(count)]


def _first_step(rate: tuple[int, float]) -> int:
    return rate[0]


def _sampled_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(rollout.token_ids) for group in groups for rollout in group.group.rollouts)


def _staleness(groups: Sequence[ScoredGroup], newest: int) -> dict[str, float]:
    """How many versions the weights that sampled a token were behind `newest`: the mean and the largest over tokens."""
    behind = [newest - v for group in groups for rollout in group.group.rollouts for v in rollout.versions] or [0]
    return {"staleness": sum(behind) / len(behind), "staleness/max": float(max(behind))}
