"""Learner: order does not matter, weights are those of `train_on_batch`, every group is closed once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import anyio
import mlx.core as mx
import msgspec
import pytest

from tests.support.episodes import acted, episode, played
from tests.support.fakes import Reports, device_thread, ended, make_scored, same_bits, send_all, taken
from tests.support.tiny import CONFIG
from troupe.actors.learner.actor import Learner, LearnerOutputs
from troupe.actors.learner.batch import CompletionLogProbs, assemble
from troupe.actors.learner.gathering import StepGroups, gathering_for
from troupe.actors.learner.measures import StepMeter
from troupe.actors.learner.snapshots import Snapshots
from troupe.actors.learner.train import BatchTrainer, Learned, LearnerState
from troupe.actors.ledgers import OpenGroups
from troupe.actors.schedule import OnStale, ScheduleConfig
from troupe.errors import RunError
from troupe.grpo import LearnerConfig, adamw_init, learning_rate, train_on_batch
from troupe.messages import Checkpoint, GroupClosed, Replace, ScoredGroup, Snapshot, Span, Unfinished, Update
from troupe.policy import Weights, random_policy
from troupe.runtime.board import PolicyBoard
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import run_roles, together

pytestmark = pytest.mark.anyio
LEARNER = LearnerConfig(batch_size=2, lr=1e-2)
DYNAMIC = LearnerConfig(batch_size=2, lr=1e-2, dynamic_sampling=True, max_resampling_attempts=2)
UNDIVIDED = LearnerConfig(batch_size=2, lr=1e-2, scale_rewards="none", max_nonfinite_steps=2)
ENDING = r"step 1: .* all of the last 2 \(learner.max_nonfinite_steps\).*lower learner.lr"
TOTAL = 3


class Rig:
    """A learner of groups of three, two a step, with everything that it sends."""

    def __init__(
        self,
        *,
        config: LearnerConfig = LEARNER,
        max_staleness: int = 0,
        checkpoint_every: int = 99,
        version: int = 0,
        total_steps: int = TOTAL,
        num_tokens: int = 0,
        learns_beside_checkpoints: bool = True,
        schedule: ScheduleConfig | None = None,
        closed_bound: int = 20,
        recorded: Mapping[int, ScoredGroup] = MappingProxyType({}),
        unfinished: Unfinished | None = None,
        trainer: type[BatchTrainer] = BatchTrainer,
        meter: StepMeter | None = None,
    ) -> None:
        policy = random_policy(CONFIG, seed=3)
        self.start_weights = policy.weights
        self.snapshots: list[Snapshot] = []
        self.reports, self.inbox = Reports(), Mailbox("learner")
        self.prompter, self.metrics, self.updates, self.checkpointer = map(Mailbox, "pmuc")
        self.scored: Channel[ScoredGroup] = self.inbox.channel("scored", ScoredGroup, bound=20)
        self.request: Channel[Checkpoint] = self.inbox.channel("request", Checkpoint, bound=1, side=True)
        self.board: PolicyBoard[Weights] = PolicyBoard(max_staleness)
        self.board.publish(version, policy.weights)
        optimizer_state = adamw_init(policy.weights)
        mx.eval(list(optimizer_state.values()))
        self.open_groups = OpenGroups()
        self.learner = Learner(
            self.inbox,
            LearnerOutputs(
                closed_to_prompter=self.prompter.channel("closed", GroupClosed, Replace, bound=20),
                closed_to_metrics=self.metrics.channel("closed", GroupClosed, bound=closed_bound),
                updates=self.updates.channel("updates", Update, bound=20),
                snapshots=self.checkpointer.channel("snapshots", Snapshot, bound=20),
            ),
            device=device_thread("learner"),
            trainer=trainer(
                config,
                CONFIG,
                reward_weights={"r": 1.0},
                temperature=0.9,
                max_completion_length=12,
                pad_id=257,
                total_steps=total_steps,
            ),
            state=LearnerState(
                version=version,
                weights=policy.weights,
                optimizer_state=optimizer_state,
                reference=policy.weights if config.beta else None,
                num_tokens=num_tokens,
            ),
            board=self.board,
            gathering=gathering_for(
                schedule or ScheduleConfig(max_staleness=max_staleness),
                batch_size=2,
                min_scored=2,
                resampling=config.max_resampling_attempts,
                unfinished=unfinished,
            ),
            snapshots=Snapshots(
                every=checkpoint_every,
                beside_learning=learns_beside_checkpoints,
                with_reference=config.sync_ref_model,
                open_groups=self.open_groups,
                recorded=recorded,
            ),
            epoch=lambda version: version / 4,
            meter=meter,
            report=self.reports.reporter("learner"),
        )

    async def run(self, groups: Sequence[ScoredGroup]) -> None:
        """To the end of the mailbox."""
        await send_all(self.scored, groups)
        await together([self.learner.run, self.write])

    async def write(self) -> None:
        """Take every snapshot as soon as it comes."""
        async for snapshot in self.checkpointer:
            self.snapshots.append(snapshot)


def two_steps() -> list[ScoredGroup]:
    return [
        make_scored(0, 0, (0.0, 1.0, 0.5)),
        make_scored(0, 1, (0.2, None, 0.9)),
        make_scored(1, 0, (1.0, 0.0, 0.0), version=1),
        make_scored(1, 1, (0.0, 0.1, 0.7), version=1),
    ]


def both() -> list[list[ScoredGroup]]:
    return [two_steps()[:2], two_steps()[2:]]


def by_hand(
    rig: Rig,
    *steps: Sequence[ScoredGroup],
    config: LearnerConfig = LEARNER,
    first: int = 0,
    total: int = TOTAL,
    oldest: int | None = None,
) -> Weights:
    """The weights that `train_on_batch` makes of these groups, step by step."""
    weights, state, passes = rig.start_weights, adamw_init(rig.start_weights), config.num_iterations
    for step, groups in enumerate(steps, first):
        result = train_on_batch(
            weights,
            state,
            assemble(groups, config, weights={"r": 1.0}, pad_id=257, oldest=oldest).batch,
            CompletionLogProbs(CONFIG, 0.9),
            config,
            lr=[learning_rate(step * passes + i, total * passes, config) for i in range(passes)],
            ref_weights=rig.start_weights if config.beta else None,
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
    reference = by_hand(Rig(), *both(), config=config)
    assert not same_bits(reference, Rig().start_weights)
    for order in [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)]:
        rig = Rig(config=config)
        await rig.run([groups[i] for i in order])
        assert rig.learner.version == 2
        assert same_bits(rig.learner.weights, reference), order
        assert rig.board.kept[2] is rig.learner.weights, "handed over by reference"


async def test_every_group_is_closed_once_to_both_with_the_version_it_made() -> None:
    rig = Rig()
    await rig.run(list(reversed(two_steps())))
    to_prompter, to_metrics = await taken(rig.prompter), await taken(rig.metrics)
    assert to_prompter == to_metrics
    assert [(c.gid, c.slot.step, c.slot.place, c.state, c.version) for c in to_prompter] == [
        (0, 0, 0, "trained", 1),
        (1, 0, 1, "trained", 1),
        (2, 1, 0, "trained", 2),
        (3, 1, 1, "trained", 2),
    ]
    assert all(map(ended, (rig.prompter, rig.metrics, rig.updates, rig.checkpointer)))


async def test_updates_describe_the_step() -> None:
    rig = Rig()
    await rig.run(two_steps())
    first, second = await taken(rig.updates)
    assert (first.step, first.version, first.total_steps, second.step) == (1, 1, TOTAL, 2)
    assert first.metrics["reward"] == pytest.approx((0.0 + 1.0 + 0.5 + 0.2 + 0.9) / 5)
    assert first.metrics["groups/trained"] == 2.0
    assert first.metrics["staleness"] == 0.0
    assert second.metrics["staleness"] == 0.0
    assert first.metrics["learning_rate"] == pytest.approx(1e-2)
    assert second.metrics["learning_rate"] == pytest.approx(1e-2 * 2 / 3)  # linear over three steps
    tokens = [[len(r.token_ids) for scored in step for r in scored.group.rollouts] for step in both()]
    prompts = [[len(scored.group.prompt.prompt_ids) for scored in step for _ in range(3)] for step in both()]
    assert first.metrics["tokens_per_second"] * first.metrics["step_time"] == pytest.approx(sum(tokens[0]))
    assert first.metrics["learn_tokens_per_second"] * first.metrics["learn_time"] == pytest.approx(
        sum(tokens[0]) + sum(prompts[0])
    )
    assert first.metrics["num_tokens"] == sum(tokens[0]) + sum(prompts[0])
    assert second.metrics["num_tokens"] == sum(tokens[0]) + sum(prompts[0]) + sum(tokens[1]) + sum(prompts[1])
    assert (first.metrics["epoch"], second.metrics["epoch"]) == (0.25, 0.5)  # 2 and 4 prompts of 8
    assert first.metrics["completions/mean_length"] == pytest.approx(sum(tokens[0]) / 6)
    assert first.metrics["advantages/frac_zero"] == 2 / 6  # 0.5 is the mean of its group; one score is missing
    assert first.metrics["advantages/mean"] == pytest.approx(0, abs=1e-6)
    spans = [m for m in await taken(rig.reports.mailbox) if isinstance(m, Span)]
    works = [(s.name, s.step) for s in spans if s.kind == "work"]
    names = ["prepare", "pass", "learn", "publish", "close: trained"]
    assert works == [(name, step) for step in (0, 1) for name in names]
    learns = [s for s in spans if s.name == "learn"]
    assert [s.gids for s in learns] == [tuple(scored.group.prompt.gid for scored in step) for step in both()]
    assert [s.gids for s in spans if s.name == "close: trained"] == [s.gids for s in learns]


async def test_staleness_is_counted_in_versions() -> None:
    rig = Rig(max_staleness=1, version=4, total_steps=9)
    older, newer = make_scored(4, 0, version=3), make_scored(4, 1, version=4)
    await rig.run([older, newer])
    [update] = await taken(rig.updates)
    old, new = (sum(len(r.token_ids) for r in scored.group.rollouts) for scored in (older, newer))
    assert update.step == 5
    assert update.metrics["staleness"] == pytest.approx(old / (old + new))
    assert update.metrics["staleness/max"] == 1.0


async def test_tokens_of_earlier_starts_and_of_quarantined_groups_count() -> None:
    rig, poor = Rig(num_tokens=1000), make_scored(0, 1, (0.7, None, None))
    await rig.run([make_scored(0, 0), poor])
    [update] = await taken(rig.updates)
    rollouts = [r for scored in (make_scored(0, 0), poor) for r in scored.group.rollouts]
    assert update.metrics["num_tokens"] == 1000 + 3 * 2 + 3 * 3 + sum(len(r.token_ids) for r in rollouts)
    assert rig.snapshots[0].num_tokens == update.metrics["num_tokens"]


async def test_time_and_peak_memory_of_a_step_are_measured_from_the_end_of_the_one_before() -> None:
    calls: list[str] = []
    clock, peaks = iter([1000.0, 1002.5, 1003.0]), iter([3_000_000_000, 2_000_000_000])

    def read() -> int:
        calls.append("read")
        return next(peaks)

    meter = StepMeter(clock=lambda: next(clock), peak_bytes=read, reset_peak=lambda: calls.append("reset"))
    rig = Rig(meter=meter)
    await rig.run(two_steps())
    assert calls == ["reset", "read", "reset", "read", "reset"]
    figures = [update.metrics for update in await taken(rig.updates)]
    assert [(m["peak_memory_gb"], m["step_time"]) for m in figures] == [(3.0, 2.5), (2.0, 0.5)]


async def test_a_group_with_too_few_scores_is_quarantined_named_and_not_trained() -> None:
    poor = make_scored(0, 1, (0.7, None, None))
    rig = Rig()
    await rig.run([make_scored(0, 0), poor])
    assert same_bits(rig.learner.weights, by_hand(rig, [make_scored(0, 0)]))
    assert [c.state for c in await taken(rig.prompter)] == ["trained", "quarantined"]
    [incident] = await rig.reports.incidents()
    assert (incident.kind, incident.gid, incident.actor) == ("group_quarantined", 1, "learner")
    assert "group 1 (dataset row 1)" in incident.message
    assert (await taken(rig.updates))[0].metrics["groups/trained"] == 1.0


async def test_a_step_without_usable_groups_makes_no_update_but_a_version() -> None:
    rig = Rig()
    nothing: tuple[float | None, ...] = (None, None, None)
    await rig.run([make_scored(0, 0, nothing), make_scored(0, 1, nothing)])
    assert rig.learner.version == 1
    assert rig.board.version == 1
    assert rig.learner.weights is rig.start_weights
    assert [(c.gid, c.state) for c in await taken(rig.metrics)] == [(0, "quarantined"), (1, "quarantined")]
    [update] = await taken(rig.updates)
    assert (update.step, update.metrics["groups/trained"]) == (1, 0.0)
    assert "loss" not in update.metrics
    assert [i.kind for i in await rig.reports.incidents()] == ["group_quarantined"] * 2


def endless_scores(step: int) -> list[ScoredGroup]:
    """Scores so large that, undivided, the square of the gradient is past float32."""
    return [make_scored(step, place, (1e38, 0.0, 0.0)) for place in range(2)]


async def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on() -> None:
    rig = Rig(config=UNDIVIDED)
    await rig.run([*endless_scores(0), *two_steps()[2:], *endless_scores(2)])
    assert rig.learner.version == 3, "a good step in between starts the count anew"
    assert all(mx.all(mx.isfinite(array)).item() for array in rig.learner.weights.values())
    incidents = await rig.reports.incidents()
    assert [i.kind for i in incidents] == ["nonfinite_step"] * 2
    assert "step 0: " in incidents[0].message
    assert "gradient norm (inf) or updated weights are not finite; the update was skipped" in incidents[0].message
    assert [c.state for c in await taken(rig.prompter)] == ["trained"] * 6


async def test_too_many_of_them_in_a_row_end_the_run() -> None:
    rig = Rig(config=UNDIVIDED)
    with pytest.raises(RunError, match=ENDING):
        await rig.run([*endless_scores(0), *endless_scores(1), *two_steps()])
    assert rig.learner.version == 2
    assert not ended(rig.checkpointer), "no final policy is made of a run that failed"
    assert rig.snapshots == []


async def test_snapshots_by_schedule_and_one_that_is_final() -> None:
    rig = Rig(checkpoint_every=1, total_steps=2, max_staleness=1)
    await rig.run(two_steps())
    first, final = rig.snapshots
    assert (first.version, first.final, final.version, final.final) == (1, False, 2, True)
    assert list(first.behind) == [0]
    assert first.behind[0] is rig.start_weights
    assert list(final.behind) == [1]
    assert final.behind[1] is first.weights, "weights travel by reference"
    assert first.optimizer_state.keys() == final.optimizer_state.keys()
    assert not same_bits(first.optimizer_state, final.optimizer_state)


async def test_a_checkpoint_on_request_holds_the_last_completed_step() -> None:
    rig = Rig()
    groups = two_steps()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        tasks.start_soon(rig.write)
        for group in groups[:3]:  # step 1 is not complete
            await rig.scored.send(group)
        while rig.learner.version == 0:
            await anyio.wait_all_tasks_blocked()
        rig.request.send_nowait(Checkpoint())
        await anyio.wait_all_tasks_blocked()
        [snapshot] = rig.snapshots
        assert (snapshot.version, snapshot.final) == (1, False)
        assert snapshot.weights is rig.learner.weights
        assert snapshot.behind == {}
        rig.scored.close()


SAME = (0.4, 0.4, None)
NOTHING: tuple[float | None, ...] = (None, None, None)


def replacements(messages: Sequence[GroupClosed | Replace]) -> list[list[tuple[int, int, int]]]:
    """Step, place and attempt of what every Replace names."""
    return [[(s.step, s.place, s.attempt) for s in m.slots] for m in messages if isinstance(m, Replace)]


def ends(messages: Sequence[GroupClosed | Replace]) -> list[tuple[int, int, int, str]]:
    """Step, place, attempt and state of every group closed."""
    return [(m.slot.step, m.slot.place, m.slot.attempt, m.state) for m in messages if isinstance(m, GroupClosed)]


async def test_groups_without_signal_are_replaced_together_when_their_round_is_scored() -> None:
    rig = Rig(config=DYNAMIC)
    alone = make_scored(0, 1, (0.3, 0.1, None), attempt=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        await rig.scored.send(make_scored(0, 1, SAME))
        await anyio.wait_all_tasks_blocked()
        assert await taken(rig.prompter) == [], "the other place could be without signal too"
        await rig.scored.send(make_scored(0, 0, (1.0, 1.0, 1.0)))
        await something_in(rig.prompter)
        assert replacements(await taken(rig.prompter)) == [[(0, 0, 0), (0, 1, 0)]]
        await rig.scored.send(alone)
        await rig.scored.send(make_scored(0, 0, (0.0, 0.0, 0.0), attempt=1))
        await something_in(rig.prompter)
        assert replacements(await taken(rig.prompter)) == [[(0, 0, 1)]]
        assert await taken(rig.metrics) == [], "groups are closed when their step is done"
        await rig.scored.send(make_scored(0, 0, (0.0, 1.0, 0.0), attempt=2))
        rig.scored.close()
    assert rig.learner.version == 1
    assert ends(await taken(rig.metrics)) == [
        (0, 0, 0, "filtered"),
        (0, 0, 1, "filtered"),
        (0, 0, 2, "trained"),
        (0, 1, 0, "filtered"),
        (0, 1, 1, "trained"),
    ]
    to_prompter = await taken(rig.prompter)
    assert ends(to_prompter) == [(0, 0, 2, "trained"), (0, 1, 1, "trained")], "one a credit"
    trained = [make_scored(0, 0, (0.0, 1.0, 0.0), attempt=2), alone]
    assert same_bits(rig.learner.weights, by_hand(rig, trained, config=DYNAMIC))


def episodes(place: int, *, attempt: int = 0, turn_rewards: float = 0.0, version: int = 0) -> ScoredGroup:
    """Three episodes, of which two have equal rewards and one has none: two turns each with something read between, the
    first told anew behind it. The first one's last turn brings `turn_rewards`."""
    rollouts = [acted(2, 1, 2, rows=[(3, (5, 6))] if i == 0 else [], versions=[version] * 5) for i in range(3)]
    turns = [
        episode((0, 2), (3, 5), rewards=(0.0, turn_rewards if i == 0 else 0.0), states=("begun", "seen"))
        for i in range(3)
    ]
    return played(rollouts, turns, SAME, place=place, attempt=attempt)


