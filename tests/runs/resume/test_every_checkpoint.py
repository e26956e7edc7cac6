"""Going on from every checkpoint of a run: pinned to the same bits, free with every prompt, none trained twice."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support.fakes import BATCH_SIZE, FakeSink, often_equal, same_bits, tiny_config, weigh_ids
from tests.support.runs import timeless
from troupe import RunConfig, Supervisor
from troupe.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from troupe.messages import GroupClosed, Update
from troupe.rewards import batch_reward
from troupe.run.ledgers import Factories
from troupe.run.result import RunResult

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]

STEPS = 5


class Judge:
    """An async reward that takes a random while, remembers what it was asked, and where it wants gives other scores
    each time."""

    def __init__(self, seed: int, reward: Callable[..., list[float]] = weigh_ids, *, moody: bool = False) -> None:
        self.asked: list[tuple[int, ...]] = []
        self._dice = random.Random(seed)
        self._reward = reward
        self._moody = moody

    async def __call__(self, completion_ids: list[list[int]], **columns: Any) -> list[float]:
        self.asked.append(tuple(completion_ids[0]))
        await anyio.sleep(self._dice.random() * 0.02)
        mood = self._dice.random() if self._moody else 0.0
        return [score + mood * i for i, score in enumerate(self._reward(completion_ids=completion_ids))]


class Part:
    """A run, or a part of one, and what its sinks were told."""

    def __init__(self, config: RunConfig, reward: Any) -> None:
        self.config, self.sink = config, FakeSink()
        self.rewards = reward if isinstance(reward, list) else [reward]
        self.result: RunResult

    async def to_the_end(
        self, *, resume: bool = False, ask: Callable[[Supervisor, Update], None] | None = None
    ) -> Part:
        factories = Factories(sinks=lambda prepared: [self.sink])
        async with Supervisor(self.config, self.rewards, resume=resume, factories=factories) as run:
            async for update in run.updates():
                if ask is not None:
                    ask(run, update)
        self.result = run.result
        return self

    @property
    def closed(self) -> list[GroupClosed]:
        return [message for message in self.sink.got if isinstance(message, GroupClosed)]

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """Step → what does not depend on time."""
        updates = [message for message in self.sink.got if isinstance(message, Update)]
        return {update.step: timeless(update.metrics) for update in updates}

    @property
    def completions(self) -> dict[int, list[Any]]:
        """Step → all that was sampled for it, with scores and advantages."""
        found: dict[int, list[Any]] = {}
        for message in self.closed:
            assert message.scored is not None
            found.setdefault(message.version, []).append(
                (message.gid, message.state, message.scored.group.rollouts, message.scored.scores, message.advantages)
            )
        return found

    @property
    def final(self) -> Checkpoint:
        return load_checkpoint(list_checkpoints(Path(self.result.folder))[0])


def cut_back(whole: Path, version: int, to: Path) -> None:
    """A run folder as it was when the checkpoint of `version` was the newest."""
    (to / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "run.toml", to)
    shutil.copytree(
        whole / "checkpoints" / f"step-{version:08d}", to / "checkpoints" / f"step-{version:08d}", dirs_exist_ok=True
    )


def config_of(model: Path, folder: Path, **settings: Any) -> RunConfig:
    base = {"learner__max_steps": STEPS, "schedule__generator": "thread"}
    return tiny_config(model, folder, checkpoint__every=1, checkpoint__keep=99, **base | settings)


RESAMPLING: dict[str, Any] = {
    "learner__dynamic_sampling": True,
    "learner__max_resampling_attempts": 2,
    "learner__num_iterations": 2,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_sync_steps": 3,
}
SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    ("staleness", "settings", "reward"),
    [
        (0, {}, weigh_ids),
        pytest.param(1, {}, weigh_ids, marks=SLOW),
        pytest.param(3, {}, weigh_ids, marks=SLOW),
        pytest.param(0, RESAMPLING, often_equal, marks=SLOW),
        (2, RESAMPLING, often_equal),
    ],
)
async def test_a_pinned_run_goes_on_from_any_checkpoint_to_the_same_bits(
    tmp_path: Path,
    ragged_model: Path,
    staleness: int,
    settings: dict[str, Any],
    reward: Any,
) -> None:
    def config(folder: Path) -> RunConfig:
        return config_of(ragged_model, folder, schedule__max_staleness=staleness, **settings)

    whole = await Part(config(tmp_path), Judge(1, reward)).to_the_end()
    for version in range(1, STEPS):
        folder = tmp_path / str(version)
        cut_back(Path(whole.result.folder), version, folder / "run")
        rest = await Part(config(folder), Judge(version, reward)).to_the_end(resume=True)
        assert same_bits(rest.final.weights, whole.final.weights)
        assert same_bits(rest.final.optimizer_state, whole.final.optimizer_state)
        assert rest.final.state.num_tokens == whole.final.state.num_tokens
        later = range(version + 1, STEPS + 1)
        assert rest.metrics == {step: whole.metrics[step] for step in later}
        assert rest.completions == {step: whole.completions[step] for step in later}


async def test_scores_that_a_checkpoint_holds_are_not_asked_for_again(tmp_path: Path, ragged_model: Path) -> None:
    """With a reward that would give others: what was scored before the checkpoint stays as it was."""
    kept = 0
    for seed in range(2):
        folder = tmp_path / str(seed)
        whole = await Part(
            config_of(ragged_model, folder, schedule__max_staleness=2), Judge(seed, moody=True)
        ).to_the_end()
        cut_back(Path(whole.result.folder), 2, folder / "again" / "run")
        unfinished = load_checkpoint(folder / "again" / "run" / "checkpoints" / "step-00000002").unfinished
        scored = [*unfinished.collected, *unfinished.scored]
        kept += len(scored)
        judge = Judge(seed + 9, moody=True)
        rest = await Part(config_of(ragged_model, folder / "again", schedule__max_staleness=2), judge).to_the_end(
            resume=True
        )
        scores = {message.gid: message.scored.scores for message in rest.closed if message.scored is not None}
        for group in scored:
            assert scores[group.group.prompt.gid] == group.scores
        assert len(judge.asked) == (STEPS - 2) * BATCH_SIZE - len(scored)
    assert kept, "no checkpoint was taken while a group with scores waited"


@pytest.mark.parametrize(
    ("staleness", "on_stale", "settings"),
    [
        (1, "drop", {}),
        pytest.param(1, "requeue", RESAMPLING, marks=SLOW),
        pytest.param(1, "correct", RESAMPLING, marks=SLOW),
        *(
            pytest.param(staleness, on_stale, settings, marks=SLOW)
            for staleness in (0, 3)
            for on_stale in ("drop", "requeue", "correct")
            for settings in ({}, RESAMPLING)
        ),
    ],
)
async def test_a_free_run_goes_on_with_every_prompt_and_trains_none_twice(
    tmp_path: Path,
    ragged_model: Path,
    staleness: int,
    on_stale: str,
    settings: dict[str, Any],
) -> None:
    reward = often_equal if settings else weigh_ids

    def config(folder: Path) -> RunConfig:
        return config_of(
            ragged_model,
            folder,
            schedule__mode="free",
            schedule__on_stale=on_stale,
            schedule__max_staleness=staleness,
            **settings,
        )

    def ask(run: Supervisor, update: Update) -> None:
        run.checkpoint()  # also while a step is being collected

    whole = await Part(config(tmp_path), Judge(1, reward)).to_the_end(ask=ask)
    check_closed(whole.closed)
    for version in range(1, STEPS):
        folder = tmp_path / str(version)
        cut_back(Path(whole.result.folder), version, folder / "run")
        rest = await Part(config(folder), Judge(version, reward)).to_the_end(resume=True)
        assert rest.result.complete
        check_closed([message for message in whole.closed if message.version <= version] + rest.closed)
        assert rest.final.state.num_tokens == sum(
            len(group.scored.group.prompt.prompt_ids) + len(rollout.token_ids)
            for group in [*[m for m in whole.closed if m.version <= version], *rest.closed]
            if group.scored is not None
            for rollout in group.scored.group.rollouts
        )


def check_closed(closed: list[GroupClosed]) -> None:
    """Every group once; and of the attempts in each place one after the other, from the first."""
    assert [gid for gid, count in Counter(message.gid for message in closed).items() if count > 1] == []
    attempts: dict[tuple[int, int], list[int]] = {}
    for message in closed:
        attempts.setdefault((message.slot.step, message.slot.place), []).append(message.slot.attempt)
    assert set(attempts) == {(step, place) for step in range(STEPS) for place in range(BATCH_SIZE)}
    assert all(sorted(numbers) == list(range(len(numbers))) for numbers in attempts.values())


@SLOW
async def test_a_free_round_that_is_scored_in_one_call_goes_on_without_those_who_have_their_scores(
    tmp_path: Path, ragged_model: Path
) -> None:
    @batch_reward
    def rank(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return weigh_ids(completion_ids)

    def config(folder: Path) -> RunConfig:
        return config_of(ragged_model, folder, schedule__mode="free", schedule__max_staleness=1)

    def ask(run: Supervisor, update: Update) -> None:
        run.checkpoint()

    async def parted_rounds(folder: Path, late_s: float) -> int:
        """Run, and go on from every checkpoint → those that were taken while a round had scores in part."""
        asked = 0

        async def one_after_the_other(completion_ids: list[list[int]], **_: Any) -> list[float]:
            """So that the groups of a round part: every second one comes late."""
            nonlocal asked
            asked += 1
            await anyio.sleep(late_s * (asked % 2))
            return [0.0] * len(completion_ids)

        rewards = [rank, one_after_the_other]
        whole = await Part(config(folder), rewards).to_the_end(ask=ask)
        parted = 0
        for version in range(1, STEPS):
            again = folder / str(version)
            cut_back(Path(whole.result.folder), version, again / "run")
            unfinished = load_checkpoint(again / "run" / "checkpoints" / f"step-{version:08d}").unfinished
            scored = {group.group.prompt.slot for group in (*unfinished.scored, *unfinished.collected)}
            steps = Counter(group.slot.step for group in unfinished.open if group.slot not in scored)
            parted += 1 in steps.values()
            with anyio.fail_after(60):
                rest = await Part(config(again), rewards).to_the_end(resume=True)
            check_closed([message for message in whole.closed if message.version <= version] + rest.closed)
        return parted

    for late_s in (0.05, 0.1, 0.03, 0.2, 0.07, 0.15, 0.02, 0.3):  # which is late enough depends on the machine
        if await parted_rounds(tmp_path / str(late_s), late_s):
            return
    pytest.fail("no checkpoint was taken while a round had scores in part")


EVERYTHING: dict[str, Any] = {
    **RESAMPLING,
    "learner__max_steps": 9,
    "learner__use_adaptive_entropy": True,
    "learner__entropy_target": 5.5,
    "learner__entropy_coef_delta": 0.01,
    "learner__warmup_steps": 3,
    "learner__lr_scheduler": "cosine",
    "rewards__min_scored": 3,
}


@pytest.mark.slow
@pytest.mark.parametrize(("staleness", "processes"), [(0, 0), (2, 0), (1, 1), (3, 2)])
async def test_with_everything_on_and_stopped_again_and_again_a_pinned_run_comes_to_the_same_bits(
    tmp_path: Path, ragged_model: Path, staleness: int, processes: int
) -> None:
    @batch_reward
    def rank(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float((sum(ids) + sum(map(sum, completion_ids))) % 4 == 0) for ids in completion_ids]

    async def missing(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        await anyio.sleep(0.003 * (sum(completion_ids[0]) % 5))
        return [None if sum(ids) % 3 == 0 else 0.25 * (sum(ids) % 2) for ids in completion_ids]

    def config(folder: Path) -> RunConfig:
        where = {"generator": "process", "generator_processes": processes} if processes else {"generator": "thread"}
        given = {f"schedule__{name}": value for name, value in where.items()}
        return config_of(ragged_model, folder, schedule__max_staleness=staleness, **EVERYTHING | given)

    whole = await Part(config(tmp_path / "whole"), [rank, missing]).to_the_end()
    dice, parts, again = random.Random(staleness), config(tmp_path / "parts"), False
    closed: list[GroupClosed] = []
    for start in range(6):
        left = 99 if start == 5 else dice.randrange(1, 3)

        def ask(run: Supervisor, update: Update) -> None:
            nonlocal left
            left -= 1
            if left == 0 and dice.random() < 0.5:
                run.checkpoint()
            if left == 0:
                run.stop()

        rest = await Part(parts, [rank, missing]).to_the_end(resume=again, ask=ask)
        again = True
        closed += rest.closed
    assert rest.result.complete
    assert same_bits(rest.final.weights, whole.final.weights)
    assert same_bits(rest.final.optimizer_state, whole.final.optimizer_state)
    assert how_they_ended(closed) == how_they_ended(whole.closed)


def how_they_ended(closed: list[GroupClosed]) -> list[Any]:
    return sorted((message.gid, message.version, message.state, message.advantages) for message in closed)
