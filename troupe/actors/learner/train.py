"""What the groups of one step make of a learner's state, on the device's thread.

A step's groups and the state before go in, the state after and the step's metrics come out; nothing waits. The state
before is used up.
"""

import bisect
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import msgspec

from troupe.actors.learner.batch import Assembled, CompletionLogProbs, assemble, assemble_given
from troupe.actors.learner.gathering import StepGroups, gid_of
from troupe.actors.learner.held_out import HeldOutRows
from troupe.actors.learner.measures import num_tokens
from troupe.actors.learner.rollouts import length_statistics
from troupe.actors.learner.scores import group_statistics, has_signal, spread_statistics
from troupe.actors.learner.token_figures import Watched
from troupe.actors.teacher.own import OwnTeacher, first_average
from troupe.actors.teacher.settings import TeacherConfig
from troupe.grpo import Batch, LearnerConfig, StepResult, learning_rate, sync_reference, train_on_batch
from troupe.grpo.log_probs import PolicyLogProbs
from troupe.grpo.loss import has_entropy_bonus
from troupe.grpo.ranks import OneRank, Ranks
from troupe.grpo.supervised import Supervision, begun_again
from troupe.messages import MemberStatus, ScoredGroup, TokenFigures
from troupe.policy import Base, NetworkConfig, Weights
from troupe.runtime.device import DeviceThread
from troupe.runtime.linux_cpu import blas_limited


class LearnerState(msgspec.Struct, frozen=True, kw_only=True):
    """What learning goes on from."""

    version: int
    """The version on the board."""
    weights: Weights
    optimizer_state: dict[str, mx.array]
    """Belongs to the learner alone: a step takes it apart."""
    reference: Weights | None = None
    """The reference policy; None where beta is 0."""
    average: Weights | None = None
    """By which the policy teaches itself; None where it does not, or does so by its weights of now."""
    num_tokens: int = 0
    """Prompt and completion tokens of the run so far."""
    skipped_in_a_row: int = 0
    """Steps, up to the last one, whose update was skipped because it was not finite."""


class Learned(NamedTuple):
    """What a step's work on the device comes to, evaluated."""

    state: LearnerState
    metrics: dict[str, float]
    advantages: dict[int, tuple[float, ...]]
    """Gid → (G,) of the groups that were trained on."""
    figures: dict[int, tuple[TokenFigures | None, ...]]
    """Gid → (G,) of the same groups, where they are kept."""
    parts: list[tuple[str, float, float]]
    """Parts of the work, with start and end (`time.perf_counter`)."""


class OtherRanks(Protocol):
    """The processes that learn every batch together with this one."""

    async def start(self, state: LearnerState, device: DeviceThread) -> None:
        """Start them with a state."""

    async def watch(self) -> None:
        """See that they are well, until cancelled; raises where they are not."""

    async def meet(self, device: DeviceThread) -> None:
        """Come together, while they are watched."""

    async def until_alone(self) -> None:
        """Wait until they do nothing else any more."""

    async def aclose(self) -> None:
        """End them."""

    def statuses(self) -> tuple[MemberStatus, ...]:
        """What each is at."""