async def test_groups_of_equal_rewards_are_learned_from_by_their_turns_and_else_replaced() -> None:
    config = msgspec.structs.replace(DYNAMIC, turn_advantages="gigpo", gradient_accumulation_steps=2)
    rig = Rig(config=config)
    groups = [episodes(0), episodes(1, turn_rewards=2.0), episodes(0, attempt=1, turn_rewards=1.0)]
    await rig.run(groups)
    to_prompter = await taken(rig.prompter)
    assert replacements(to_prompter) == [[(0, 0, 0)]]
    assert ends(to_prompter) == [(0, 0, 1, "trained"), (0, 1, 0, "trained")]
    closed = [message for message in await taken(rig.metrics) if message.advantages is not None]
    assert [message.advantages for message in closed] == [(0.0,) * 3] * 2, "those of whole episodes"
    assert same_bits(rig.learner.weights, by_hand(rig, [groups[2], groups[1]], config=config))
    assert not same_bits(rig.learner.weights, rig.start_weights)
    [update] = await taken(rig.updates)
    expected = {"turns/compared": 2 / 3, "turns/mean": 2.0, "completions/mean_length": 4.0}
    assert {name: update.metrics[name] for name in expected} == expected
    assert update.metrics["tokens_per_second"] * update.metrics["step_time"] == pytest.approx(9 * 4)


