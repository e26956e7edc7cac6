"""Evaluation without a run: every row of a dataset completed by a model and scored, which `troupe eval` tells of."""

import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset, stop_making_rows
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError, InputError
from troupe.messages import EvaluatedRow, EvaluatedSample, Incident, RolloutGroup
from troupe.policy import GenerationConfig, Policy, load_policy
from troupe.policy.decode.sampling import GREEDY_BELOW
from troupe.records.conversations import sampled_tokens
from troupe.rewards import GroupScores, Reward, RewardManager, RewardsConfig
from troupe.rewards.estimates import figures, reward_means
from troupe.run.acting import (
    NOTHING_GIVEN,
    Acting,
    ActingSetup,
    ActingWorld,
    default_rewards,
    load_acting,
    make_rewards,
)
from troupe.run.completing import complete, prompt_of
from troupe.run.held_out import HeldOutEpisodes, number_of_row
from troupe.run.status import Progress
from troupe.runtime.device import DeviceThread

SAMPLES_AT_ONCE = 128
"""Completed together, and then scored."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What completions of a dataset are worth."""

    table: tuple[EvaluatedRow, ...]
    """Every row with its samples, in order."""
    figures: dict[str, float] = {}
    """`avg@K`, `pass@k`, `maj@K`, `accuracy`, each with its standard error (`…_se`), `length`, `clipped`, `missing`, and
    the mean of each reward."""
    incidents: tuple[Incident, ...] = ()
    """Why scores are missing."""

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.table)

    @property
    def accuracy(self) -> float | None:
        """Share of completions that equal the row's `answer`, over the rows that have one; None where none has."""
        return self.figures.get("accuracy")

    @property
    def rewards(self) -> dict[str, float]:
        """Mean score of each reward over the completions that it scored; NaN where it scored none."""
        return {name: math.nan if mean is None else mean for name, mean in reward_means(self.table).items()}

    @property
    def scored(self) -> dict[str, float]:
        """Mean score of each reward that scored anything."""
        return {name: mean for name, mean in self.rewards.items() if not math.isnan(mean)}

    @property
    def completions(self) -> tuple[str, ...]:
        """The texts, row by row, sample by sample."""
        return tuple(sample.text for row in self.table for sample in row.samples)


async def evaluate(
    policy: Policy,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    *,
    generation: GenerationConfig,
    device: DeviceThread,
    num_samples: int = 1,
    rewards: RewardManager | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    tell: Callable[[Incident], None] | None = None,
    acting_setup: ActingSetup | None = None,
    done: Sequence[EvaluatedRow] = (),
    each: Callable[[Sequence[EvaluatedRow]], None] | None = None,
) -> Evaluation:
    """Complete every row `num_samples` times and score it. Greedy where `generation.temperature` is 0.

    `progress` learns how many samples are completed, `tell` why a score is missing, when that is known; the gid of an
    incident is the number of its row. `acting_setup`: where the policy acts. `done`: the first rows, where they were
    evaluated before. `each` is given the others, some at a time, as soon as they are scored.
    """
    if not len(dataset):
        raise InputError(f"{dataset.source}: no rows to evaluate")
    if progress is not None:
        progress.total, progress.done = len(dataset) * num_samples, len(done) * num_samples
    samples = msgspec.structs.replace(generation, num_generations=num_samples)
    table, incidents = list(done), list[Incident]()
    held_out = None
    if acting_setup is not None:
        acting_setup.manager.listen(partial(_note, incidents, tell))
        held_out = HeldOutEpisodes(acting_setup, policy, samples, device, seed=seed, progress=progress)
    for places in pieces(len(dataset), num_samples, len(done)):
        if held_out is None:
            groups = await complete(policy, dataset, prompt_ids, places, samples, device, (seed, 0), progress)
        else:
            groups = await held_out.run([prompt_of(policy, dataset, prompt_ids, i, -1 - i) for i in places])
        results: list[GroupScores | None] = [None] * len(groups)
        if rewards is not None:
            results = list(await rewards.score_groups(groups, tell=partial(_note, None, tell)))
        rows = [_row_of(group, result) for group, result in zip(groups, results, strict=True)]
        incidents += [_by_row(incident) for result in results if result is not None for incident in result.incidents]
        table += rows
        if each is not None:
            each(rows)
        if held_out is not None:
            held_out.conversations.forget(())
    if acting_setup is not None:
        acting_setup.manager.listen(None)
    return Evaluation(table=tuple(table), figures=figures(table), incidents=tuple(incidents))


