"""Completions and their scores without actors: evaluation, and one step's batch as plain arrays.

The same engine, rewards and batch as in a run, called one after the other.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import mlx.core as mx
import msgspec

from troupe.actors.evaluator.decoding import row_of
from troupe.actors.evaluator.episodes import EpisodeDecoder
from troupe.actors.generator.episodes import EpisodeLimits
from troupe.actors.learner.batch import as_rollouts, assemble
from troupe.actors.schedule import tokenize_prompts
from troupe.dataset import DataConfig, PromptDataset, stop_making_rows
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import InputError
from troupe.grpo import LearnerConfig
from troupe.messages import Evaluate, Incident, Prompt, PromptText, RolloutGroup, ScoredGroup, Slot
from troupe.policy import (
    CompletedGroup,
    GenerationConfig,
    Policy,
    RolloutRequest,
    load_policy,
    opened_thought,
)
from troupe.rewards import Reward, RewardManager, RewardsConfig, exact_answer_reward
from troupe.run.acting import NOTHING_GIVEN, Acting, ActingSetup, default_rewards, load_acting, make_rewards
from troupe.run.status import Progress
from troupe.runtime.device import DeviceThread
from troupe.runtime.reporter import Reporter


class GroupBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One step's batch: B = prompts × G rows, P and T the longest prompt and completion, evaluated arrays."""

    prompt_ids: mx.array
    """(B, P) int32, padded on the left."""
    completion_ids: mx.array
    """(B, T) int32, padded on the right."""
    completion_mask: mx.array
    """(B, T) float32, 1 on completion tokens."""
    rewards: mx.array
    """(B,) float32 weighted sum of the scores; NaN where no reward gave one, or one is missing through a fault."""
    advantages: mx.array
    """(B,) float32."""
    old_log_probs: mx.array
    """(B, T) float32, in nats, under the temperature-scaled distribution of the policy that generated."""
    texts: tuple[str, ...]
    """(B,) the completions decoded."""
    metrics: dict[str, float]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What greedy completions of a dataset are worth."""

    rows: int
    accuracy: float | None
    """Share of completions that equal the row's `answer`, over the rows that have one; None where none has."""
    rewards: dict[str, float]
    """Mean score of each reward over the rows that it scored; NaN where it scored none."""
    completions: tuple[str, ...]
    incidents: tuple[Incident, ...] = ()
    """Why scores are missing."""

    @property
    def scored(self) -> dict[str, float]:
        """Mean score of each reward that scored anything."""
        return {name: mean for name, mean in self.rewards.items() if not math.isnan(mean)}


async def generate_and_score(
    policy: Policy,
    prompts: Sequence[PromptText | Mapping[str, Any]],
    rewards: Reward | Sequence[Reward],
    *,
    generation: GenerationConfig | None = None,
    learner: LearnerConfig | None = None,
    seed: int = 0,
    step: int = 0,
) -> GroupBatch:
    """Complete each prompt `generation.num_generations` times, score, and compute advantages.

    `prompts` are texts, message lists, or mappings with "prompt" and the columns that the rewards want.
    Raises DatasetError for a prompt that does not fit the model, RewardError for a reward that breaks its contract.
    """
    generation = generation or GenerationConfig()
    learner = learner or LearnerConfig()
    dataset = PromptDataset.from_rows([p if isinstance(p, Mapping) else {"prompt": p} for p in prompts], "prompts")
    limit = policy.config.max_position_embeddings - 1
    prompt_ids = tokenize_prompts(
        dataset, policy.tokenizer, DataConfig(), max_tokens=limit, vocab_size=policy.config.vocab_size
    )
    async with RewardManager(rewards) as manager, DeviceThread("rollouts") as device:
        manager.check_columns(dataset.columns)
        groups = await _complete(policy, dataset, prompt_ids, range(len(dataset)), generation, device, (seed, step))
        results = await manager.score_groups(groups)
        scored = [
            ScoredGroup(group=group, scores=result.scores, logged=result.metrics, faulted=result.faulted)
            for group, result in zip(groups, results, strict=True)
        ]
        weights = dict(zip(manager.names, manager.weights, strict=True))
        totals = [reward for result in results for reward in result.rewards]

        def to_arrays() -> GroupBatch:
            learned = assemble(scored, learner, weights=weights, pad_id=policy.pad_id)
            return GroupBatch(
                prompt_ids=learned.batch.prompt_ids,
                completion_ids=learned.batch.completion_ids,
                completion_mask=learned.batch.completion_mask,
                rewards=mx.array([float("nan") if total is None else total for total in totals]),
                advantages=learned.batch.advantages,
                old_log_probs=learned.batch.sampling_log_probs,
                texts=tuple(rollout.text for group in groups for rollout in group.rollouts),
                metrics=learned.metrics,
            )

        return await device.run(to_arrays)