async def test_what_was_read_is_neither_old_nor_new() -> None:
    """Old versions of what was read leave a group trained; old ones of all that was sampled leave it stale."""
    rig = Rig(schedule=ScheduleConfig(mode="free", max_staleness=1, on_stale="drop"), version=5)
    young, old = episodes(0, version=5), episodes(1, version=1)
    scores = {"r": (0.0, 1.0, 0.5)}
    await rig.run([msgspec.structs.replace(group, scores=scores) for group in (young, old)])
    assert [state for *_, state in ends(await taken(rig.metrics))] == ["trained", "stale"]
    [update] = await taken(rig.updates)
    assert update.metrics["tokens/stale_fraction"] == 0.5


async def something_in(mailbox: Mailbox) -> None:
    while not len(mailbox):
        await anyio.wait_all_tasks_blocked()


async def test_a_place_without_signal_to_the_last_is_left_out_and_its_credit_returned() -> None:
    rig = Rig(config=DYNAMIC)
    groups = [make_scored(0, 0, SAME, attempt=a) for a in range(3)]
    good = make_scored(0, 1)
    await rig.run([good, *groups])
    to_prompter = await taken(rig.prompter)
    assert replacements(to_prompter) == [[(0, 0, 0)], [(0, 0, 1)]]
    assert ends(to_prompter) == [(0, 0, 2, "filtered"), (0, 1, 0, "trained")]
    assert ends(await taken(rig.metrics)) == [*[(0, 0, a, "filtered") for a in range(3)], (0, 1, 0, "trained")]
    [update] = await taken(rig.updates)
    tokens = [sum(len(r.token_ids) for r in scored.group.rollouts) for scored in (*groups, good)]
    expected = {
        "groups/trained": 1.0,
        "groups/filtered": 3.0,
        "groups/resampled": 2.0,
        "groups/quarantined": 0.0,
        "groups/filtered_token_fraction": sum(tokens[:3]) / sum(tokens),
        "reward": (6 * 0.4 + 0.0 + 1.0 + 0.5) / 9,  # of every group sampled: filtering does not colour it
        "frac_reward_zero_std": 3 / 4,
        "completions/mean_length": sum(tokens) / 12,
        "advantages/abs_mean": 1.0 / (0.5 + 1e-4) / 3,  # of the groups trained: ±0.5 / σ and 0
        "num_tokens": sum(tokens) + 3 * 2 + 3 * 3 + 3 * 2 + 3 * 3,  # prompts have 2 tokens, or 3 at odd place + attempt
    }
    assert {name: update.metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert update.metrics["tokens_per_second"] * update.metrics["step_time"] == pytest.approx(sum(tokens))


async def test_a_step_without_any_signal_makes_a_version_and_no_update() -> None:
    rig = Rig(config=DYNAMIC)
    await rig.run([make_scored(0, place, SAME, attempt=a) for a in range(3) for place in range(2)])
    assert (rig.learner.version, rig.board.version) == (1, 1)
    assert rig.learner.weights is rig.start_weights
    [update] = await taken(rig.updates)
    assert "loss" not in update.metrics
    assert update.metrics["reward"] == pytest.approx(0.4)
    assert update.metrics["learn_tokens_per_second"] == 0.0
    assert [end[3] for end in ends(await taken(rig.prompter))] == ["filtered", "filtered"]


async def test_a_quarantined_group_is_not_replaced() -> None:
    rig = Rig(config=DYNAMIC)
    await rig.run(
        [
            make_scored(0, 0, NOTHING),
            make_scored(0, 1, SAME),
            make_scored(0, 1, NOTHING, attempt=1),
        ]
    )
    to_prompter = await taken(rig.prompter)
    assert replacements(to_prompter) == [[(0, 1, 0)]]
    assert ends(to_prompter) == [(0, 0, 0, "quarantined"), (0, 1, 1, "quarantined")]
    assert rig.learner.version == 1


async def test_replacements_of_a_later_step_do_not_wait_for_the_earlier_one() -> None:
    rig = Rig(config=DYNAMIC, max_staleness=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        for group in (make_scored(1, 0, SAME), make_scored(1, 1), make_scored(0, 1)):
            await rig.scored.send(group)
        await something_in(rig.prompter)
        assert replacements(await taken(rig.prompter)) == [[(1, 0, 0)]]
        await rig.scored.send(make_scored(1, 0, attempt=1))
        await rig.scored.send(make_scored(0, 0))
        rig.scored.close()
    assert rig.learner.version == 2
    assert [end[:3] for end in ends(await taken(rig.prompter))] == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 0)]


