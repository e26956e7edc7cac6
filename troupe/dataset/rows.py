"""What a row must be: a prompt that can be asked, and columns that can be sent on."""

import difflib
from collections.abc import Mapping
from typing import Any

import msgspec

from troupe.dataset.settings import DataConfig
from troupe.errors import DatasetError
from troupe.messages import PromptText

RESERVED_COLUMNS = frozenset(
    {"completions", "completion_ids", "completion_starts", "prompts", "trainer_state", "log_extra", "log_metric"}
)
"""Names under which reward functions receive something else, so that no column may have them."""

MAX_DEPTH = 100
"""Most lists and objects that stand in each other in one value: what copies values or sends them on calls itself as
often."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles that Qwen3's chat template renders; it drops any other without a word."""


class PromptRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checked row."""

    prompt: PromptText
    """A text, or a conversation of at least one message; never empty."""
    columns: dict[str, Any]
    """Every other column of the dataset; `None` where this row lacks it."""
    row: int
    """Place in the source, from 0; shuffling keeps it."""
    line: int | None
    """Line of the file on which the row starts, from 1; None where there is no file."""


def check_row(value: Any, source: str, row: int, line: int | None, config: DataConfig) -> PromptRow:
    """The row with its columns under the names that rewards know, its prompt as `config` wants it.

    Raises:
        DatasetError: naming source, line, row and column, for what cannot be used.
    """
    where = f"{source}: row {row}" if line is None else f"{source}:{line}: row {row}"
    where = f"{where} (counted from 0)"
    if not isinstance(value, Mapping):
        raise DatasetError(f'{where} is {kind_of_value(value)}, not an object; write {{"prompt": …}}')
    columns = dict(value)
    prompt = _as_conversation(_check_prompt(_take_prompt(columns, config, where), where), where, config)
    if config.answer_column not in (None, "answer"):
        if config.answer_column not in columns:
            raise _no_column(columns, "data.answer_column", str(config.answer_column), where)
        columns["answer"] = columns[config.answer_column]
    for name in columns:
        if not isinstance(name, str):
            raise DatasetError(f"{where}: column name {name!r} is {kind_of_value(name)}; column names are texts")
        if name in RESERVED_COLUMNS:
            raise DatasetError(
                f"{where}: column {name!r} is the name of another argument of reward functions; rename it"
            )
    for name, held in {"the prompt": prompt, **columns}.items():
        if _is_deep(held):
            column = "the prompt" if held is prompt else f"column {name!r}"
            raise DatasetError(f"{where}: {column} is nested more than {MAX_DEPTH} levels deep; flatten it")
        try:
            msgspec.msgpack.encode([name, held])
        except (UnicodeEncodeError, OverflowError, TypeError, ValueError, RecursionError) as error:
            column = name if held is prompt else f"column {name!r}"
            raise DatasetError(
                f"{where}: {column} holds a value that cannot be sent on: {error}; keep to JSON values, "
                "whole numbers of at most 64 bits and texts without lone surrogates"
            ) from None
    return PromptRow(prompt=prompt, columns=columns, row=row, line=line)


def _is_deep(value: Any) -> bool:
    """Whether lists and objects stand in each other past the limit."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            inner
            for held in level
            if isinstance(held, list | tuple | Mapping)
            for inner in (held.values() if isinstance(held, Mapping) else held)
        ]
        if not level:
            return False
    return True


def _take_prompt(columns: dict[str, Any], config: DataConfig, where: str) -> Any:
    """The column of the prompts, taken out of the others: the one that is named, or else `messages`.

    Of `messages`, which other trainers learn to write, a final answer is no part of the question: it becomes the
    column `solution`, unless there is one, or the completion is to continue it.
    """
    name = config.prompt_column
    if name in columns:
        return columns.pop(name)
    if name == "prompt" and isinstance(messages := columns.get("messages"), list):
        del columns["messages"]
        final = messages[-1] if messages else None
        if not isinstance(final, Mapping) or final.get("role") != "assistant":
            return messages
        if config.chat_template_kwargs.get("continue_final_message"):
            return messages
        if len(messages) == 1:
            raise DatasetError(
                f"{where}: messages has an answer and nothing that it answers; put a user's message first"
            )
        columns.setdefault("solution", final.get("content"))
        return messages[:-1]
    if name != "prompt":
        raise _no_column(columns, "data.prompt_column", name, where)
    has = ", ".join(sorted(map(str, columns))) or "no keys"
    raise DatasetError(
        f'{where} has no "prompt" (it has {has}); add one, or name the column that has it by data.prompt_column'
    )


def _no_column(columns: Mapping[Any, Any], key: str, name: str, where: str) -> DatasetError:
    has = sorted(map(str, columns))
    close = difflib.get_close_matches(name, has, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"it has {', '.join(has) or 'no keys'}; name one of these"
    return DatasetError(f"{where} has no column {name!r}, which {key} names; {remedy}")


def _as_conversation(prompt: PromptText, where: str, config: DataConfig) -> PromptText:
    """The prompt as a conversation, where that is wanted."""
    if isinstance(prompt, str):
        if config.chat == "auto" and config.system_prompt is None:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if config.system_prompt is None:
        return prompt
    if prompt[0]["role"] == "system":
        raise DatasetError(
            f"{where}: the conversation has a system message already; leave data.system_prompt out, or remove it there"
        )
    return [{"role": "system", "content": config.system_prompt}, *prompt]


def _check_prompt(prompt: Any, where: str) -> PromptText:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DatasetError(f"{where}: the prompt is empty; write a text or remove the row")
        return prompt
    if not isinstance(prompt, list):
        raise DatasetError(f"{where}: the prompt is {kind_of_value(prompt)}; give a text or a list of messages")
    if not prompt:
        raise DatasetError(f"{where}: the prompt is an empty list; give at least one message")
    check_messages(prompt, where)
    return prompt


def check_messages(messages: list[Any], where: str, of: str = "prompt") -> None:
    """Raise DatasetError for what is no message with a role that is known and a text, or a call."""
    for number, message in enumerate(messages):
        at = f"{where}: message {number} of the {of}"
        if not isinstance(message, dict):
            raise DatasetError(f'{at} is {kind_of_value(message)}, not an object; write {{"role": …, "content": …}}')
        if message.get("role") not in ROLES:
            raise DatasetError(f"{at} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise DatasetError(f"{at} has content that is {kind_of_value(content)}; give a text")


def kind_of_value(value: Any) -> str:
    """What a JSON author would call a value."""
    if value is None:
        return "null or missing"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
