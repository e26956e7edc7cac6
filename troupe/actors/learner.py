"""Learner: makes the gradient steps. It collects a step's scored groups, has those without signal replaced, learns,
publishes, and closes the groups."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import anyio
import mlx.core as mx
import msgspec

from troupe.errors import RunError
from troupe.grpo import LearnerConfig, learning_rate, sync_reference, train_on_batch
from troupe.learning import assemble, completion_log_probs, is_usable
from troupe.messages import Checkpoint, ClosedState, GroupClosed, Incident, Replace, ScoredGroup, Slot, Snapshot, Update
from troupe.policy import Qwen3Config, Weights
from troupe.runtime import Actor, Channel, DeviceThread, Mailbox, PolicyBoard, Reporter
from troupe.statistics import group_statistics, has_signal, num_tokens


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


class LearnerOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """The learner's channels, by who receives."""

    closed_to_prompter: Channel[GroupClosed | Replace]
    closed_to_metrics: Channel[GroupClosed]
    updates: Channel[Update]
    snapshots: Channel[Snapshot]


class _Step:
    """The groups of one step as they come in, round by round; the first round has all the places."""

    def __init__(self, batch_size: int) -> None:
        self.groups: list[ScoredGroup] = []
        self.filtered: set[int] = set()
        """Groups without signal, by gid."""
        self.replaced: set[int] = set()
        """Those of them whose place and credit another group has taken over."""
        self._round: list[ScoredGroup] = []
        self._missing = batch_size

    @property
    def complete(self) -> bool:
        """Whether all groups of the newest round are here."""
        return not self._missing

    @property
    def round(self) -> list[ScoredGroup]:
        """The groups of the newest round, by slot."""
        return sorted(self._round, key=_slot)

    def add(self, group: ScoredGroup) -> None:
        self.groups.append(group)
        self._round.append(group)
        self._missing -= 1

    def replace(self, groups: Sequence[ScoredGroup]) -> Replace:
        """Open a round of replacements."""
        self.replaced |= {_gid(group) for group in groups}
        self._round, self._missing = [], len(groups)
        return Replace(slots=tuple(map(_slot, groups)))


class _Learned(NamedTuple):
    """What a step's work on the device comes to, evaluated."""

    state: LearnerState
    metrics: dict[str, float]
    skipped: bool
    """Whether an update was not finite."""