async def test_without_dynamic_sampling_equal_rewards_are_trained_on() -> None:
    rig = Rig()
    await rig.run([make_scored(0, 0, SAME), make_scored(0, 1)])
    to_prompter = await taken(rig.prompter)
    assert replacements(to_prompter) == []
    assert [end[3] for end in ends(to_prompter)] == ["trained", "trained"]


@pytest.mark.parametrize(
    ("every", "passes", "synced"), [(1, 1, [1, 1]), (2, 1, [0, 1]), (2, 3, [1, 2]), (9, 2, [0, 0])]
)
async def test_the_reference_follows_the_policy_every_so_many_updates(
    every: int, passes: int, synced: list[int]
) -> None:
    config = LearnerConfig(
        batch_size=2,
        lr=1e-2,
        beta=0.1,
        num_iterations=passes,
        sync_ref_model=True,
        ref_model_sync_steps=every,
        ref_model_mixup_alpha=0.25,
    )
    rig = Rig(config=config, checkpoint_every=1, total_steps=2)
    await rig.run(two_steps())
    reference = rig.start_weights
    for snapshot, times in zip(rig.snapshots, synced, strict=True):
        for _ in range(times):
            reference = {name: 0.25 * snapshot.weights[name] + 0.75 * reference[name] for name in reference}
        assert snapshot.reference is not None
        assert same_bits(snapshot.reference, reference)
    assert (reference is rig.start_weights) == (sum(synced) == 0)


