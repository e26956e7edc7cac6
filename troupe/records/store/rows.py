"""What became of each row of the dataset: how often it was seen, and how much of it passed."""

import sqlite3
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgspec

from troupe.dataset import CurriculumConfig
from troupe.dataset.curriculum import mean_rate, pass_rate, pool_of
from troupe.messages import Pool, PromptText

_SAMPLES = (
    'SELECT g."row", g.step, g.gid, c.reward, {scores}, length(c.token_ids) / 4 FROM groups g'
    ' JOIN completions c USING (gid) WHERE g."row" IS NOT NULL AND g.step > 0'
    ' ORDER BY g."row", g.step, g.slot_step, g.place, g.attempt, c.sample'
)
_PROMPTS = 'SELECT "row", max(gid), prompt FROM groups WHERE "row" IS NOT NULL GROUP BY "row"'


class RowStory(msgspec.Struct, frozen=True, kw_only=True):
    """A row that at least one group was sampled of."""

    row: int
    """Of the dataset, from 0."""
    groups: int
    """That were sampled of it."""
    first_step: int
    newest_step: int
    pass_rate: float | None
    """Of its newest groups, as many as the curriculum looks at; None where no completion has a score."""
    first_pass_rate: float | None
    """Of its first group that has one."""
    newest_pass_rate: float | None
    """Of its newest group that has one."""
    reward: float | None
    """Mean of all completions."""
    mean_length: float
    """Tokens of a completion."""
    without_signal: float | None
    """Part of the groups in which all scores are equal."""
    pool: Pool
    """That the curriculum has it in, or would have."""


class _Group(msgspec.Struct, frozen=True):
    step: int
    scores: list[float | None]
    tokens: int


def row_stories(connection: sqlite3.Connection, config: CurriculumConfig) -> Iterator[RowStory]:
    """What became of every row, by row. `config`: what passes, and where the pools are divided."""
    scores = "NULL" if config.reward is None else "c.scores"
    samples = connection.execute(_SAMPLES.format(scores=scores))
    for row, of_row in groupby(samples, key=itemgetter(0)):
        groups = []
        for _, of_group in groupby(of_row, key=itemgetter(2)):
            told = list(of_group)
            groups.append(_Group(told[0][1], [_score(sample, config) for sample in told], sum(s[5] for s in told)))
        yield _story(row, groups, config)


def prompts_of_rows(connection: sqlite3.Connection) -> dict[int, PromptText | None]:
    """Row → its prompt."""
    decode = msgspec.json.Decoder(PromptText | None).decode
    return {row: decode(prompt or "null") for row, _, prompt in connection.execute(_PROMPTS)}


def _score(sample: tuple[Any, ...], config: CurriculumConfig) -> float | None:
    if config.reward is None:
        weighted: float | None = sample[3]
        return weighted
    score: float | None = msgspec.json.decode(sample[4]).get(config.reward)
    return score


def _story(row: int, groups: list[_Group], config: CurriculumConfig) -> RowStory:
    found = [rate for group in groups if (rate := pass_rate(group.scores, config.passes_from)) is not None]
    scores = [score for group in groups for score in group.scores if score is not None]
    completions = sum(len(group.scores) for group in groups)
    with_scores = [kinds for group in groups if (kinds := {score for score in group.scores if score is not None})]
    return RowStory(
        row=row,
        groups=len(groups),
        first_step=groups[0].step,
        newest_step=groups[-1].step,
        pass_rate=mean_rate(found, config.window) if found else None,
        first_pass_rate=found[0] if found else None,
        newest_pass_rate=found[-1] if found else None,
        reward=sum(scores) / len(scores) if scores else None,
        mean_length=sum(group.tokens for group in groups) / completions,
        without_signal=sum(len(kinds) == 1 for kinds in with_scores) / len(with_scores) if with_scores else None,
        pool=pool_of(found[-config.window :], len(found), config),
    )
