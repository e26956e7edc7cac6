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
from troupe.dataset.rows import PromptRow
from troupe.errors import ConfigError, DatasetError
from troupe.messages import PromptText
from troupe.policy import Policy, Weights
from troupe.run.config import RunConfig

_PLACES = re.compile("|".join(map(re.escape, (PROMPT, PRIVILEGED_CONTEXT))))


def demonstrated_prompts(
    config: RunConfig,
    rows: PromptDataset,
    tokenize: Callable[[PromptDataset], list[tuple[int, ...]]],
    policy: Policy,
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
    room = policy.config.max_position_embeddings - config.generation.max_completion_length
    for row, ids in zip(rows, prompts, strict=True):
        if len(ids) > room:
            raise DatasetError(
                f"{_where(rows, row)}: the prompt has {len(ids)} tokens with its {column!r}, and {room} fit beside a "
                "completion; shorten that, or lower generation.max_completion_length"
            )
    return tuple(prompts)


def _where(rows: PromptDataset, row: PromptRow) -> str:
    return f"{rows.source}: row {row.row}" if row.line is None else f"{rows.source}:{row.line}: row {row.row}"


def _shown(row: PromptRow, teacher: TeacherConfig, where: str) -> PromptText:
    """The prompt by the template; of a conversation its last message, which must be the user's."""
    column = teacher.privileged_context_column
    context = _as_text(row.columns[column])
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


def _as_text(value: Any) -> str:
    """A text or a number as it is, of messages what they say, one below the other; "" for nothing."""
    if value is None:
        return ""
    if isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, dict) for each in value):
        return "\n".join(str(each["content"]) for each in value if each.get("content"))
    return str(value)


def average_to_begin(
    settings: TeacherConfig, begun: Policy, checkpoint: Checkpoint | None, *, warmed: bool
) -> Weights | None:
    """`LearnerState.average` of a run that begins, or goes on from a checkpoint. `begun`: the policy that it
    began with. `warmed`: it began with supervised steps, after which alone a policy teaches itself."""
    weights = begun.weights
    if checkpoint is not None:
        if settings.model_kind == "ema":
            weights = checkpoint.weights if checkpoint.average is None else checkpoint.average
        elif warmed and checkpoint.average is not None:
            weights = {name: checkpoint.average[name].astype(own.dtype) for name, own in weights.items()}
    average = first_average(settings, weights)
    mx.eval(list((average or {}).values()))
    return average
