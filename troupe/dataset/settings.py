"""The `[data]` section."""

from datetime import date
from typing import Annotated, Any, Literal

import msgspec

ChatMode = Literal["auto", "always"]
"""How prompts are read: "auto" leaves texts as they are; "always" makes a text one user message."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[data]` section."""

    path: str | None = None
    """Source of the training prompts: a `.json`, `.jsonl`, `.csv`, `.tsv` or `.parquet` file,
    `hf:NAME?split=…&config=…` or `reasoning_gym:TASK,TASK?size=…&seed=…`."""
    eval_path: str | None = None
    """The same for evaluation."""
    prompt_column: Annotated[str, msgspec.Meta(min_length=1)] = "prompt"
    """Column that holds the prompts."""
    answer_column: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """Column that rewards find under the name `answer` too, in place of one that is called so; None: as it is."""
    system_prompt: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """System message before every prompt; texts become conversations, and those that have one already are refused."""
    shuffle: bool = True
    """Whether each epoch has its own order, fixed by the run's seed."""
    max_prompt_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Most tokens of a prompt; longer ones are refused. None: the model's positions less one. Where these are too few
    for the longest prompt with `max_completion_length` tokens, that is lowered, for all prompts."""
    chat: ChatMode = "auto"
    """Message lists always go through the chat template; "always" sends texts through it too."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables for the chat template, such as `enable_thinking`."""
    chat_template_date: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day, as YYYY-MM-DD, that a chat template is told which writes today's date, as Llama 3's. None: that on which
    the run begins; its `run.toml` says it, so that a resume on another day has the same prompts."""

    def __post_init__(self) -> None:
        if self.chat_template_date is not None:
            try:
                date.fromisoformat(self.chat_template_date)
            except ValueError as error:
                raise ValueError(f"data.chat_template_date is {self.chat_template_date!r}: {error}") from None
