"""One learner batch as arrays: padded token ids, masks from lengths, and micro-batches of it.

Which positions are padding is known from the lengths of the rows, never guessed from the ids, so a completion may hold
any id, the padding id included.

A *row* is a prompt with tokens behind it. A completion is one row, or several where an episode's history is told anew
in the middle (`samples`); its tokens that were observed, not sampled, are masked.

Shapes: B rows, P the longest prompt, T the longest completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx

from troupe.policy.network.packing import distinct_prompts


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts and completions of one learner batch, or of a micro-batch of it."""

    prompts: tuple[tuple[int, ...], ...]
    """(B,) ids of each prompt, at least one."""
    completions: tuple[tuple[int, ...], ...]
    """(B,) ids of each completion."""
    completion_mask: mx.array
    """(B, T) float32: 1 where a sampled token of the completion stands, 0 on what was observed, on padding and in rows
    left out of the loss."""
    advantages: mx.array
    """(B,) float32, or (B, T) where they differ by token."""
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
    observed: mx.array | None = None
    """(B, T) float32: 1 where a token stands that was observed, not sampled; None: there is none."""
    samples: tuple[int, ...] | None = None
    """(B,) which completion each row is a part of; None: each is one by itself."""
    shares: mx.array | None = None
    """(B,) float32, which part of its completion's unmasked tokens each row has, see `with_shares`; None: all."""
    echo: mx.array | None = None
    """(B, T) float32: what −log π of each observed token counts, see `troupe.grpo.echo`; None: nothing."""
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
    def num_samples(self) -> int:
        """Completions of which there are rows."""
        return self.num_rows if self.samples is None else len(set(self.samples))

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
            advantages=self.advantages[chosen] if self.advantages.ndim == 1 else self.advantages[chosen, :T],
            sampling_log_probs=self.sampling_log_probs[chosen, :T],
            truncated=tuple(self.truncated[i] for i in rows),
            keys=None if self.keys is None else tuple(self.keys[i] for i in rows),
            experts=None if self.experts is None else tuple(self.experts[i] for i in rows),
            observed=None if self.observed is None else self.observed[chosen, :T],
            echo=None if self.echo is None else self.echo[chosen, :T],
            samples=None if self.samples is None else tuple(self.samples[i] for i in rows),
            shares=None if self.shares is None else self.shares[chosen],
        )

    def with_tokens(self, kept: Sequence[Sequence[bool]]) -> Batch:
        """The tokens that `kept[i]` (T_i,) says, all others masked; rows that had tokens and have none left are gone.

        A batch of which nothing is masked stays the same.
        """
        if all(map(all, kept)):
            return self
        T = self.completion_mask.shape[1]
        masked = replace(self, completion_mask=self.completion_mask * _as_rows(kept, T))
        return masked.select([i for i, row in enumerate(kept) if any(row) or not row])

    def without_truncated(self) -> Batch:
        """The same rows, with the mask 0 in the truncated ones (`mask_truncated_completions`)."""
        kept = mx.array([0.0 if cut else 1.0 for cut in self.truncated])
        return replace(self, completion_mask=self.completion_mask * kept[:, None])

    def with_shares(self) -> Batch:
        """The same rows with their `shares`, which stay what they are when rows are selected; as it is where each row
        is a completion by itself."""
        if self.samples is None:
            return self
        tokens: list[float] = mx.sum(self.completion_mask, axis=1).tolist()  # type: ignore[assignment]
        totals: dict[int, float] = {}
        for sample, count in zip(self.samples, tokens, strict=True):
            totals[sample] = totals.get(sample, 0.0) + count
        parts = [n / max(totals[sample], 1.0) for sample, n in zip(self.samples, tokens, strict=True)]
        return replace(self, shares=mx.array(parts))


def make_batch(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampling_log_probs: Sequence[Sequence[float]],
    advantages: mx.array | Sequence[float],
    *,
    pad_id: int,
    truncated: Sequence[bool] | None = None,
    sampled: Sequence[Sequence[bool]] | None = None,
    samples: Sequence[int] | None = None,
) -> Batch:
    """Pads B prompts on the left and B completions on the right into one `Batch`.

    `prompts[i]` (P_i,) with P_i ≥ 1, `completions[i]`, `sampling_log_probs[i]` and `sampled[i]` (T_i,), `advantages`
    (B,) or (B, T), `samples` (B,). Rows keep their order. `truncated` is all False where it is not given, `sampled` all
    True. Every array of the result is evaluated. Raises `ValueError` where the lengths disagree.
    """
    if not isinstance(advantages, mx.array):
        advantages = mx.array(list(advantages))
    advantages = advantages.astype(mx.float32)
    _check_lengths(prompts, completions, sampling_log_probs, truncated, sampled, samples)
    completion_lengths = [len(ids) for ids in completions]
    B, T = len(prompts), _width(completion_lengths)
    if advantages.shape not in ((B,), (B, T)):
        raise ValueError(f"advantages has the shape {advantages.shape}, not ({B},) or {(B, T)}; give one for each row")
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
        samples=None if samples is None else tuple(samples),
    )
    if sampled is not None:
        mask = batch.completion_mask
        own = mask * _as_rows(sampled, T)
        batch = replace(batch, completion_mask=own, observed=mask - own)
        mx.eval(batch.observed)
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


