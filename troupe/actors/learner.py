"""Learner: makes the gradient steps. It collects a step's scored groups, learns, publishes, and closes the groups."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

import mlx.core as mx
import msgspec

from troupe.errors import RunError
from troupe.grpo import LearnerConfig, StepResult, learning_rate, train_on_batch
from troupe.learning import LearnerBatch, assemble, completion_log_probs, is_usable
from troupe.messages import Checkpoint, ClosedState, GroupClosed, Incident, ScoredGroup, Snapshot, Update
from troupe.policy import Qwen3Config, Weights
from troupe.runtime import Actor, Channel, DeviceThread, Mailbox, PolicyBoard, Reporter


class LearnerState(msgspec.Struct, frozen=True, kw_only=True):
    """What learning goes on from: the version on the board, its weights and the optimizer's state."""

    version: int
    weights: Weights
    optimizer_state: dict[str, mx.array]


class LearnerOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The learner's channels, by who receives."""

    closed_to_prompter: Channel[GroupClosed]
    closed_to_metrics: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]


class Learner(Actor):
    """Receives ScoredGroup and Checkpoint; publishes weights on the board; sends Update, GroupClosed and Snapshot.

    Steps are learned in order, each when all its groups are here, sorted by slot, so that what is computed never
    depends on the order in which scores came in.
    """

    name = "learner"

    def __init__(
        self,
        inbox: Mailbox,
        outputs: LearnerOutputs,
        *,
        config: LearnerConfig,
        policy_config: Qwen3Config,
        state: LearnerState,
        reference: Weights | None,
        board: PolicyBoard[Weights],
        reward_weights: Mapping[str, float],
        temperature: float,
        max_completion_length: int,
        min_scored: int,
        pad_id: int,
        total_steps: int,
        checkpoint_every: int,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(
            inbox,
            [outputs.closed_to_prompter, outputs.closed_to_metrics, outputs.updates, outputs.snapshots],
            report,
        )
        self._to = outputs
        self._config = config
        self._state = state
        self._reference = reference
        self._board = board
        self._reward_weights = reward_weights
        self._log_probs = completion_log_probs(policy_config, temperature)
        self._max_completion_length = max_completion_length
        self._min_scored = min_scored
        self._pad_id = pad_id
        self._total_steps = total_steps
        self._checkpoint_every = checkpoint_every
        self._waiting: defaultdict[int, list[ScoredGroup]] = defaultdict(list)
        self._skipped_in_a_row = 0
        self._last_end_s = time.perf_counter()
        self._device = DeviceThread(self.name)

    @property
    def version(self) -> int:
        """Learner batches completed."""
        return self._state.version

    @property
    def weights(self) -> Weights:
        """The weights of that version."""
        return self._state.weights

    async def handle(self, message: ScoredGroup | Checkpoint) -> None:
        """Collect groups and learn every step that is complete; or write a checkpoint on request."""
        if isinstance(message, Checkpoint):
            await self._to.snapshots.send(self.snapshot())
            return
        self._waiting[message.group.prompt.slot.step].append(message)
        while len(self._waiting[self._state.version]) == self._config.batch_size:
            groups = sorted(self._waiting.pop(self._state.version), key=lambda scored: scored.group.prompt.slot)
            await self._learn(groups)

    async def start(self) -> None:
        """The time of the first step counts from here."""
        self._last_end_s = time.perf_counter()

    async def finish(self) -> None:
        """The run is over: its last version becomes the final policy."""
        await self._to.snapshots.send(self.snapshot(final=True))

    async def stop(self) -> None:
        """End the device thread."""
        await self._device.close()

    async def _learn(self, groups: Sequence[ScoredGroup]) -> None:
        step = self._state.version
        usable = [group for group in groups if is_usable(group, self._min_scored)]
        started_s = time.perf_counter()
        metrics = {"reward": math.nan}  # what is known without a single usable group
        if usable:
            with self.report.span("learn", step=step):
                learned = await self._device.run(self._step, usable)
            metrics = self._taken_over(*learned)
            await self._check_finite(metrics, step)
        self._state = msgspec.structs.replace(self._state, version=step + 1)
        with self.report.span("publish", step=step):
            self._board.publish(self._state.version, self._state.weights)
        await self._close(groups, usable)
        await self._to.updates.send(self._update(groups, metrics, learn_s=time.perf_counter() - started_s))
        if self._state.version % self._checkpoint_every == 0 and self._state.version < self._total_steps:
            await self._to.snapshots.send(self.snapshot())

    def _step(self, groups: Sequence[ScoredGroup]) -> tuple[StepResult, LearnerBatch]:
        """One learner batch, on the device thread."""
        prepared = assemble(groups, self._config, weights=self._reward_weights, pad_id=self._pad_id)
        result = train_on_batch(
            self._state.weights,
            self._state.optimizer_state,
            prepared.batch,
            self._log_probs,
            self._config,
            lr=self._learning_rates(),
            ref_weights=self._reference,
            max_completion_length=self._max_completion_length,
        )
        return result, prepared

    def _learning_rates(self) -> list[float]:
        """One for each update of the batch; the schedule counts updates, as TRL's does."""
        passes = self._config.num_iterations
        first, total = self._state.version * passes, self._total_steps * passes
        return [learning_rate(first + i, total, self._config) for i in range(passes)]

    def _taken_over(self, result: StepResult, prepared: LearnerBatch) -> dict[str, float]:
        self._state = msgspec.structs.replace(
            self._state, weights=result.weights, optimizer_state=result.optimizer_state
        )
        self._skipped_in_a_row = 0 if result.updated else self._skipped_in_a_row + 1
        return {**prepared.metrics, **result.metrics}

    async def _check_finite(self, metrics: Mapping[str, float], step: int) -> None:
        if not self._skipped_in_a_row:
            return
        message = (
            f"step {step}: the loss ({metrics.get('loss')}), gradient norm ({metrics.get('grad_norm')}) or updated "
            "weights are not finite; the update was skipped"
        )
        await self.report.incident(Incident(actor=self.name, kind="nonfinite_step", message=message))
        if self._skipped_in_a_row >= self._config.max_nonfinite_steps:
            raise RunError(
                f"{message}, as were all of the last {self._skipped_in_a_row} (learner.max_nonfinite_steps); "
                "lower learner.lr, or look for scores that are huge"
            )

    async def _close(self, groups: Sequence[ScoredGroup], usable: Sequence[ScoredGroup]) -> None:
        trained = {group.group.prompt.gid for group in usable}
        for group in groups:
            prompt = group.group.prompt
            state: ClosedState = "trained" if prompt.gid in trained else "quarantined"
            if state == "quarantined":
                message = f"group {prompt.gid} (dataset row {prompt.row}) has too few scores and was not trained on"
                await self.report.incident(
                    Incident(actor=self.name, kind="group_quarantined", message=message, gid=prompt.gid)
                )
            closed = GroupClosed(gid=prompt.gid, slot=prompt.slot, state=state, version=self._state.version)
            await self._to.closed_to_metrics.send(closed)
            await self._to.closed_to_prompter.send(closed)

    def _update(self, groups: Sequence[ScoredGroup], metrics: Mapping[str, float], *, learn_s: float) -> Update:
        now_s = time.perf_counter()
        step_s, self._last_end_s = now_s - self._last_end_s, now_s
        version = self._state.version
        rollouts = [rollout for group in groups for rollout in group.group.rollouts]
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        sampled_from = [number for rollout in rollouts for number in rollout.versions]
        return Update(
            step=version,
            version=version,
            total_steps=self._total_steps,
            metrics={
                **metrics,
                "staleness": version - 1 - sum(sampled_from) / len(sampled_from) if sampled_from else 0.0,
                "groups/trained": float(sum(is_usable(group, self._min_scored) for group in groups)),
                "epoch": float(groups[-1].group.prompt.epoch),
                "step_time": step_s,
                "learn_time": learn_s,
                "tokens_per_second": tokens / step_s,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            },
        )

    def snapshot(self, *, final: bool = False) -> Snapshot:
        """Everything a checkpoint of the last completed batch needs, by reference."""
        behind = {version: weights for version, weights in self._board.kept.items() if version < self._state.version}
        return Snapshot(
            version=self._state.version,
            weights=self._state.weights,
            optimizer_state=self._state.optimizer_state,
            behind=behind,
            final=final,
        )