@pytest.mark.parametrize("beta", [0.0, 0.1])
async def test_a_reference_that_stays_is_not_in_snapshots(beta: float) -> None:
    rig = Rig(config=LearnerConfig(batch_size=2, lr=1e-2, beta=beta))
    await rig.run(two_steps())
    assert [snapshot.reference for snapshot in rig.snapshots] == [None]


class Eating(BatchTrainer):
    """Leaves nothing of the optimizer's state that it was given, as it may."""

    def train(self, state: LearnerState, step: StepGroups) -> Learned:
        learned = super().train(msgspec.structs.replace(state, optimizer_state=dict(state.optimizer_state)), step)
        state.optimizer_state.clear()
        return learned


async def test_a_snapshot_outlives_the_step_that_takes_the_optimizer_state_apart() -> None:
    rig = Rig(checkpoint_every=1, total_steps=2, trainer=Eating)
    other = Rig(checkpoint_every=1, total_steps=2)
    await rig.run(two_steps())
    await other.run(two_steps())
    mine, theirs = rig.snapshots, other.snapshots
    assert len(mine) == 2
    for snapshot, wanted in zip(mine, theirs, strict=True):
        assert same_bits(snapshot.optimizer_state, wanted.optimizer_state)


async def stop_amid(rig: Rig, groups: Sequence[ScoredGroup], inside: threading.Event, go_on: threading.Event) -> None:
    """Stop the learner when it has come to a place in its work on these groups, then let that go on."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        for group in groups:
            await rig.scored.send(group)
        await anyio.to_thread.run_sync(inside.wait, 10)
        tasks.cancel_scope.cancel()
        go_on.set()


async def test_who_stops_the_learner_amid_a_step_gets_that_step_whole() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Eating):
        def train(self, state: LearnerState, step: StepGroups) -> Learned:
            inside.set()
            assert go_on.wait(10)
            return super().train(state, step)

    rig, whole = Rig(trainer=Slow), Rig()
    await stop_amid(rig, two_steps()[:2], inside, go_on)
    await whole.run(two_steps()[:2])
    snapshot, wanted = rig.learner.snapshot(), whole.learner.snapshot()
    assert snapshot.version == 1
    assert same_bits(snapshot.weights, wanted.weights)
    assert same_bits(snapshot.optimizer_state, wanted.optimizer_state)
    assert [update.step for update in await taken(rig.updates)] == [1], "and the step is reported"


@pytest.mark.parametrize("beside", [True, False])
async def test_learning_beside_a_checkpoint_or_after_it(beside: bool) -> None:
    begun: list[int] = []

    class Counted(BatchTrainer):
        def train(self, state: LearnerState, step: StepGroups) -> Learned:
            begun.append(state.version)
            return super().train(state, step)

    rig = Rig(checkpoint_every=1, total_steps=3, learns_beside_checkpoints=beside, trainer=Counted)
    await send_all(rig.scored, two_steps())
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        snapshot = await anext(rig.checkpointer)
        assert snapshot.version == 1
        while beside and len(begun) == 1:
            await anyio.wait_all_tasks_blocked()
        await anyio.wait_all_tasks_blocked()
        assert len(begun) == (2 if beside else 1), "the first checkpoint is still in hand"
        tasks.start_soon(rig.write)
    assert [snapshot.version for snapshot in rig.snapshots] == [2, 2]
    spans = [m.name for m in await taken(rig.reports.mailbox) if isinstance(m, Span)]
    assert ("wait for checkpoint" in spans) == (not beside)


def free(on_stale: OnStale = "drop", max_staleness: int = 1) -> ScheduleConfig:
    return ScheduleConfig(mode="free", max_staleness=max_staleness, on_stale=on_stale)


def aged(group: ScoredGroup, *versions: int) -> ScoredGroup:
    """The group with these versions of its tokens, the first one's for each completion; the last one's to its end."""
    rollouts = tuple(
        msgspec.structs.replace(r, versions=tuple(versions[min(t, len(versions) - 1)] for t in range(len(r.token_ids))))
        for r in group.group.rollouts
    )
    return msgspec.structs.replace(group, group=msgspec.structs.replace(group.group, rollouts=rollouts))


def free_rig(on_stale: OnStale = "drop", *, config: LearnerConfig = LEARNER, version: int = 0) -> Rig:
    return Rig(config=config, schedule=free(on_stale), version=version, total_steps=9)


async def test_free_steps_are_made_of_what_comes_first() -> None:
    rig = free_rig()
    arrived = [make_scored(1, 1, (1.0, 0.0, 0.0)), make_scored(0, 0), make_scored(0, 1), make_scored(1, 0)]
    await rig.run(arrived)
    assert ends(await taken(rig.metrics)) == [
        (0, 0, 0, "trained"),
        (1, 1, 0, "trained"),
        (0, 1, 0, "trained"),
        (1, 0, 0, "trained"),
    ]
    assert [update.step for update in await taken(rig.updates)] == [1, 2]
    weights = by_hand(rig, (arrived[1], arrived[0]), arrived[2:], total=9)
    assert same_bits(rig.learner.weights, weights)


@pytest.mark.parametrize("on_stale", ["drop", "correct"])
async def test_old_tokens_are_dropped_or_trained_on(on_stale: OnStale) -> None:
    rig = free_rig(on_stale, version=4)
    young, old = aged(make_scored(7, 0), 4), aged(make_scored(2, 1), 2, 3)
    await rig.run([young, old])
    [update] = await taken(rig.updates)
    oldest = 3 if on_stale == "drop" else None
    assert same_bits(rig.learner.weights, by_hand(rig, [old, young], first=4, total=9, oldest=oldest))
    tokens, total = 3, sum(len(r.token_ids) for g in (young, old) for r in g.group.rollouts)
    behind = sum(4 - v for g in (young, old) for r in g.group.rollouts for v in r.versions)
    expected = {
        "tokens/stale_fraction": tokens / total,
        "groups/stale": 0.0,
        "groups/trained": 2.0,
        "staleness": behind / total,
        "staleness/max": 2.0,
    }
    assert {name: update.metrics[name] for name in expected} == pytest.approx(expected)


async def test_a_group_of_old_tokens_alone_is_closed_as_stale_and_reported() -> None:
    rig = free_rig(version=5)
    old, other = aged(make_scored(2, 1, (1.0, 0.0, 1.0)), 3), aged(make_scored(3, 1, (0.0, 0.0, 1.0)), 5)
    await rig.run([old, other])
    assert (rig.learner.version, rig.board.version) == (6, 6)
    assert ends(await taken(rig.prompter)) == [(2, 1, 0, "stale"), (3, 1, 0, "trained")]
    [update] = await taken(rig.updates)
    assert (update.metrics["groups/stale"], update.metrics["groups/trained"]) == (1.0, 1.0)
    assert update.metrics["reward"] == pytest.approx(0.5)


async def test_no_step_begins_of_which_stale_tokens_leave_nothing() -> None:
    rig = free_rig(version=5)
    old, older = aged(make_scored(2, 1), 3), aged(make_scored(3, 1), 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        await rig.scored.send(old)
        await rig.scored.send(older)
        await something_in(rig.prompter)
        [replace] = await taken(rig.prompter)
        assert replace == Replace(slots=(older.group.prompt.slot,), rows=(older.group.prompt.row,))
        await anyio.wait_all_tasks_blocked()
        assert rig.learner.version == 5
        await rig.scored.send(aged(make_scored(3, 1, attempt=1), 5))
        rig.scored.close()
    assert rig.learner.version == 6
    assert ends(await taken(rig.prompter)) == [(2, 1, 0, "stale"), (3, 1, 1, "trained")]
    [update] = await taken(rig.updates)
    assert (update.metrics["groups/stale"], update.metrics["groups/trained"]) == (2.0, 1.0)


async def test_an_old_group_is_sent_back_with_its_row_and_its_credit() -> None:
    rig = free_rig("requeue", version=5)
    old = aged(make_scored(2, 1), 3, 5)
    again = aged(make_scored(2, 1, attempt=1), 3, 5)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        await rig.scored.send(old)
        await something_in(rig.prompter)
        [replace] = await taken(rig.prompter)
        assert replace == Replace(slots=(old.group.prompt.slot,), rows=(old.group.prompt.row,))
        await rig.scored.send(aged(make_scored(3, 0), 5))
        await anyio.wait_all_tasks_blocked()
        assert rig.learner.version == 5
        await rig.scored.send(again)
        rig.scored.close()
    assert rig.learner.version == 6
    assert ends(await taken(rig.prompter)) == [(2, 1, 1, "trained"), (3, 0, 0, "trained")]
    assert ends(await taken(rig.metrics)) == [(2, 1, 0, "stale"), (2, 1, 1, "trained"), (3, 0, 0, "trained")]
    [update] = await taken(rig.updates)
    assert (update.metrics["groups/stale"], update.metrics["groups/resampled"]) == (1.0, 1.0)


async def test_free_replaces_groups_without_signal_as_they_come() -> None:
    rig = free_rig(config=DYNAMIC)
    await rig.run([make_scored(0, 0, SAME, attempt=a) for a in range(3)] + [make_scored(1, 1)])
    to_prompter = await taken(rig.prompter)
    assert replacements(to_prompter) == [[(0, 0, 0)], [(0, 0, 1)]]
    assert ends(to_prompter) == [(0, 0, 2, "filtered"), (1, 1, 0, "trained")]
    assert rig.learner.version == 1


async def test_who_stops_a_learner_that_waits_for_a_checkpoint_finds_the_next_step_whole() -> None:
    """A group whose place another has taken is not prompted again: it would never end."""
    free = ScheduleConfig(mode="free", max_staleness=1)
    rig = Rig(config=DYNAMIC, schedule=free, learns_beside_checkpoints=False)
    groups = [make_scored(0, 0, (1.0, 1.0, 1.0)), make_scored(0, 1), make_scored(0, 0, attempt=1)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.learner])
        rig.request.send_nowait(Checkpoint())
        await anyio.wait_all_tasks_blocked()
        for group in groups:
            await rig.scored.send(group)
        for _ in range(500):  # the last group is examined on the device
            if rig.learner.report.doing and len(rig.learner.snapshot().unfinished.collected) == 3:
                break
            await anyio.sleep(0.01)
        tasks.cancel_scope.cancel()
    unfinished = rig.learner.snapshot().unfinished
    gids = [group.group.prompt.gid for group in unfinished.collected]
    assert gids == [0, 1, 2**48]
    assert unfinished.states == {0: "filtered", 1: "trained", 2**48: "trained"}
    assert unfinished.replaced == (0,)
    then = Rig(config=DYNAMIC, schedule=free, total_steps=1, unfinished=unfinished)
    await then.run([])
    assert [update.step for update in await taken(then.updates)] == [1], "and who goes on from there learns it"


async def test_the_end_of_a_step_is_reported_however_long_that_takes_as_long_as_nobody_stops_it() -> None:
    """A credit that is not given back would keep the run waiting for ever."""
    for stops in (False, True):
        rig = Rig(closed_bound=1)
        rig.learner.closing_s = 0.05
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run_roles, [rig.learner])
            for group in two_steps()[:2]:
                await rig.scored.send(group)
            await rig.board.get(1)
            if stops:
                tasks.cancel_scope.cancel()
            else:
                await anyio.sleep(0.2)
                assert await anext(rig.metrics)
                await anyio.wait_all_tasks_blocked()
                assert len(rig.prompter) == 2
                tasks.cancel_scope.cancel()
        assert len(rig.updates) == (not stops)


async def test_groups_that_had_their_scores_before_a_resume_are_in_the_next_checkpoint_too() -> None:
    """They are on their way through prompter, generator and scorer once more."""
    rig = Rig(recorded={group.group.prompt.gid: group for group in two_steps()}, version=1)
    await rig.scored.send(two_steps()[3])
    snapshot = rig.learner.snapshot()
    assert [group.group.prompt.gid for group in snapshot.unfinished.scored] == [3, 2], "none of the steps done"


async def test_a_free_group_that_is_being_examined_when_the_run_is_stopped_keeps_its_scores() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(BatchTrainer):
        def without_signal(self, groups: Sequence[ScoredGroup]) -> set[int]:
            inside.set()
            assert go_on.wait(10)
            return super().without_signal(groups)

    rig = Rig(config=DYNAMIC, schedule=ScheduleConfig(mode="free"), trainer=Slow)
    group = make_scored(0, 1)
    rig.open_groups.begin(group.group.prompt)
    await stop_amid(rig, [group], inside, go_on)
    assert rig.learner.snapshot().unfinished.scored == (group,)


async def test_the_means_in_a_snapshot_are_of_finite_numbers() -> None:
    """A metric that a reward logs may be as large as a number gets."""
    rig = Rig(total_steps=2)
    groups = [msgspec.structs.replace(group, logged={"large": 1e308, "small": 0.5}) for group in two_steps()]
    await rig.run(groups)
    metrics = rig.snapshots[-1].metrics
    assert "large" not in metrics
    assert metrics["small"] == 0.5
