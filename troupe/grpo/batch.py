"""One learner batch as arrays: padded token ids, masks from lengths, and micro-batches of it.

Which positions are padding is known from the lengths of the rows, never guessed from the ids, so a completion may hold
any id, the padding id included.

Shapes: B rows (prompts × generations), P the longest prompt, T the longest completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import mlx.core as mx


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts and completions of one learner batch, or of a micro-batch of it."""

    prompts: tuple[tuple[int, ...], ...]
    """(B,) ids of each prompt, at least one."""
    completions: tuple[tuple[int, ...], ...]
    """(B,) ids of each completion."""
    completion_mask: mx.array
    """(B, T) float32: 1 where a token of the completion stands, 0 on padding and in rows left out of the loss."""
    advantages: mx.array
    """(B,) float32."""
    sampling_log_probs: mx.array
    """(B, T) float32, in nats, from the generator, under the temperature-scaled distribution that the learner
    differentiates; 0 on padding."""
    truncated: tuple[bool, ...]
    """(B,) whether the completion was cut by the length limit."""
    pad_id: int
    """Stands in the padding of `prompt_ids` and `completion_ids`."""
    keys: tuple[tuple[int, int], ...] | None = None
    """(B,) two numbers below 2³² for each row, by which its prompt's and its completion's tokens are told from others
    where dropout is drawn."""
    experts: tuple[tuple[bytes, bytes], ...] | None = None
    """(B,) the experts that the generator sent the tokens of each prompt and completion to, where they were recorded;
    see `troupe.policy.network.routes`."""
    pass_number: int = 0
    """Which of the `num_iterations` passes over the batch this is, from 0; each draws dropout anew."""

    @cached_property
    def prompt_ids(self) -> mx.array:
        """(B, P) int32, padded on the left."""
        P = max(self.prompt_lengths)
        return mx.array([[self.pad_id] * (P - len(ids)) + list(ids) for ids in self.prompts], dtype=mx.int32)

    @cached_property
    def completion_ids(self) -> mx.array:
        """(B, T) int32, padded on the right."""
        T = _width(self.completion_lengths)
        return mx.array([list(ids) + [self.pad_id] * (T - len(ids)) for ids in self.completions], dtype=mx.int32)

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """(B,) tokens of each prompt."""
        return tuple(map(len, self.prompts))

    @property
    def completion_lengths(self) -> tuple[int, ...]:
        """(B,) tokens of each completion, also where the mask leaves the row out."""
        return tuple(map(len, self.completions))

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.prompts)

    @property
    def num_completion_tokens(self) -> int:
        """Sum of the completion lengths."""
        return sum(self.completion_lengths)

    @property
    def num_tokens(self) -> int:
        """Sum of the prompt and completion lengths."""
        return sum(self.prompt_lengths) + self.num_completion_tokens

    def rows(self, part: slice) -> Batch:
        """The rows of a slice, without the padding columns that none of them needs."""
        rows = range(self.num_rows)[part]
        if not rows:
            raise ValueError(f"{part} selects none of the {self.num_rows} rows of the batch; take at least one")
        return self.select(rows)

    def select(self, rows: Sequence[int]) -> Batch:
        """The rows with these numbers, in the order given, without the padding columns that none of them needs."""
        if not rows:
            raise ValueError(f"none of the {self.num_rows} rows of the batch is selected; take at least one")
        T, chosen = _width([self.completion_lengths[i] for i in rows]), mx.array(list(rows))
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in rows),
            completions=tuple(self.completions[i] for i in rows),
            completion_mask=self.completion_mask[chosen, :T],
            advantages=self.advantages[chosen],
            sampling_log_probs=self.sampling_log_probs[chosen, :T],
            truncated=tuple(self.truncated[i] for i in rows),
            keys=None if self.keys is None else tuple(self.keys[i] for i in rows),
            experts=None if self.experts is None else tuple(self.experts[i] for i in rows),
        )

    def with_tokens(self, kept: Sequence[Sequence[bool]]) -> Batch:
        """The tokens that `kept[i]` (T_i,) says, all others masked; rows that had tokens and have none left are gone.

        A batch of which nothing is masked stays the same.
        """
        if all(map(all, kept)):
            return self
        T = self.completion_mask.shape[1]
        mask = mx.array([[float(keep) for keep in row] + [0.0] * (T - len(row)) for row in kept])
        masked = replace(self, completion_mask=self.completion_mask * mask)
        return masked.select([i for i, row in enumerate(kept) if any(row) or not row])

    def without_truncated(self) -> Batch:
        """The same rows, with the mask 0 in the truncated ones (`mask_truncated_completions`)."""
        kept = mx.array([0.0 if cut else 1.0 for cut in self.truncated])
        return replace(self, completion_mask=self.completion_mask * kept[:, None])


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampling_log_probs: Sequence[Sequence[float]],
    advantages: mx.array | Sequence[float],
    *,
    pad_id: int,
    truncated: Sequence[bool] | None = None,
) -> Batch:
    """Pads B prompts on the left and B completions on the right into one `Batch`.

    `prompts[i]` (P_i,) with P_i ≥ 1, `completions[i]` and `sampling_log_probs[i]` (T_i,), `advantages` (B,). Rows keep
    their order. `truncated` is all False where it is not given. Every array of the result is evaluated. Raises
    `ValueError` where the lengths disagree.
    """
    if not isinstance(advantages, mx.array):
        advantages = mx.array(list(advantages))
    advantages = advantages.astype(mx.float32)
    _check_lengths(prompts, completions, sampling_log_probs, advantages, truncated)
    completion_lengths = [len(ids) for ids in completions]
    T = _width(completion_lengths)
    batch = Batch(
        prompts=tuple(map(tuple, prompts)),
        completions=tuple(map(tuple, completions)),
        completion_mask=(mx.arange(T) < mx.array(completion_lengths)[:, None]).astype(mx.float32),
        advantages=advantages,
        sampling_log_probs=mx.array(
            [list(row) + [0.0] * (T - len(row)) for row in sampling_log_probs], dtype=mx.float32
        ),
        truncated=tuple(truncated) if truncated is not None else (False,) * len(prompts),
        pad_id=pad_id,
    )
    mx.eval(batch.completion_mask, batch.advantages)
    return batch