async def evaluate(
    policy: Policy,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    *,
    generation: GenerationConfig,
    device: DeviceThread,
    rewards: RewardManager | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    tell: Callable[[Incident], None] | None = None,
    acting_setup: ActingSetup | None = None,
    rows_at_once: int = 128,
) -> Evaluation:
    """Complete every row once and score it. Greedy where `generation.temperature` is 0, as it should be to compare.

    `progress` learns how many rows are completed, `tell` why a score is missing, when that is known; the gid of an
    incident is the number of its row. `acting_setup`: where the policy acts.
    """
    if not len(dataset):
        raise InputError(f"{dataset.source}: no rows to evaluate")
    if progress is not None:
        progress.total = len(dataset)
    once = msgspec.structs.replace(generation, num_generations=1)
    texts: list[str] = []
    scores: dict[str, list[float]] = {}
    incidents: list[Incident] = []

    def on_row() -> None:
        if progress is not None:
            progress.done += 1

    held_out = None
    if acting_setup is not None:
        acting_setup.manager.listen(partial(_note, incidents, tell))
        held_out = _episodes(policy, once, device, acting_setup, seed)
    for start in range(0, len(dataset), rows_at_once):
        places = range(start, min(start + rows_at_once, len(dataset)))
        if held_out is None:
            groups = await _complete(policy, dataset, prompt_ids, places, once, device, (seed, 0), progress)
        else:
            prompts = [_prompt_of(policy, dataset, prompt_ids, i, -1 - i) for i in places]
            groups = await held_out.complete(prompts, Evaluate(version=0, weights=policy.weights), on_row)
        texts += [group.rollouts[0].text for group in groups]
        if rewards is not None:
            for result in await rewards.score_groups(groups, tell=partial(_note, None, tell)):
                incidents += map(_by_row, result.incidents)
                for name, (score,) in result.scores.items():
                    scores.setdefault(name, []).extend([] if score is None else [score])
        if held_out is not None:
            held_out.forget(groups)
    if acting_setup is not None:
        acting_setup.manager.listen(None)
    return Evaluation(
        rows=len(dataset),
        accuracy=_accuracy(dataset, texts),
        rewards={name: sum(column) / len(column) if column else float("nan") for name, column in scores.items()},
        completions=tuple(texts),
        incidents=tuple(incidents),
    )


def _episodes(
    policy: Policy, generation: GenerationConfig, device: DeviceThread, acting_setup: ActingSetup, seed: int
) -> EpisodeDecoder:
    return EpisodeDecoder(
        partial(policy.engine, generation),
        device,
        conversations=acting_setup.conversations(),
        limits=EpisodeLimits(
            num_generations=generation.num_generations,
            max_completion_length=generation.max_completion_length,
            context=acting_setup.rules.context,
            max_turns=acting_setup.rules.max_turns,
        ),
        seed=seed,
        decode_text=policy.tokenizer.decode_sampled,
        report=Reporter("evaluation"),
    )


def _by_row(incident: Incident) -> Incident:
    return msgspec.structs.replace(incident, gid=None if incident.gid is None else row_of(incident.gid))


def _note(kept: list[Incident] | None, tell: Callable[[Incident], None] | None, incident: Incident) -> None:
    """Tell of an incident, and keep it where it would come no other way."""
    if kept is not None:
        kept.append(_by_row(incident))
    if tell is not None:
        tell(_by_row(incident))