class Learner(Actor):
    """Receives ScoredGroup and Checkpoint; publishes weights on the board; sends Update, GroupClosed, Replace and
    Snapshot.

    Steps are learned in order, each when all its groups are here, sorted by slot, so that what is computed never
    depends on the order in which scores came in. For the same reason groups without signal are replaced together, when
    all groups of their round are scored.
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
        min_scored: int,
        pad_id: int,
        prompts_per_epoch: int,
        total_steps: int,
        checkpoint_every: int,
        learns_beside_checkpoints: bool = True,
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
        self._board = board
        self._reward_weights = reward_weights
        self._log_probs = completion_log_probs(
            policy_config,
            temperature,
            recompute=config.gradient_checkpointing or False,
            entropy_gradient=config.has_entropy_bonus,
        )
        self._max_completion_length = max_completion_length
        self._min_scored = min_scored
        self._pad_id = pad_id
        self._prompts_per_epoch = prompts_per_epoch
        self._total_steps = total_steps
        self._checkpoint_every = checkpoint_every
        self._learns_beside_checkpoints = learns_beside_checkpoints
        self._steps: dict[int, _Step] = {}
        self._skipped_in_a_row = 0
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

    async def handle(self, message: ScoredGroup | Checkpoint) -> None:
        """Collect groups and learn every step that is complete; or write a checkpoint on request."""
        if isinstance(message, Checkpoint):
            await self._send_snapshot()
            return
        step = self._steps.setdefault(_slot(message).step, _Step(self._config.batch_size))
        step.add(message)
        if step.complete and self._config.dynamic_sampling:
            await self._filter(step)
        while (ready := self._steps.get(self._state.version)) and ready.complete:
            await self._learn(self._steps.pop(self._state.version))

    async def start(self) -> None:
        """Time and peak memory of the first step count from here."""
        self._last_end_s = time.perf_counter()
        mx.reset_peak_memory()

    async def finish(self) -> None:
        """The run is over: its last version becomes the final policy."""
        await self._send_snapshot(final=True)

    async def _filter(self, step: _Step) -> None:
        """Have the groups of the round that are without signal replaced, as often as a place may be sampled anew."""
        without = await self._device.run(self._without_signal, step.round)
        step.filtered |= {_gid(group) for group in without}
        if without and _slot(without[0]).attempt < self._config.max_resampling_attempts:
            await self._to.closed_to_prompter.send(step.replace(without))

    def _without_signal(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        return [
            group
            for group in groups
            if is_usable(group, self._min_scored) and not has_signal(group, self._config, self._reward_weights)
        ]

    async def _learn(self, step: _Step) -> None:
        started_s = time.perf_counter()
        groups = sorted(step.groups, key=_slot)
        states = {_gid(group): self._end_state(group, step) for group in groups}
        usable = [group for group in groups if states[_gid(group)] != "quarantined"]
        trained = [group for group in groups if states[_gid(group)] == "trained"]
        if not self._learns_beside_checkpoints:
            with self.report.span("wait for checkpoint", step=self.version):
                await self._to.snapshots.settled()
        with self.report.span("learn", step=self.version):
            with anyio.CancelScope(shield=True):  # the optimizer's state is used up: whoever stops us gets the new one
                learned = await self._device.run(self._train, groups, usable, trained)
        self._state = learned.state
        with self.report.span("publish", step=self.version - 1):
            self._board.publish(self.version, self.weights)
        await self._check_finite(learned)
        await self._close(groups, states, step.replaced)
        learn_s = time.perf_counter() - started_s
        await self._to.updates.send(self._update(groups, trained, states, learned.metrics, learn_s))
        if self.version % self._checkpoint_every == 0 and self.version < self._total_steps:
            await self._send_snapshot()

    def _end_state(self, group: ScoredGroup, step: _Step) -> ClosedState:
        if _gid(group) in step.filtered:
            return "filtered"
        return "trained" if is_usable(group, self._min_scored) else "quarantined"

    def _train(
        self, groups: Sequence[ScoredGroup], usable: Sequence[ScoredGroup], trained: Sequence[ScoredGroup]
    ) -> _Learned:
        """One learner batch, on the device thread. What is told of rewards and completions is told of `usable`."""
        state = self._state
        weights, optimizer_state, skipped = state.weights, state.optimizer_state, False
        metrics = group_statistics(usable, self._config, self._reward_weights) if usable else {"reward": math.nan}
        if trained:
            prepared = assemble(trained, self._config, weights=self._reward_weights, pad_id=self._pad_id)
            result = train_on_batch(
                weights,
                optimizer_state,
                prepared.batch,
                self._log_probs,
                self._config,
                lr=self._learning_rates(),
                ref_weights=state.reference,
                max_completion_length=self._max_completion_length,
            )
            weights, optimizer_state, skipped = result.weights, result.optimizer_state, not result.updated
            metrics = {**prepared.metrics, **metrics, **result.metrics}
        state = LearnerState(
            version=state.version + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            reference=self._followed(state.reference, weights),
            num_tokens=state.num_tokens + num_tokens(groups),
        )
        return _Learned(state, metrics, skipped)

    def _learning_rates(self) -> list[float]:
        """One for each update of the batch; the schedule counts updates, as TRL's does."""
        passes = self._config.num_iterations
        first, total = self._state.version * passes, self._total_steps * passes
        return [learning_rate(first + i, total, self._config) for i in range(passes)]

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
        if not learned.skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        metrics = learned.metrics
        message = (
            f"step {self.version - 1}: the loss ({metrics.get('loss')}), gradient norm ({metrics.get('grad_norm')}) or "
            "updated weights are not finite; the update was skipped"
        )
        await self.report.incident(Incident(actor=self.name, kind="nonfinite_step", message=message))
        if self._skipped_in_a_row >= self._config.max_nonfinite_steps:
            raise RunError(
                f"{message}, as were all of the last {self._skipped_in_a_row} (learner.max_nonfinite_steps); "
                "lower learner.lr, or look for scores that are huge"
            )

    async def _close(
        self, groups: Sequence[ScoredGroup], states: Mapping[int, ClosedState], replaced: set[int]
    ) -> None:
        for group in groups:
            prompt = group.group.prompt
            if states[prompt.gid] == "quarantined":
                message = f"group {prompt.gid} (dataset row {prompt.row}) has too few scores and was not trained on"
                await self.report.incident(
                    Incident(actor=self.name, kind="group_quarantined", message=message, gid=prompt.gid)
                )
            closed = GroupClosed(gid=prompt.gid, slot=prompt.slot, state=states[prompt.gid], version=self.version)
            await self._to.closed_to_metrics.send(closed)
            if prompt.gid not in replaced:
                await self._to.closed_to_prompter.send(closed)

    def _update(
        self,
        groups: Sequence[ScoredGroup],
        trained: Sequence[ScoredGroup],
        states: Mapping[int, ClosedState],
        metrics: Mapping[str, float],
        learn_s: float,
    ) -> Update:
        now_s = time.perf_counter()
        step_s, self._last_end_s = now_s - self._last_end_s, now_s
        closed = list(states.values())
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
                "groups/trained": float(closed.count("trained")),
                "groups/filtered": float(closed.count("filtered")),
                "groups/quarantined": float(closed.count("quarantined")),
                "groups/resampled": float(sum(_slot(group).attempt > 0 for group in groups)),
                "groups/filtered_token_fraction": _sampled_tokens(
                    [group for group in groups if states[_gid(group)] == "filtered"]
                )
                / max(_sampled_tokens(groups), 1),
                "epoch": self.version * self._config.batch_size / self._prompts_per_epoch,
                "step_time": step_s,
                "learn_time": learn_s,
                "tokens_per_second": _sampled_tokens(groups) / step_s,
                "learn_tokens_per_second": num_tokens(trained) / learn_s,
                "peak_memory_gb": peak_bytes / 1e9,
            },
        )

    async def _send_snapshot(self, *, final: bool = False) -> None:
        """Have a checkpoint written when the one before is, so that no more than one is held beside the state."""
        await self._to.snapshots.settled()
        await self._to.snapshots.send(self.snapshot(final=final))

    def snapshot(self, *, final: bool = False) -> Snapshot:
        """Everything a checkpoint of the last completed batch needs, by reference."""
        state = self._state
        behind = {version: weights for version, weights in self._board.kept.items() if version < state.version}
        return Snapshot(
            version=state.version,
            weights=state.weights,
            optimizer_state=dict(state.optimizer_state),  # its own: the next step takes the learner's apart
            behind=behind,
            reference=state.reference if self._config.sync_ref_model else None,
            num_tokens=state.num_tokens,
            final=final,
        )


def _slot(group: ScoredGroup) -> Slot:
    return group.group.prompt.slot


def _gid(group: ScoredGroup) -> int:
    return group.group.prompt.gid


def _sampled_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(rollout.token_ids) for group in groups for rollout in group.group.rollouts)


def _staleness(groups: Sequence[ScoredGroup], newest: int) -> dict[str, float]:
    """How many versions the weights that sampled a token were behind `newest`: the mean and the largest over tokens."""
    behind = [newest - v for group in groups for rollout in group.group.rollouts for v in rollout.versions] or [0]
    return {"staleness": sum(behind) / len(behind), "staleness/max": float(max(behind))}