def micro_batches(batch: Batch, n: int, max_completion_length: int | None = None) -> list[Batch]:
    """Cuts a batch into micro-batches of neighbouring rows: n, as `split` does, where each completion is one row.

    Where completions are several rows, into so many that none has more rows than n micro-batches of one row a
    completion would have, nor takes more places than those may, at `max_completion_length`.
    """
    if batch.samples is None:
        return split(batch, n)
    firsts = [batch.samples.index(sample) for sample in dict.fromkeys(batch.samples)]
    S = len(firsts)
    most = -(-S // max(1, min(n, S)))
    room = math.inf
    if max_completion_length is not None:
        distinct, _ = distinct_prompts([batch.prompts[i] for i in firsts])
        room = most * max_completion_length + -(-len(distinct) * most // S) * max(map(len, distinct))
    edges, sizes = [0], _Places()
    for row in range(batch.num_rows):
        grown = sizes.with_row(batch.prompts[row], batch.completions[row])
        if row > edges[-1] and (row - edges[-1] == most or grown.places > room):
            edges.append(row)
            grown = _Places().with_row(batch.prompts[row], batch.completions[row])
        sizes = grown
    return [batch.rows(slice(start, stop)) for start, stop in pairwise([*edges, batch.num_rows])]


class _Places(NamedTuple):
    """The rectangles that the rows of a micro-batch are laid out in: prompts, and as many completions of each as any
    has."""

    prompts: int = 0
    longest_prompt: int = 0
    of_last: int = 0
    """Completions of the last prompt."""
    each: int = 0
    """Most completions of a prompt."""
    longest: int = 0
    last: Sequence[int] = ()

    @property
    def places(self) -> int:
        return self.prompts * (self.longest_prompt + self.each * self.longest)

    def with_row(self, prompt: Sequence[int], completion: Sequence[int]) -> _Places:
        is_new = not self.prompts or tuple(prompt) != tuple(self.last)
        of_last = 1 if is_new else self.of_last + 1
        return _Places(
            prompts=self.prompts + is_new,
            longest_prompt=max(self.longest_prompt, len(prompt)),
            of_last=of_last,
            each=max(self.each, of_last),
            longest=max(self.longest, len(completion)),
            last=prompt,
        )


def _as_rows(kept: Sequence[Sequence[bool]], T: int) -> mx.array:
    """(B, T) float32, 0 on padding."""
    return mx.array([[float(keep) for keep in row] + [0.0] * (T - len(row)) for row in kept])


def _width(lengths: Sequence[int]) -> int:
    """Columns for completions of these lengths: at least one, since kernels dislike empty axes."""
    return max(1, max(lengths))


def _check_lengths(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    sampling_log_probs: Sequence[Sequence[float]],
    truncated: Sequence[bool] | None,
    sampled: Sequence[Sequence[bool]] | None,
    samples: Sequence[int] | None,
) -> None:
    B = len(prompts)
    if B == 0:
        raise ValueError("a batch of 0 rows; give at least one prompt with its completion")
    columns: Mapping[str, Sequence[Any] | None] = {"completions": completions, "sampling_log_probs": sampling_log_probs}
    columns = {**columns, "truncated": truncated, "sampled": sampled, "samples": samples}
    for name, column in columns.items():
        if column is not None and len(column) != B:
            raise ValueError(f"{name} has {len(column)} rows, prompts has {B}; give one for each prompt")
    for i in range(B):
        if not prompts[i]:
            raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
        by_token: Mapping[str, Sequence[Any] | None] = {
            "sampling_log_probs": sampling_log_probs[i],
            "sampled": None if sampled is None else sampled[i],
        }
        for name, values in by_token.items():
            if values is not None and len(values) != len(completions[i]):
                raise ValueError(
                    f"{name}[{i}] has {len(values)} values for the {len(completions[i])} tokens of completions[{i}]; "
                    "give one for each token"
                )
