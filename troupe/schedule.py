"""Which prompt stands in which slot, and how many steps a run has: pure functions of the config and the dataset.

The prompts form one endless stream, epoch after epoch, each epoch a permutation of the rows drawn from the seed.
Step k, place j is element k·P + j of that stream, so the cursor of a run is derived from k alone, no row is left out
at the end of an epoch, and every step is full. Knows nothing of actors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import msgspec

from troupe.dataset import DataConfig, PromptDataset
from troupe.errors import ConfigError, DatasetError, InputError
from troupe.messages import Prompt, Slot
from troupe.policy import Tokenizer, encode_prompt

_ATTEMPT_STRIDE = 1 << 48


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[schedule]` section: how old the weights may be that a trained token was sampled from."""

    mode: Literal["pinned"] = "pinned"
    """`pinned`: step k is generated with exactly policy version max(0, k − max_staleness)."""
    max_staleness: Literal[0, 1] = 0
    """0 is strictly on-policy; with 1, generation of a step overlaps scoring and learning of the step before."""
    generator: Literal["auto", "thread"] = "auto"
    """Where the generator runs; `auto` is a thread of the training process."""


class PromptSchedule:
    """The endless stream of prompts, addressed by slot."""

    def __init__(
        self,
        dataset: PromptDataset,
        prompt_ids: Sequence[tuple[int, ...]],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ) -> None:
        self.batch_size = batch_size
        self._dataset = dataset
        self._prompt_ids = prompt_ids
        # only the epochs that the live groups touch are asked for, always the newest few
        self._order = lru_cache(maxsize=4)(lambda epoch: dataset.order(seed, epoch, shuffle=shuffle))

    def prompt(self, slot: Slot) -> Prompt:
        """The prompt of a slot, with the gid that the slot determines."""
        index = slot.step * self.batch_size + slot.place
        epoch, position = divmod(index, len(self._dataset))
        row = self._order(epoch)[position]
        return Prompt(
            gid=index + slot.attempt * _ATTEMPT_STRIDE,
            slot=slot,
            epoch=epoch,
            row=row,
            prompt=self._dataset[row].prompt,
            prompt_ids=self._prompt_ids[row],
            columns=self._dataset[row].columns,
        )


def count_steps(rows: int, *, batch_size: int, epochs: int, max_steps: int | None) -> int:
    """Learner batches of a whole run: enough to show every row `epochs` times; `max_steps` overrides, as in TRL."""
    return math.ceil(rows * epochs / batch_size) if max_steps is None else max_steps


def tokenize_prompts(
    dataset: PromptDataset, tokenizer: Tokenizer, config: DataConfig, *, max_tokens: int
) -> list[tuple[int, ...]]:
    """Token ids of every row; DatasetError naming the first row that is longer than `max_tokens` or empty,
    or that the chat template refuses."""
    if "messages" in config.chat_template_kwargs:
        raise ConfigError("data.chat_template_kwargs.messages: the messages are those of the dataset; remove the key")
    encoded = []
    for row in dataset:
        where = f"{dataset.source}: row {row.row}" if row.line is None else f"{dataset.source}:{row.line}"
        try:
            ids = encode_prompt(tokenizer, row.prompt, **config.chat_template_kwargs)
        except InputError as error:
            raise DatasetError(f"{where}: the prompt cannot be rendered: {error}") from error
        if not ids:
            raise DatasetError(f"{where}: the prompt has no tokens; give it some text")
        if len(ids) > max_tokens:
            raise DatasetError(
                f"{where}: the prompt has {len(ids)} tokens, at most {max_tokens} fit beside a completion; "
                "shorten it, remove the row, or use a model with more positions"
            )
        encoded.append(tuple(ids))
    return encoded
