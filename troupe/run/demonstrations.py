"""A policy that teaches itself: the prompts that it sees then, and the weights that it begins with."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import msgspec

from troupe.actors.teacher.own import first_average
from troupe.actors.teacher.settings import PRIVILEGED_CONTEXT, PROMPT, TeacherConfig
from troupe.checkpoint import Checkpoint
from troupe.dataset import PromptDataset
from troupe.dataset.rows import PromptRow, kind_of_value
from troupe.errors import CheckpointError, ConfigError, DatasetError
from troupe.messages import PromptText
from troupe.policy import Policy, Weights
from troupe.run.config import RunConfig

_PLACES = re.compile("|".join(map(re.escape, (PROMPT, PRIVILEGED_CONTEXT))))


def demonstrated_prompts(
    config: RunConfig,
    rows: PromptDataset,
    tokenize: Callable[[PromptDataset], list[tuple[int, ...]]],
    *,
    acts: bool,
) -> tuple[tuple[int, ...], ...] | None:
    """The ids of every row's prompt with what the policy sees as its own teacher alone; None where it is none.

    `acts`: there is an environment or a tool. Raises ConfigError, or DatasetError with file, row and column, for what
    cannot be shown.
    """
    teacher = config.teacher
    if teacher.model_kind is None:
        return None
    if acts:
        raise ConfigError(
            "teacher.model_kind is set, but the policy acts in an environment or has tools, and a demonstration is "
            "shown before one completion; leave one of them out"
        )
    column = teacher.privileged_context_column
    if column not in rows.columns:
        raise ConfigError(
            f"{rows.source}: has no column {column!r} of what the policy sees as its own teacher; add it, or give "
            "another teacher.privileged_context_column"
        )
    shown = [msgspec.structs.replace(row, prompt=_shown(row, teacher, _where(rows, row))) for row in rows]
    try:
        prompts = tokenize(PromptDataset(shown, rows.source))
    except DatasetError as error:
        raise DatasetError(f"{error} (it is told with its {column!r}, by teacher.prompt_template)") from error
    return tuple(prompts)


def _where(rows: PromptDataset, row: PromptRow) -> str:
    return f"{rows.source}: row {row.row}" if row.line is None else f"{rows.source}:{row.line}: row {row.row}"


def _shown(row: PromptRow, teacher: TeacherConfig, where: str) -> PromptText:
    """The prompt by the template; of a conversation its last message, which must be the user's."""
    column = teacher.privileged_context_column
    context = _as_text(row.columns[column], column, where)
    if not context:
        raise DatasetError(
            f"{where} has nothing in the column {column!r}, which the policy is to see as its own teacher; give it a "
            "text, or remove the row"
        )
    if isinstance(row.prompt, str):
        return _filled(teacher.prompt_template, row.prompt, context)
    *before, last = row.prompt
    if last.get("role") != "user" or not isinstance(last.get("content"), str):
        raise DatasetError(
            f"{where}: the conversation does not end with a text of the user, into which teacher.prompt_template would "
            f"put {column!r}; end it with one, or remove the row"
        )
    return [*before, {**last, "content": _filled(teacher.prompt_template, last["content"], context)}]


def _filled(template: str, prompt: str, context: str) -> str:
    """Both in their places; what they have of braces stays as it is."""
    texts = {PROMPT: prompt, PRIVILEGED_CONTEXT: context}
    return _PLACES.sub(lambda found: texts[found[0]], template)


def _as_text(value: Any, column: str, where: str) -> str:
    """A text or a number as it is, of messages what they say, one below the other; "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    contents = [each.get("content") for each in value if isinstance(each, dict)] if isinstance(value, Sequence) else []
    if len(contents) != len(value) or not all(isinstance(said, str | None) for said in contents):
        raise DatasetError(
            f"{where} has {kind_of_value(value)} in the column {column!r}, which is neither a text, nor a number, nor "
            "messages whose contents are texts; write one of them"
        )
    return "\n".join(said for said in contents if said)


def average_to_begin(
    settings: TeacherConfig, begun: Policy, checkpoint: Checkpoint | None, *, warm_steps: int
) -> Weights | None:
    """`LearnerState.average` of a run that begins, or goes on from a checkpoint. `begun`: the policy that it
    began with. `warm_steps`: the supervised ones before others, after which alone a policy teaches itself.
    CheckpointError where it is to do so with weights that nothing holds."""
    weights = begun.weights
    if checkpoint is not None:
        if settings.model_kind == "ema":
            weights = checkpoint.weights if checkpoint.average is None else checkpoint.average
        elif settings.model_kind == "base" and 0 < warm_steps <= checkpoint.state.version:
            weights = _warmed(checkpoint, begun, is_newest=checkpoint.state.version == warm_steps)
    average = first_average(settings, weights)
    mx.eval(list((average or {}).values()))
    return average


def _warmed(checkpoint: Checkpoint, begun: Policy, *, is_newest: bool) -> Weights:
    """What a warm start ended with, in the policy's types: the newest weights, or what taught all the time since."""
    if is_newest:
        return checkpoint.weights
    made = checkpoint.made.config.get("teacher", {}).get("model_kind", "base")
    if checkpoint.average is None or made != "base":
        raise CheckpointError(
            'teacher.model_kind is "base", which is the policy that the warm start ended with, and the checkpoint of '
            f"step {checkpoint.state.version} was made without it; leave it as it was, or begin a run from that policy"
        )
    return {name: checkpoint.average[name].astype(own.dtype) for name, own in begun.weights.items()}