class BatchTrainer:
    """Learns one step's groups after the other."""

    def __init__(
        self,
        config: LearnerConfig,
        policy_config: NetworkConfig,
        *,
        reward_weights: Mapping[str, float],
        temperature: float,
        max_completion_length: int,
        pad_id: int,
        total_steps: int,
        streams: int = 1,
        rates: Sequence[tuple[int, float]] = (),
        base: Base | None = None,
        seed: int = 0,
        gamma: float = 1.0,
    ) -> None:
        """`streams`: micro-batches that are differentiated at a time. `rates`: first step → peak learning rate, rising,
        where it is not the config's. `base`: what the weights complete; None: they are the whole network.
        `seed`: of the run, for what is drawn. `gamma`: by which a turn's reward counts less than the one before."""
        self.config = config
        self.reward_weights = reward_weights
        self.total_steps = total_steps
        self.base = Base() if base is None else base
        self._log_probs = CompletionLogProbs(
            policy_config,
            temperature,
            recompute=config.gradient_checkpointing or False,
            entropy_gradient=has_entropy_bonus(config),
            base=self.base,
            seed=seed,
            deterministic=config.deterministic,
        )
        self._max_completion_length = max_completion_length
        self._pad_id = pad_id
        self._num_streams = streams
        self._streams: list[mx.Stream] = []
        self._rates = list(rates)
        self._gamma = gamma
        self._seed = seed
        self.others: OtherRanks | None = None
        self.ranks: Ranks = OneRank()
        """That learn a batch together."""
        self.supervision: Supervision | None = None
        """Of the first steps."""
        self.held_out: HeldOutRows | None = None
        """What is measured between supervised steps."""
        self.watched: Watched | None = None
        self.teacher: TeacherConfig | None = None
        """By which the teacher's log-probs count; None: there is no teacher."""
        self.own_teacher: OwnTeacher | None = None
        """The policy, where it teaches itself."""
        self.told: Callable[[int, Batch | None, Sequence[float]], None] = lambda version, batch, rates: None
        """Called with every step before it is learned: the version that it begins with, and learning rates."""

    def watch(self) -> None:
        """Keep what is computed of each token, for those who close its group."""
        self.watched = Watched(self._log_probs)

    def open(self) -> None:
        """Get ready, on the thread that `train` will be called on."""
        if self._num_streams > 1:
            self._streams = [mx.new_stream(mx.default_device()) for _ in range(self._num_streams)]

    def set_rate(self, step: int, lr: float) -> None:
        """Another peak learning rate for a step and all that follow."""
        self._rates = [rate for rate in self._rates if rate[0] < step] + [(step, lr)]

    def is_supervised(self, version: int) -> bool:
        """Whether the step after a version is learned from completions that are given."""
        return version < self._supervised

    @property
    def _supervised(self) -> int:
        """Steps of that kind."""
        return 0 if self.supervision is None else self.supervision.steps

    def without_signal(self, groups: Sequence[ScoredGroup]) -> set[int]:
        """Gids of the groups that nothing can be learned from."""
        return {gid_of(group) for group in groups if not self._has_signal(group)}

    def _has_signal(self, group: ScoredGroup) -> bool:
        teaches = self.teacher is not None and self.teacher.coef > 0.0
        return teaches or has_signal(group, self.config, self.reward_weights, self._gamma)

    def train(self, state: LearnerState, step: StepGroups) -> Learned:
        """One learner batch."""
        parts: list[tuple[str, float, float]] = []
        began_s = time.perf_counter()

        def end_part(name: str) -> None:
            parts.append((name, parts[-1][2] if parts else began_s, time.perf_counter()))

        advantages: dict[int, tuple[float, ...]] = {}
        figures: dict[int, tuple[TokenFigures | None, ...]] = {}
        is_supervised = self.is_supervised(state.version)
        metrics, batch = self.describe(step), None
        if trained := step.ending("trained"):
            if is_supervised:
                assembled = assemble_given(trained, pad_id=self._pad_id)
            else:
                taught = self._taught(state, trained)
                if taught is not trained:
                    end_part("teach")
                assembled = self.assemble(taught, step.oldest if step.drops_stale else None)
            batch = assembled.batch
            advantages = dict(zip(map(gid_of, trained), assembled.advantages, strict=not is_supervised))
            metrics = {**assembled.metrics, **metrics}
        self.told(state.version, batch, self.learning_rates(state.version))
        state, of_result = self.advance(state, batch, end_part)
        if is_supervised and self.held_out is not None and self.held_out.is_due(state.version, self._supervised):
            with blas_limited(1 if self._streams else None):
                of_result |= self.held_out.measure(state.weights, self._log_probs)
            end_part("held out")
        state = msgspec.structs.replace(state, num_tokens=state.num_tokens + num_tokens(step.groups))
        if self.watched is not None and not is_supervised:
            figures = self.watched.collect(trained)
        return Learned(state, {**metrics, **of_result}, advantages, figures, parts)

    def advance(
        self, state: LearnerState, batch: Batch | None, on_part: Callable[[str], None]
    ) -> tuple[LearnerState, dict[str, float]]:
        """The state after a step, which without a batch makes no update, and the metrics of learning."""
        weights, optimizer_state, skipped_in_a_row = state.weights, state.optimizer_state, 0
        metrics: dict[str, float] = {}
        if batch is not None:
            result = self.learn(state, batch, on_part)
            weights, optimizer_state, metrics = result.weights, result.optimizer_state, result.metrics
            skipped_in_a_row = 0 if result.updated else state.skipped_in_a_row + 1
        after = LearnerState(
            version=state.version + 1,
            weights=weights,
            optimizer_state=optimizer_state,
            reference=self._followed(state, weights),
            average=self._averaged(state, weights),
            num_tokens=state.num_tokens,
            skipped_in_a_row=skipped_in_a_row,
        )
        return self._warmed_up(after), metrics

    def _warmed_up(self, state: LearnerState) -> LearnerState:
        """Where the last supervised step before others is done, as a run would begin with its policy."""
        if not self._supervised == state.version < self.total_steps:
            return state
        optimizer_state = begun_again(state.optimizer_state)
        mx.eval(optimizer_state)
        reference = None if state.reference is None else state.weights
        average = None if self.own_teacher is None else first_average(self.own_teacher.settings, state.weights)
        return msgspec.structs.replace(state, optimizer_state=optimizer_state, reference=reference, average=average)

    def describe(self, step: StepGroups) -> dict[str, float]:
        """Rewards and completions of all groups with scores, also those left out of the batch."""
        if any(group.group.supervised for group in step.groups):
            return length_statistics([rollout for group in step.groups for rollout in group.group.rollouts])
        usable = step.ending("trained", "filtered", "stale")
        scored = usable + [
            group
            for group in step.ending("quarantined")
            if group.faulted and any(score is not None for scores in group.scores.values() for score in scores)
        ]
        metrics = {"reward": math.nan}
        if scored:
            metrics = group_statistics(scored, self.config, self.reward_weights)
        if usable:
            metrics |= spread_statistics(usable, self.config, self.reward_weights)
        return metrics

    def assemble(self, groups: Sequence[ScoredGroup], oldest: int | None) -> Assembled:
        """The groups as a batch, without tokens of versions before `oldest`."""
        return assemble(
            groups,
            self.config,
            weights=self.reward_weights,
            pad_id=self._pad_id,
            oldest=oldest,
            gamma=self._gamma,
            teacher=self.teacher,
        )

    def learn(self, state: LearnerState, batch: Batch, on_part: Callable[[str], None]) -> StepResult:
        """`train_on_batch` by the learner's settings, or those of supervised steps."""
        config, longest = self.config, self._max_completion_length
        log_probs: PolicyLogProbs = self.watched or self._log_probs
        if self.supervision is not None and self.is_supervised(state.version):
            config, longest = self.supervision.config(config), self.supervision.max_completion_length
            log_probs = dataclasses.replace(self._log_probs, temperature=1.0, entropy_gradient=False, margins=True)
        with blas_limited(1 if self._streams else None):
            return train_on_batch(
                state.weights,
                state.optimizer_state,
                batch,
                log_probs,
                config,
                lr=self.learning_rates(state.version),
                ref_weights=state.reference,
                max_completion_length=longest,
                on_part=on_part,
                streams=self._streams,
                seed=self._seed,
                ranks=self.ranks,
            )

    def learning_rates(self, step: int) -> list[float]:
        """One for each update of the batch; the schedule counts updates, as TRL's does. Supervised steps have a
        schedule of their own, and that of the others begins after them."""
        config, supervised = self.config, self._supervised
        if changed := bisect.bisect_right(self._rates, step, key=lambda rate: rate[0]):
            config = msgspec.structs.replace(config, lr=self._rates[changed - 1][1])
        if self.supervision is not None and step < supervised:
            return [learning_rate(step, supervised, self.supervision.config(config))]
        passes = config.num_iterations
        first, total = (step - supervised) * passes, (self.total_steps - supervised) * passes
        return [learning_rate(first + i, total, config) for i in range(passes)]

    def _followed(self, state: LearnerState, weights: Weights) -> Weights | None:
        """The reference after the step: synchronized once for every `ref_model_sync_steps` updates that it completes.

        Updates are counted as the learning-rate schedule counts them. The reference serves whole batches, so a
        synchronization that falls due between the passes of one comes at its end.
        """
        config, reference = self.config, state.reference
        if reference is None or not config.sync_ref_model or self.is_supervised(state.version):
            return reference
        before, after = self._updates(state.version)
        for _ in range(after // config.ref_model_sync_steps - before // config.ref_model_sync_steps):
            reference = sync_reference(reference, weights, config.ref_model_mixup_alpha)
        return reference

    def _updates(self, version: int) -> tuple[int, int]:
        """How many there were before the step after a version, and after it, skipped ones included."""
        before = (version - self._supervised) * self.config.num_iterations
        return before, before + self.config.num_iterations

    def _taught(self, state: LearnerState, groups: Sequence[ScoredGroup]) -> Sequence[ScoredGroup]:
        """The groups as they are, or with what the policy says of them as its own teacher."""
        if self.own_teacher is None:
            return groups
        with blas_limited(1 if self._streams else None):
            return self.own_teacher.taught(groups, state.average, state.weights)

    def _averaged(self, state: LearnerState, weights: Weights) -> Weights | None:
        """The average after the step, synchronized as the reference is."""
        if self.own_teacher is None or self.is_supervised(state.version):
            return state.average
        return self.own_teacher.followed(state.average, weights, *self._updates(state.version))
