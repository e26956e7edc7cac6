"""Evaluation without a run: every row of a dataset completed by a model and scored, which `troupe eval` tells of."""

import math
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from troupe.actors.evaluator.decoding import EvalSet, RowPrompts
from troupe.actors.evaluator.rows import evaluated_row
from troupe.actors.evaluator.settings import EvaluationSet
from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset, stop_making_rows
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError
from troupe.messages import Evaluate, EvaluatedRow, Incident
from troupe.messages.evaluations import HELD_OUT, row_of
from troupe.policy import GenerationConfig, NetworkConfig, Policy, load_policy, opened_thought
from troupe.policy.decode.sampling import GREEDY_BELOW
from troupe.policy.load import resolve_base
from troupe.policy.model_files import CONFIG_FILE, check_folder, read_json
from troupe.rewards import Reward, RewardManager, RewardsConfig
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
from troupe.run.decoders import make_decoder
from troupe.run.status import Progress
from troupe.runtime.device import DeviceThread
from troupe.runtime.reporter import Reporter


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What completions of a dataset are worth."""

    table: tuple[EvaluatedRow, ...]
    """Every row with its samples, in order."""
    figures: dict[str, float] = {}
    """`avg@K`, `pass@k`, `maj@K` and `accuracy`, each with its standard error (`…_se`), `length`, `clipped`, `missing`,
    and the mean of each reward."""
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


class Questions(msgspec.Struct, frozen=True, kw_only=True):
    """What models are asked, and how: checked, and the same for each of them."""

    rows: PromptDataset
    rewards: tuple[str | Reward, ...]
    data: DataConfig
    settings: EvaluationSet
    generation: GenerationConfig
    """With the settings of the set."""
    scoring: RewardsConfig
    pass_at: tuple[int, ...] | None
    """Each k of pass@k; None: powers of 2."""
    seed: int
    world: ActingWorld | None

    def manager(self) -> RewardManager:
        """The rewards, not started."""
        manager = make_rewards(self.rewards, self.scoring, self.world, [self.rows])
        manager.check_columns(self.rows.columns)
        return manager

    def worth(self, table: Sequence[EvaluatedRow], incidents: tuple[Incident, ...] = ()) -> Evaluation:
        """What all rows come to."""
        found = figures(table, passes_from=self.settings.passes_from, pass_at_ks=self.pass_at)
        return Evaluation(table=tuple(table), figures=found, incidents=incidents)


async def ask(
    dataset: str | Path,
    rewards: Sequence[str | Reward] = (),
    *,
    data: DataConfig | None = None,
    generation: GenerationConfig | None = None,
    scoring: RewardsConfig | None = None,
    num_samples: int = 1,
    passes_from: float = 1.0,
    pass_at: Sequence[int] | None = None,
    limit: int | None = None,
    seed: int = 0,
    environment: EnvironmentConfig | None = None,
    acting: Acting = NOTHING_GIVEN,
) -> Questions:
    """Read the rows and load what scores them. Without rewards the rows must say what is right (`default_reward`).

    `data` says how rows are read, as in a run; its paths do not count. `generation`: None is greedy, up to 256 tokens.
    `passes_from`: the score from which a completion passes; `pass_at`: each k of pass@k. `limit`: only the first rows.
    `environment` and `acting`: what a policy acts with, if it does. Raises InputError.
    """
    generation = generation or GenerationConfig(temperature=0.0, max_completion_length=256)
    if num_samples > 1 and generation.temperature < GREEDY_BELOW:
        raise ConfigError(
            f"{num_samples} samples a row at temperature {generation.temperature:g} are all alike; give a temperature "
            "(1.0 is usual), or one sample"
        )
    data = data or DataConfig()
    rows = await _loaded(dataset, data, limit)
    environment = environment or EnvironmentConfig()
    if environment.run == "worker":  # there is no run here that workers could join
        environment = msgspec.structs.replace(environment, run="process")
    world = load_acting(environment, acting)
    settings = EvaluationSet(
        name=HELD_OUT,
        path=str(dataset),
        num_samples=num_samples,
        temperature=generation.temperature,
        limit=limit,
        passes_from=passes_from,
    )
    questions = Questions(
        rows=rows,
        rewards=tuple(rewards) or (default_rewards(rows, world),),
        data=data,
        settings=settings,
        generation=settings.generation(generation),
        scoring=scoring or RewardsConfig(),
        pass_at=None if pass_at is None else tuple(pass_at),
        seed=seed,
        world=world,
    )
    questions.manager()
    return questions


def check_model(model: str | Path, questions: Questions, adapter: str | Path | None = None) -> None:
    """Whether a model can be asked, as far as its small files say: before those before it have taken hours. Raises
    InputError."""
    folder = resolve_base(model, None if adapter is None else Path(adapter)).folder
    check_folder(folder)
    policy = Policy(NetworkConfig.from_dict(read_json(folder / CONFIG_FILE)), {}, folder)
    policy.check_stop_ids()
    if questions.world is None:
        _prompt_ids(policy, questions, None)


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

    `progress` learns how many rows are completed. `done`: the first rows, where they were evaluated before, up to the
    end of one of the `pieces`. `each` is given those of a piece as soon as they are scored. Raises InputError.
    """
    rows = questions.rows
    if progress is not None:
        progress.total, progress.done = len(rows), len(done)
    if len(done) == len(rows):
        return questions.worth(done)
    async with AsyncExitStack() as begun:
        device = await begun.enter_async_context(DeviceThread("evaluation"))
        manager = await begun.enter_async_context(questions.manager())
        policy = await device.run(partial(load_policy, model, dtype, adapter=adapter))
        policy.check_stop_ids()
        acting_setup = None if questions.world is None else ActingSetup.of(questions.world, policy, questions.data)
        if acting_setup is not None:
            await begun.enter_async_context(acting_setup.manager)
        prompt_ids = _prompt_ids(policy, questions, acting_setup)
        of = EvalSet(settings=questions.settings, dataset=rows, prompt_ids=prompt_ids, rewards=manager)
        return await _answers(of, policy, device, questions, acting_setup, progress, done, each)