async def _complete(
    policy: Policy,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    places: range,
    generation: GenerationConfig,
    device: DeviceThread,
    key: tuple[int, int],
    progress: Progress | None = None,
) -> list[RolloutGroup]:
    """Complete the rows at `places` together, as places of one step; `key` is (seed, step).

    A cancelled caller waits for one token, not for the longest completion.
    """
    seed, step = key
    engine = policy.engine(generation)
    requests = [RolloutRequest(prompt_ids=prompt_ids[i], key=(seed, step, i, 0)) for i in places]
    decoding = await device.run(engine.decode, requests)
    completed = await device.run(_in_order, decoding, progress, on_cancel=engine.abort)
    groups = []
    for place, group in zip(places, completed, strict=True):
        prompt = _prompt_of(policy, dataset, prompt_ids, place, place, step)
        rollouts = as_rollouts(group, policy.tokenizer.decode_sampled)
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


def _prompt_of(
    policy: Policy, dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], place: int, gid: int, step: int = 0
) -> Prompt:
    row = dataset[place]
    return Prompt(
        gid=gid,
        slot=Slot(step=step, place=place),
        epoch=0,
        row=place,
        prompt=row.prompt,
        prompt_ids=prompt_ids[place],
        columns=row.columns,
        opened=opened_thought(policy.tokenizer, row.prompt, prompt_ids[place]),
    )


def _in_order(groups: Iterable[CompletedGroup], progress: Progress | None) -> list[CompletedGroup]:
    """All of them, counted as they come."""
    completed = []
    for group in groups:
        completed.append(group)
        if progress is not None:
            progress.done += 1
    return sorted(completed, key=lambda group: group.index)


def _accuracy(dataset: PromptDataset, texts: Sequence[str]) -> float | None:
    if "answer" not in dataset.columns:
        return None
    scores = exact_answer_reward(texts, answer=[row.columns["answer"] for row in dataset])
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None


async def _loaded(source: str | Path, data: DataConfig) -> PromptDataset:
    """The rows of a source; who is interrupted does not wait for those that have to be made."""
    try:
        return await anyio.to_thread.run_sync(PromptDataset.load, source, data, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        stop_making_rows()
        raise


async def evaluate_folder(
    model: str | Path,
    dataset: str | Path,
    rewards: Sequence[str | Reward] = (),
    *,
    data: DataConfig | None = None,
    max_completion_length: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    dtype: str | None = None,
    adapter: str | Path | None = None,
    environment: EnvironmentConfig | None = None,
    acting: Acting = NOTHING_GIVEN,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a model folder, or one with an adapter beside it, on a source of prompts; what `troupe eval` does.

    Without rewards the rows must say what is right (`default_reward`). `data` says how rows are read, as in a run; its
    paths do not count. `environment` and `acting`: what the policy acts with, if it does. Raises InputError.
    """
    data = DataConfig() if data is None else data
    rows = await _loaded(dataset, data)
    environment = EnvironmentConfig() if environment is None else environment
    if environment.run == "worker":  # there is no run here that workers could join
        environment = msgspec.structs.replace(environment, run="process")
    world = load_acting(environment, acting)
    functions = list(rewards) or [default_rewards(rows, world)]
    manager = make_rewards(functions, RewardsConfig(), world, [rows])
    manager.check_columns(rows.columns)
    async with AsyncExitStack() as begun:
        device = await begun.enter_async_context(DeviceThread("evaluation"))
        await begun.enter_async_context(manager)
        policy = await device.run(partial(load_policy, model, dtype, adapter=adapter))
        policy.check_stop_ids()
        acting_setup = None if world is None else ActingSetup.of(world, policy, data)
        if acting_setup is not None:
            await begun.enter_async_context(acting_setup.manager)
        positions = policy.config.max_position_embeddings
        limit = min(data.max_prompt_tokens or positions, positions - 1)
        prompt_ids = tokenize_prompts(
            rows,
            policy.tokenizer,
            data,
            max_tokens=limit,
            vocab_size=policy.config.vocab_size,
            tell=None if acting_setup is None else acting_setup.opening,
        )
        return await evaluate(
            policy,
            rows,
            prompt_ids,
            generation=GenerationConfig(temperature=temperature, max_completion_length=max_completion_length),
            device=device,
            rewards=manager,
            seed=seed,
            progress=progress,
            acting_setup=acting_setup,
        )
