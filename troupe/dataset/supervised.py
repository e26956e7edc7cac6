"""Rows to imitate: a prompt with its completion, or a conversation of which the assistant's part is learned; and the
section `[sft]`.

A conversation in `messages` is cut before what the assistant says first: that is the prompt, the rest the completion.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias

import msgspec

from troupe.dataset.prompts import PromptDataset
from troupe.dataset.rows import PromptRow, check_messages, kind_of_value
from troupe.dataset.settings import DataConfig
from troupe.dataset.sources import read_source
from troupe.errors import DatasetError
from troupe.messages import ChatMessage

Said: TypeAlias = str | list[ChatMessage]
"""A text, or messages of which at least one is the assistant's."""


class SftConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[sft]` section: what of the rows of supervised steps is learned."""

    completion_column: Annotated[str, msgspec.Meta(min_length=1)] = "completion"
    """Column that holds the completions."""
    max_length: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """Most tokens of a row, prompt and completion; what is longer is cut at its end. None: rows longer than the model's
    positions are refused."""
    completion_only_loss: bool = True
    """Of texts, learn the completion alone; false: the prompt, too."""
    assistant_only_loss: bool = True
    """Of conversations, learn what the assistant says alone; false: all messages."""
    eval_dataset: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Source of held-out rows like those that are learned, of which loss and token accuracy are measured; None: there
    are none."""
    eval_steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Measure them after each so many supervised steps, and after the last of them; None: after the last alone."""

    def __post_init__(self) -> None:
        if self.eval_steps is not None and self.eval_dataset is None:
            raise ValueError(
                f"sft.eval_steps is {self.eval_steps}, but sft.eval_dataset names no held-out rows; name some"
            )


class SupervisedRows(msgspec.Struct, frozen=True, kw_only=True):
    """Checked rows, and what is to be learned of each."""

    dataset: PromptDataset
    said: tuple[Said, ...]
    held_out: "SupervisedRows | None" = None
    """Rows that are measured and not learned."""

    @classmethod
    def load(
        cls, source: str, config: DataConfig, sft: SftConfig | None = None, *, first: int | None = None
    ) -> "SupervisedRows":
        """Read a source, as `PromptDataset.load` does. DatasetError for a row of which nothing can be learned."""
        column = (SftConfig() if sft is None else sft).completion_column
        numbered, in_all = read_source(source, first)
        split = (
            (line, _split(value, _where(source, row, line), config, column))
            for row, (line, value) in enumerate(numbered)
        )
        dataset = PromptDataset.from_numbered(split, source, config, in_all)
        said = [_checked(row.columns.get(column), row, _where(source, row.row, row.line), column) for row in dataset]
        return cls(dataset=dataset, said=tuple(said))


def _where(source: str, row: int, line: int | None) -> str:
    return f"{source}: row {row} (counted from 0)" if line is None else f"{source}:{line}: row {row} (counted from 0)"


def _split(value: Any, where: str, config: DataConfig, column: str) -> Any:
    """A row with `prompt` and `completion`, whichever it has."""
    if not isinstance(value, Mapping) or config.prompt_column in value:
        return value
    messages = value.get("messages")
    if config.prompt_column != "prompt" or not isinstance(messages, list):
        return value
    check_messages(messages, where)
    place = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), None)
    if place is None:
        raise DatasetError(f"{where}: no message is the assistant's, so there is nothing to learn; add one")
    if place == 0:
        raise DatasetError(f"{where}: messages begins with an answer; put what it answers before it")
    others = {name: column for name, column in value.items() if name != "messages"}
    return {**others, "prompt": messages[:place], column: messages[place:]}


def _checked(said: Any, row: PromptRow, where: str, column: str) -> Said:
    """What is to be learned, messages where the prompt is a conversation."""
    if said is None:
        raise DatasetError(
            f'{where} has no "{column}"; a row to learn from has "prompt" and "completion", or "messages" (other '
            "columns are named by data.prompt_column and sft.completion_column)"
        )
    talks = not isinstance(row.prompt, str)
    if isinstance(said, str):
        if not said.strip():
            raise DatasetError(f"{where}: the completion is empty; write a text or remove the row")
        return [{"role": "assistant", "content": said}] if talks else said
    if not isinstance(said, list):
        raise DatasetError(f"{where}: the completion is {kind_of_value(said)}; give a text or a list of messages")
    check_messages(said, where, of="completion")
    if not talks:
        raise DatasetError(
            f"{where}: the completion is messages and the prompt a text; make both alike, or set data.chat = 'always'"
        )
    if not any(message["role"] == "assistant" for message in said):
        raise DatasetError(f"{where}: no message of the completion is the assistant's; add one")
    return said
