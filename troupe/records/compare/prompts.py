"""Prompts that all runs were asked, with what each run answered at first and at last."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from troupe.errors import OutputError
from troupe.messages import EvaluatedRow
from troupe.records.compare.held_out import prompt_key
from troupe.records.held_out import HeldOut
from troupe.records.store.prompts import AnsweredSample, PromptEnds, prompt_ends, prompt_of, samples_of
from troupe.records.store.read import open_store
from troupe.records.text import prompt_text

MOST_PROMPTS = 12
"""Of each set, and of those trained on."""
MOST_SAMPLES = 4


class Answers(msgspec.Struct, frozen=True, kw_only=True):
    """What a run answered once."""

    step: int
    """The step that it was trained on in, or the version that was evaluated."""
    samples: tuple[AnsweredSample, ...]
    """The first ones, none chosen."""


class SharedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt, and each run's first and last answers to it, in the order of the runs; where it had one, twice the
    same."""

    source: str
    """A set's name, or "training"."""
    prompt: str
    answers: tuple[tuple[Answers, Answers], ...]


def shared_in_training(folders: Sequence[Path]) -> list[SharedPrompt]:
    """Prompts that all runs have trained on; those first that they had furthest apart, then latest. None
    where a store cannot be read."""
    try:
        ends = []
        for folder in folders:
            with open_store(folder) as run:
                ends.append(prompt_ends(run.connection))
        shared = [key for key in ends[0] if all(key in other for other in ends[1:])]
        shared.sort(key=lambda key: min(_telling(other[key]) for other in ends), reverse=True)
        chosen = shared[:MOST_PROMPTS]
        columns = [_answers(folder, [one[key] for key in chosen]) for folder, one in zip(folders, ends, strict=True)]
        prompts = _prompts(folders[0], [ends[0][key] for key in chosen])
    except OutputError:  # the pictures of the runs have notes of it
        return []
    return [
        SharedPrompt(source="training", prompt=prompt, answers=answers)
        for prompt, *answers_of_runs in zip(prompts, *columns, strict=True)
        if (answers := tuple(answers_of_runs))
    ]


def _telling(ends: PromptEnds) -> tuple[int, int]:
    return ends.last_step - ends.first_step, ends.last_step


def _answers(folder: Path, ends: Sequence[PromptEnds]) -> list[tuple[Answers, Answers]]:
    with open_store(folder) as run:
        return [
            (
                Answers(step=one.first_step, samples=tuple(samples_of(run.connection, one.first, MOST_SAMPLES))),
                Answers(step=one.last_step, samples=tuple(samples_of(run.connection, one.last, MOST_SAMPLES))),
            )
            for one in ends
        ]


def _prompts(folder: Path, ends: Sequence[PromptEnds]) -> list[str]:
    with open_store(folder) as run:
        return [prompt_text(prompt_of(run.connection, one.first)) for one in ends]


def shared_held_out(runs: Sequence[Mapping[str, HeldOut]]) -> list[SharedPrompt]:
    """Rows of a set that all runs were asked at last; those first about which they agree least."""
    found = []
    for name in runs[0]:
        sets = [run[name] for run in runs if name in run]
        if len(sets) < len(runs):
            continue
        lasts = [_by_prompt(one.rows) for one in sets]
        firsts = [_by_prompt(one.first_rows or one.rows) for one in sets]
        shared = [key for key in lasts[0] if all(key in other for other in (*lasts[1:], *firsts))]
        shared.sort(key=lambda key: -_spread([rows[key] for rows in lasts]))
        for key in shared[:MOST_PROMPTS]:
            answers = tuple(
                (_told(one.since, first[key]), _told(one.newest, last[key]))
                for one, first, last in zip(sets, firsts, lasts, strict=True)
            )
            found.append(SharedPrompt(source=name, prompt=prompt_text(lasts[0][key].prompt), answers=answers))
    return found


def _by_prompt(rows: Sequence[EvaluatedRow]) -> dict[str, EvaluatedRow]:
    return {prompt_key(row.prompt): row for row in rows}


def _spread(rows: Sequence[EvaluatedRow]) -> float:
    """How far the runs' mean scores of a row lie apart."""
    means = []
    for row in rows:
        scores = [sample.score for sample in row.samples if sample.score is not None]
        means.append(sum(scores) / len(scores) if scores else 0.0)
    return max(means) - min(means)


def _told(version: int, row: EvaluatedRow) -> Answers:
    samples = tuple(
        AnsweredSample(text=sample.text, reward=sample.score, finish_reason=sample.finish_reason, tokens=sample.tokens)
        for sample in row.samples[:MOST_SAMPLES]
    )
    return Answers(step=version, samples=samples)