def _prompt_ids(policy: Policy, questions: Questions, acting_setup: ActingSetup | None) -> list[tuple[int, ...]]:
    positions = policy.config.max_position_embeddings
    return tokenize_prompts(
        questions.rows,
        policy.tokenizer,
        questions.data,
        max_tokens=min(questions.data.max_prompt_tokens or positions, positions - 1),
        vocab_size=policy.config.vocab_size,
        tell=None if acting_setup is None else acting_setup.opening,
    )


async def _answers(
    of: EvalSet,
    policy: Policy,
    device: DeviceThread,
    questions: Questions,
    acting_setup: ActingSetup | None,
    progress: Progress | None,
    done: Sequence[EvaluatedRow],
    each: Callable[[Sequence[EvaluatedRow]], None] | None,
) -> Evaluation:
    """The same pieces, decoded with the same noise, as of a run's evaluation of a set of this name."""
    table, incidents = list(done), list[Incident]()
    decoder = make_decoder(
        partial(policy.engine, questions.generation),
        questions.generation,
        device,
        tokenizer=policy.tokenizer,
        acting_setup=acting_setup,
        seed=questions.seed,
        report=Reporter("evaluation"),
    )

    def count() -> None:
        if progress is not None:
            progress.done += 1

    if acting_setup is not None:
        acting_setup.manager.listen(incidents.append)
    for piece in RowPrompts(of, 0, partial(opened_thought, policy.tokenizer)).pieces(0):
        if piece[0].row < len(done):
            continue
        groups = await decoder.complete(piece, Evaluate(version=0, weights=policy.weights), count)
        results = await of.rewards.score_groups(groups)
        decoder.forget(groups)
        rows = [evaluated_row(group, result) for group, result in zip(groups, results, strict=True)]
        incidents += [incident for result in results for incident in result.incidents]
        table += rows
        if each is not None:
            each(rows)
    if acting_setup is not None:
        acting_setup.manager.listen(None)
    return questions.worth(table, tuple(map(_by_row, incidents)))


def _by_row(incident: Incident) -> Incident:
    return msgspec.structs.replace(incident, gid=None if incident.gid is None else row_of(incident.gid))


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
    return rows if limit is None or len(rows) <= limit else rows.head(limit)
