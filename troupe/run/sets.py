"""The sets of a run that are evaluated: loaded, told in ids, and given their rewards; and what may be named of them."""

import difflib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from troupe.actors.evaluator.decoding import EvalSet
from troupe.actors.evaluator.ledger import EarlyStop
from troupe.actors.evaluator.settings import EvaluationSet
from troupe.dataset import PromptDataset
from troupe.environments.loading import check_rows
from troupe.errors import ConfigError, DatasetError
from troupe.messages.evaluations import HELD_OUT
from troupe.policy import NetworkConfig, decode_memory_bytes, is_on_cpu
from troupe.policy.decode.memory import device_ways
from troupe.rewards import RewardManager
from troupe.run.acting import ActingWorld
from troupe.run.config import RunConfig
from troupe.runtime.memory import GB

OF_EVALUATION = "eval/"
"""Figures of evaluations begin so."""


class RowsOfSet(NamedTuple):
    """A set before the model is loaded."""

    settings: EvaluationSet
    rows: PromptDataset


def read_sets(config: RunConfig, first: int | None) -> list[RowsOfSet]:
    """The sets that a config names, or the `first` rows of each. DatasetError for what cannot be used."""
    sets = list(config.evaluation.sets)
    if config.data.eval_path:
        sets.insert(0, EvaluationSet(name=HELD_OUT, path=config.data.eval_path))
    found = []
    for each in sets:
        limits = [limit for limit in (each.limit, first) if limit is not None]
        rows = PromptDataset.load(each.path, config.data, first=min(limits, default=None))
        if each.limit is not None and len(rows) > each.limit:
            rows = rows.head(each.limit)
        found.append(RowsOfSet(each, rows))
    return found


def finished_sets(
    sets: Sequence[RowsOfSet],
    config: RunConfig,
    *,
    trained_on: PromptDataset | None,
    rewards: RewardManager,
    acting: ActingWorld | None,
    tokenize: Callable[[PromptDataset], Sequence[tuple[int, ...]]],
) -> tuple[EvalSet, ...]:
    """With their prompts in ids and their rewards. `trained_on`: what the run's own rewards score; None: nothing.
    RewardError and DatasetError for what cannot be used."""
    finished = []
    if acting is not None:
        acting.manager.name_sets([settings.name for settings, _ in sets])
    for settings, rows in sets:
        own = None
        if settings.rewards:
            of_set = msgspec.structs.replace(config.rewards, functions=settings.rewards, weights=None, run=None)
            environments = None if acting is None else acting.environments
            own = RewardManager(settings.rewards, None, of_set, environments=environments)
            own.check_columns(rows.columns)
        elif trained_on is None:
            rewards.check_columns(rows.columns)
        elif missing := trained_on.columns - rows.columns:
            raise DatasetError(
                f"{rows.source}: the held-out rows lack the column {', '.join(sorted(missing))} of the training rows"
            )
        if acting is not None:
            check_rows(acting.world, rows, rows.source)
        finished.append(
            EvalSet(
                settings=settings,
                dataset=rows,
                prompt_ids=tokenize(rows),
                rewards=own or rewards,
                has_own_rewards=own is not None,
            )
        )
    return tuple(finished)


def check_decodes(config: RunConfig, policy: NetworkConfig, sets: Sequence[EvalSet], dtype_of: object) -> None:
    """ConfigError where the samples of one row take more memory than a decode may."""
    limit_gb = config.generation.memory_limit_gb
    if limit_gb is None:
        return
    for each in sets:
        generation = each.settings.generation(config.generation)
        longest = max(map(len, each.prompt_ids))
        needed = decode_memory_bytes(
            policy,
            [longest],
            generation.num_generations,
            min(generation.max_completion_length, policy.max_position_embeddings - longest),
            dtype_of,  # type: ignore[arg-type]
            is_filtering=True,
            **device_ways(policy, dtype_of, on_cpu=is_on_cpu()),  # type: ignore[arg-type]
        )
        if needed > limit_gb * GB:
            raise ConfigError(
                f"evaluation.sets: the {generation.num_generations} samples of a row of {each.name} take "
                f"{needed / GB:.3g} GB to decode, but generation.memory_limit_gb is {limit_gb:g}; lower num_samples or "
                "max_completion_length of the set, or raise the limit"
            )


def judged_by(config: RunConfig, sets: Sequence[EvalSet]) -> list[str]:
    """What to tell of `checkpoint.metric_for_best` where an evaluation has it. ConfigError where none can."""
    metric, every = config.checkpoint.metric_for_best, config.evaluation.every
    _check_figure("checkpoint.metric_for_best", metric, sets)
    if not every:
        raise ConfigError(
            f"checkpoint.metric_for_best is {metric!r}, but evaluation.every is 0, so that checkpoints are not looked "
            "at; give evaluation.every, of which checkpoint.every is a multiple"
        )
    if config.checkpoint.every % every:
        return [
            f"checkpoint.every is {config.checkpoint.every}, no multiple of evaluation.every ({every}): only "
            f"checkpoints of steps that both divide are judged by {metric}"
        ]
    return []


def early_stop(config: RunConfig, sets: Sequence[EvalSet]) -> EarlyStop | None:
    """What may end the run early; None: nothing. ConfigError for a metric that no evaluation has."""
    evaluation, best = config.evaluation, config.checkpoint.metric_for_best
    if evaluation.metric is not None:
        _check_figure("evaluation.metric", evaluation.metric, sets)
    if not evaluation.patience:
        return None
    if not sets:
        raise ConfigError(
            f"evaluation.patience is {evaluation.patience}, but there is nothing to evaluate; give data.eval_path or "
            "[[evaluation.sets]]"
        )
    if evaluation.metric is None and best.startswith(OF_EVALUATION):
        _check_figure("checkpoint.metric_for_best", best, sets)
    metric = evaluation.metric or (best if best.startswith(OF_EVALUATION) else sets[0].figures[0])
    return EarlyStop(config=evaluation, metric=metric, greater_is_better=config.checkpoint.greater_is_better)


def _check_figure(key: str, metric: str, sets: Sequence[EvalSet]) -> None:
    known = [figure for each in sets for figure in each.figures]
    if metric not in known:
        close = difflib.get_close_matches(metric, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known) or 'none'}"
        raise ConfigError(f"{key} is {metric!r}, which no evaluation has; {hint}")