def split(batch: Batch, n: int) -> list[Batch]:
    """Cuts a batch into n micro-batches of neighbouring rows whose sizes differ by at most one.

    The larger ones come first; a batch of fewer than n rows gives one micro-batch a row.
    """
    if n < 1:
        raise ValueError(f"a batch cannot be split into {n} micro-batches; give at least 1")
    n = min(n, batch.num_rows)
    if n == 1:
        return [batch]
    size, larger = divmod(batch.num_rows, n)
    edges = [i * size + min(i, larger) for i in range(n + 1)]
    return [batch.rows(slice(start, stop)) for start, stop in pairwise(edges)]


def _width(lengths: Sequence[int]) -> int:
    """Columns for completions of these lengths: at least one, since kernels dislike empty axes."""
    return max(1, max(lengths))


def _check_lengths(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampling_log_probs: Sequence[Sequence[float]],
    advantages: mx.array,
    truncated: Sequence[bool] | None,
) -> None:
    B = len(prompts)
    if B == 0:
        raise ValueError("a batch of 0 rows; give at least one prompt with its completion")
    counts = {"completions": len(completions), "sampling_log_probs": len(sampling_log_probs)}
    if truncated is not None:
        counts["truncated"] = len(truncated)
    for name, count in counts.items():
        if count != B:
            raise ValueError(f"{name} has {count} rows, prompts has {B}; give one for each prompt")
    if advantages.shape != (B,):
        raise ValueError(f"advantages has the shape {advantages.shape}, not ({B},); give one for each prompt")
    for i in range(B):
        if not prompts[i]:
            raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
        if len(completions[i]) != len(sampling_log_probs[i]):
            raise ValueError(
                f"sampling_log_probs[{i}] has {len(sampling_log_probs[i])} values for the {len(completions[i])} "
                f"tokens of completions[{i}]; give one for each token"
            )
