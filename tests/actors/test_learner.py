"""Learner: order does not matter, weights are those of `train_on_batch`, every group is closed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import anyio
import mlx.core as mx
import pytest

from tests.fakes import Reports, ended, make_scored, same_bits, send_all, taken
from tests.tiny import CONFIG
from troupe.actors.learner import Learner, LearnerOutputs, LearnerState
from troupe.errors import RunError
from troupe.grpo import LearnerConfig, adamw_init, learning_rate, train_on_batch
from troupe.learning import assemble, completion_log_probs
from troupe.messages import Checkpoint, GroupClosed, ScoredGroup, Snapshot, Span, Update
from troupe.policy import Weights, random_policy
from troupe.runtime import Channel, Mailbox, PolicyBoard, play

pytestmark = pytest.mark.anyio
LEARNER = LearnerConfig(batch_size=2, lr=1e-2)
UNDIVIDED = LearnerConfig(batch_size=2, lr=1e-2, scale_rewards="none", max_nonfinite_steps=2)
ENDING = r"step 1: .* all of the last 2 \(learner.max_nonfinite_steps\).*lower learner.lr"
TOTAL = 3


class Stage:
    """A learner of groups of three, two a step, with everything that it sends."""

    def __init__(
        self,
        *,
        config: LearnerConfig = LEARNER,
        max_staleness: int = 0,
        checkpoint_every: int = 99,
        version: int = 0,
        total_steps: int = TOTAL,
    ) -> None:
        policy = random_policy(CONFIG, seed=3)
        self.start_weights = policy.weights
        self.reports, self.inbox = Reports(), Mailbox("learner")
        self.prompter, self.metrics, self.updates, self.checkpointer = map(Mailbox, "pmuc")
        self.scored: Channel[ScoredGroup] = self.inbox.channel("scored", ScoredGroup, bound=20)
        self.request: Channel[Checkpoint] = self.inbox.channel("request", Checkpoint, bound=1, side=True)
        self.board: PolicyBoard[Weights] = PolicyBoard(max_staleness)
        self.board.publish(version, policy.weights)
        optimizer_state = adamw_init(policy.weights)
        mx.eval(list(optimizer_state.values()))
        self.learner = Learner(
            self.inbox,
            LearnerOutputs(
                closed_to_prompter=self.prompter.channel("closed", GroupClosed, bound=20),
                closed_to_metrics=self.metrics.channel("closed", GroupClosed, bound=20),
                updates=self.updates.channel("updates", Update, bound=20),
                snapshots=self.checkpointer.channel("snapshots", Snapshot, bound=20),
            ),
            config=config,
            policy_config=CONFIG,
            state=LearnerState(version=version, weights=policy.weights, optimizer_state=optimizer_state),
            reference=policy.weights if config.beta else None,
            board=self.board,
            reward_weights={"r": 1.0},
            temperature=0.9,
            max_completion_length=12,
            min_scored=2,
            pad_id=257,
            total_steps=total_steps,
            checkpoint_every=checkpoint_every,
            report=self.reports.reporter("learner"),
        )

    async def play(self, groups: Sequence[ScoredGroup]) -> None:
        """To the end of the mailbox."""
        await send_all(self.scored, groups)
        await play([self.learner])


def two_steps() -> list[ScoredGroup]:
    return [
        make_scored(0, 0, (0.0, 1.0, 0.5)),
        make_scored(0, 1, (0.2, None, 0.9)),
        make_scored(1, 0, (1.0, 0.0, 0.0), version=1),
        make_scored(1, 1, (0.0, 0.1, 0.7), version=1),
    ]


def expected(stage: Stage, groups: Sequence[ScoredGroup], config: LearnerConfig = LEARNER) -> Weights:
    """The same two steps by hand, in slot order."""
    weights, state = stage.start_weights, adamw_init(stage.start_weights)
    for step in range(2):
        batch = assemble(groups[2 * step : 2 * step + 2], config, weights={"r": 1.0}, pad_id=257).batch
        passes = config.num_iterations
        result = train_on_batch(
            weights,
            state,
            batch,
            completion_log_probs(CONFIG, 0.9),
            config,
            lr=[learning_rate(step * passes + i, TOTAL * passes, config) for i in range(passes)],
            ref_weights=stage.start_weights if config.beta else None,
            max_completion_length=12,
        )
        weights, state = result.weights, result.optimizer_state
    return weights


@pytest.mark.parametrize(
    "config",
    [
        LEARNER,
        LearnerConfig(batch_size=2, lr=1e-2, num_iterations=2, beta=0.1, warmup_steps=3, lr_scheduler="cosine"),
    ],
)
async def test_any_order_of_arrival_gives_the_weights_of_train_on_batch_bit_for_bit(config: LearnerConfig) -> None:
    groups = two_steps()
    reference = expected(Stage(config=config), groups, config)
    assert not same_bits(reference, Stage().start_weights)
    for order in [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)]:
        stage = Stage(config=config)
        await stage.play([groups[i] for i in order])
        assert stage.learner.version == 2
        assert same_bits(stage.learner.weights, reference), order
        assert stage.board.kept[2] is stage.learner.weights, "handed over by reference"


async def test_every_group_is_closed_once_to_both_with_the_version_it_made() -> None:
    stage = Stage()
    await stage.play(list(reversed(two_steps())))
    to_prompter, to_metrics = await taken(stage.prompter), await taken(stage.metrics)
    assert to_prompter == to_metrics
    assert [(c.gid, c.slot.step, c.slot.place, c.state, c.version) for c in to_prompter] == [
        (0, 0, 0, "trained", 1),
        (1, 0, 1, "trained", 1),
        (2, 1, 0, "trained", 2),
        (3, 1, 1, "trained", 2),
    ]
    assert all(map(ended, (stage.prompter, stage.metrics, stage.updates, stage.checkpointer)))


async def test_updates_tell_the_step() -> None:
    stage = Stage()
    await stage.play(two_steps())
    first, second = await taken(stage.updates)
    assert (first.step, first.version, first.total_steps, second.step) == (1, 1, TOTAL, 2)
    assert first.metrics["reward"] == pytest.approx((0.0 + 1.0 + 0.5 + 0.2 + 0.9) / 5)
    assert first.metrics["groups/trained"] == 2.0
    assert first.metrics["staleness"] == 0.0
    assert second.metrics["staleness"] == 0.0
    assert first.metrics["learning_rate"] == pytest.approx(1e-2)
    assert second.metrics["learning_rate"] == pytest.approx(1e-2 * 2 / 3)  # linear over three steps
    assert first.metrics["tokens_per_second"] * first.metrics["step_time"] == pytest.approx(
        sum(len(r.token_ids) for scored in two_steps()[:2] for r in scored.group.rollouts)
    )
    spans = [m for m in await taken(stage.reports.mailbox) if isinstance(m, Span)]
    assert [(s.name, s.step) for s in spans] == [("learn", 0), ("publish", 0), ("learn", 1), ("publish", 1)]


async def test_staleness_is_counted_in_versions() -> None:
    stage = Stage(max_staleness=1, version=4, total_steps=9)
    await stage.play([make_scored(4, 0, version=3), make_scored(4, 1, version=3)])
    [update] = await taken(stage.updates)
    assert (update.step, update.metrics["staleness"]) == (5, 1.0)


async def test_a_group_with_too_few_scores_is_quarantined_named_and_not_trained() -> None:
    poor = make_scored(0, 1, (0.7, None, None))
    stage, alone = Stage(), Stage()
    await stage.play([make_scored(0, 0), poor])
    result = train_on_batch(
        alone.start_weights,
        adamw_init(alone.start_weights),
        assemble([make_scored(0, 0)], LEARNER, weights={"r": 1.0}, pad_id=257).batch,
        completion_log_probs(CONFIG, 0.9),
        LEARNER,
        lr=1e-2,
        max_completion_length=12,
    )
    assert same_bits(stage.learner.weights, result.weights)
    assert [c.state for c in await taken(stage.prompter)] == ["trained", "quarantined"]
    [incident] = await stage.reports.incidents()
    assert (incident.kind, incident.gid, incident.actor) == ("group_quarantined", 1, "learner")
    assert "group 1 (dataset row 1)" in incident.message
    assert (await taken(stage.updates))[0].metrics["groups/trained"] == 1.0


async def test_a_step_without_usable_groups_makes_no_update_but_a_version() -> None:
    stage = Stage()
    nothing: tuple[float | None, ...] = (None, None, None)
    await stage.play([make_scored(0, 0, nothing), make_scored(0, 1, nothing)])
    assert stage.learner.version == 1
    assert stage.board.version == 1
    assert stage.learner.weights is stage.start_weights
    assert [(c.gid, c.state) for c in await taken(stage.metrics)] == [(0, "quarantined"), (1, "quarantined")]
    [update] = await taken(stage.updates)
    assert (update.step, update.metrics["groups/trained"]) == (1, 0.0)
    assert "loss" not in update.metrics
    assert [i.kind for i in await stage.reports.incidents()] == ["group_quarantined"] * 2


def endless_scores(step: int) -> list[ScoredGroup]:
    """Scores so large that, undivided, the square of the gradient is past float32."""
    return [make_scored(step, place, (1e38, 0.0, 0.0)) for place in range(2)]


async def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on() -> None:
    stage = Stage(config=UNDIVIDED)
    await stage.play([*endless_scores(0), *two_steps()[2:], *endless_scores(2)])
    assert stage.learner.version == 3, "a good step in between starts the count anew"
    assert all(mx.all(mx.isfinite(array)).item() for array in stage.learner.weights.values())
    incidents = await stage.reports.incidents()
    assert [i.kind for i in incidents] == ["nonfinite_step"] * 2
    assert "step 0: " in incidents[0].message
    assert "gradient norm (inf) or updated weights are not finite; the update was skipped" in incidents[0].message
    assert [c.state for c in await taken(stage.prompter)] == ["trained"] * 6


async def test_too_many_of_them_in_a_row_end_the_run() -> None:
    stage = Stage(config=UNDIVIDED)
    with pytest.raises(RunError, match=ENDING):
        await stage.play([*endless_scores(0), *endless_scores(1), *two_steps()])
    assert stage.learner.version == 1
    assert not ended(stage.checkpointer), "no final policy is made of a run that failed"
    assert await taken(stage.checkpointer) == []


async def test_snapshots_by_schedule_and_one_that_is_final() -> None:
    stage = Stage(checkpoint_every=1, total_steps=2, max_staleness=1)
    await stage.play(two_steps())
    first, final = await taken(stage.checkpointer)
    assert (first.version, first.final, final.version, final.final) == (1, False, 2, True)
    assert list(first.behind) == [0]
    assert first.behind[0] is stage.start_weights
    assert list(final.behind) == [1]
    assert final.behind[1] is first.weights, "weights travel by reference"
    assert first.optimizer_state.keys() == final.optimizer_state.keys()
    assert not same_bits(first.optimizer_state, final.optimizer_state)


async def test_a_checkpoint_on_request_holds_the_last_completed_step() -> None:
    stage = Stage()
    groups = two_steps()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(play, [stage.learner])
        for group in groups[:3]:  # step 1 is not complete
            await stage.scored.send(group)
        while stage.learner.version == 0:
            await anyio.wait_all_tasks_blocked()
        stage.request.send_nowait(Checkpoint())
        await anyio.wait_all_tasks_blocked()
        [snapshot] = await taken(stage.checkpointer)
        assert (snapshot.version, snapshot.final) == (1, False)
        assert snapshot.weights is stage.learner.weights
        assert snapshot.behind == {}
        stage.scored.close()


async def test_the_first_step_is_timed_from_the_start_of_the_play(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1000.0)
    stage = Stage()
    stage.learner._last_end_s = 0.0
    monkeypatch.setattr("troupe.actors.learner.time.perf_counter", lambda: next(clock))
    await stage.play(two_steps()[:2])
    [update] = await taken(stage.updates)
    assert update.metrics["step_time"] < 20