def pieces(rows: int, num_samples: int, done: int = 0) -> list[range]:
    """The places of the rows that are completed together; the same ones wherever an evaluation goes on."""
    size = max(1, SAMPLES_AT_ONCE // num_samples)
    return [range(start, min(start + size, rows)) for start in range(done, rows, size)]


def _row_of(group: RolloutGroup, result: GroupScores | None) -> EvaluatedRow:
    prompt = group.prompt
    samples = tuple(
        EvaluatedSample(
            text=rollout.text,
            tokens=sampled_tokens(rollout),
            finish_reason=rollout.finish_reason,
            score=None if result is None else result.rewards[i],
            scores={} if result is None else {name: column[i] for name, column in result.scores.items()},
        )
        for i, rollout in enumerate(group.rollouts)
    )
    return EvaluatedRow(row=prompt.row, prompt=prompt.prompt, columns=prompt.columns, samples=samples)


def _by_row(incident: Incident) -> Incident:
    return msgspec.structs.replace(incident, gid=None if incident.gid is None else number_of_row(incident.gid))


def _note(kept: list[Incident] | None, tell: Callable[[Incident], None] | None, incident: Incident) -> None:
    """Tell of an incident, and keep it where it would come no other way."""
    if kept is not None:
        kept.append(_by_row(incident))
    if tell is not None:
        tell(_by_row(incident))


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """What models are asked, and how: checked, and the same for each of them."""

    rows: PromptDataset
    rewards: tuple[str | Reward, ...]
    data: DataConfig
    generation: GenerationConfig
    scoring: RewardsConfig
    num_samples: int
    seed: int
    world: ActingWorld | None

    def manager(self) -> RewardManager:
        """The rewards, not started."""
        manager = make_rewards(self.rewards, self.scoring, self.world, [self.rows])
        manager.check_columns(self.rows.columns)
        return manager


async def ask(
    dataset: str | Path,
    rewards: Sequence[str | Reward] = (),
    *,
    data: DataConfig | None = None,
    generation: GenerationConfig | None = None,
    scoring: RewardsConfig | None = None,
    num_samples: int = 1,
    limit: int | None = None,
    seed: int = 0,
    environment: EnvironmentConfig | None = None,
    acting: Acting = NOTHING_GIVEN,
) -> Questions:
    """Read the rows and load what scores them. Without rewards the rows must say what is right (`default_reward`).

    `data` says how rows are read, as in a run; its paths do not count. `limit`: only the first rows. `environment` and
    `acting`: what a policy acts with, if it does. Raises InputError.
    """
    generation = GenerationConfig(temperature=0.0, max_completion_length=256) if generation is None else generation
    if num_samples > 1 and generation.temperature < GREEDY_BELOW:
        raise ConfigError(
            f"{num_samples} samples a row at temperature {generation.temperature:g} are all alike; give a temperature "
            "(1.0 is usual), or one sample"
        )
    data = DataConfig() if data is None else data
    rows = await _loaded(dataset, data, limit)
    environment = EnvironmentConfig() if environment is None else environment
    if environment.run == "worker":  # there is no run here that workers could join
        environment = msgspec.structs.replace(environment, run="process")
    world = load_acting(environment, acting)
    questions = Questions(
        rows=rows,
        rewards=tuple(rewards) or (default_rewards(rows, world),),
        data=data,
        generation=generation,
        scoring=RewardsConfig() if scoring is None else scoring,
        num_samples=num_samples,
        seed=seed,
        world=world,
    )
    questions.manager()
    return questions


async def answer(
    model: str | Path,
    questions: Questions,
    *,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
    done: Sequence[EvaluatedRow] = (),
    each: Callable[[Sequence[EvaluatedRow]], None] | None = None,
) -> Evaluation:
    """Have a model folder, or one with an adapter beside it, complete the rows, and score them.

    `done` and `each` are those of `evaluate`. Raises InputError.
    """
    if len(done) == len(questions.rows):
        return Evaluation(table=tuple(done), figures=figures(done))
    async with AsyncExitStack() as begun:
        device = await begun.enter_async_context(DeviceThread("evaluation"))
        manager = await begun.enter_async_context(questions.manager())
        policy = await device.run(partial(load_policy, model, dtype, adapter=adapter))
        policy.check_stop_ids()
        acting_setup = None if questions.world is None else ActingSetup.of(questions.world, policy, questions.data)
        if acting_setup is not None:
            await begun.enter_async_context(acting_setup.manager)
        positions = policy.config.max_position_embeddings
        prompt_ids = tokenize_prompts(
            questions.rows,
            policy.tokenizer,
            questions.data,
            max_tokens=min(questions.data.max_prompt_tokens or positions, positions - 1),
            vocab_size=policy.config.vocab_size,
            tell=None if acting_setup is None else acting_setup.opening,
        )
        return await evaluate(
            policy,
            questions.rows,
            prompt_ids,
            generation=questions.generation,
            num_samples=questions.num_samples,
            device=device,
            rewards=manager,
            seed=questions.seed,
            progress=progress,
            acting_setup=acting_setup,
            done=done,
            each=each,
        )


async def evaluate_folder(
    model: str | Path,
    dataset: str | Path,
    rewards: Sequence[str | Reward] = (),
    *,
    data: DataConfig | None = None,
    max_completion_length: int = 256,
    temperature: float = 0.0,
    num_samples: int = 1,
    limit: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    environment: EnvironmentConfig | None = None,
    acting: Acting = NOTHING_GIVEN,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model folder, or one with an adapter beside it, on a source of prompts: `ask`, and `answer`."""
    questions = await ask(
        dataset,
        rewards,
        data=data,
        generation=GenerationConfig(temperature=temperature, max_completion_length=max_completion_length),
        num_samples=num_samples,
        limit=limit,
        seed=seed,
        environment=environment,
        acting=acting,
    )
    return await answer(model, questions, adapter=adapter, dtype=dtype, progress=progress)


async def _loaded(source: str | Path, data: DataConfig, limit: int | None) -> PromptDataset:
    """The first rows of a source; who is interrupted does not wait for those that have to be made."""
    try:
        load = partial(PromptDataset.load, source, data, first=limit)
        rows = await anyio.to_thread.run_sync(load, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        stop_making_rows()
        raise
    if limit is None or len(rows) <= limit:
        return rows
    return PromptDataset([rows[i] for i in range(limit)], rows.source, rows.in_all)
