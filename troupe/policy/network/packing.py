"""Prompts and completions as one row of tokens without padding, in which completions of one prompt share it.

What acts on single tokens (matrices, norms, the head over the vocabulary) meets N real tokens and no padding, and a
prompt that neighbouring completions share is computed once. Only attention lays the tokens out in rectangles. The last
token of a completion foretells nothing and is left out.

Shapes: R completions of Q distinct prompts, at most G of each; P longest prompt, T longest completion without its last
token; N tokens, M completion tokens to be foretold; H query heads, K key/value heads, d head size.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.policy.network.attention import (
    Places,
    QueryBlock,
    attention_in_blocks,
    attention_of_rows,
    gradient_in_blocks,
    gradient_of_rows,
    query_blocks,
)
from troupe.policy.network.delta import DeltaInputs, DeltaSizes
from troupe.policy.network.delta_packing import PackedRows
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.flash_attention import can_serve, flash_attention, flash_gradient
from troupe.policy.network.layouts import Cells, WholeRows, differentiable_read


class Attended(NamedTuple):
    """What came of attention, (1, H, N, d), and what its gradient needs: where scores were written out log Σ e^score,
    float32 (N, H), by kernels of our own what `flash_attention` gives, (R, H, places), else ()."""

    o: mx.array
    normalizer: mx.array


class Packing:
    """Where each token of R prompts and completions stands in one row (1, N); an `Attention` over that row."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], *, deterministic: bool = True
    ) -> None:
        """R prompts of at least one id, R completions. Neighbouring equal prompts are taken as one. `deterministic`:
        gradients have the same bits each time, on every device."""
        self._deterministic = deterministic
        distinct, sizes = distinct_prompts(prompts)
        G = max(sizes)
        inner = [max(0, len(completion) - 1) for completion in completions]
        rows = iter(inner)
        lengths = [len(prompt) for prompt in distinct]
        self._prompts = Cells(lengths)
        own = [next(rows) if g < size else 0 for size in sizes for g in range(G)]
        self._completions = Cells(own)
        self.rows = PackedRows(self._prompts, self._completions, lengths, own)
        """What gated delta nets go through."""
        self._members = Cells(sizes)
        self._begun = Cells([min(1, len(completion)) for completion in completions])
        self._rows = Cells([len(completion) for completion in completions])
        self._in_row_order, self._in_target_order = _row_order([len(completion) for completion in completions])
        self._last = mx.array([stop - 1 for stop in accumulate(lengths)])
        self.ids = mx.array(list(chain(chain.from_iterable(distinct), *(c[:-1] for c in completions))), dtype=mx.int32)
        """(N,) first the distinct prompts, then the completions without their last tokens."""
        self.targets = mx.array([c[0] for c in completions if c] + [i for c in completions for i in c[1:]], mx.int32)
        """(M,) the tokens to be foretold: the first one of each completion, then all others."""
        starts = [length for length, size in zip(lengths, sizes, strict=True) for _ in range(size)]
        places = [range(length) for length in lengths]
        places += [range(start, start + n) for start, n in zip(starts, inner, strict=True)]
        self.offset = mx.array(list(chain.from_iterable(places)), dtype=mx.int32)[None]
        """(1, N) rotary position of every token."""
        self._prompt_lengths = lengths
        self._known_blocks: dict[int | None, tuple[list[QueryBlock], list[QueryBlock]]] = {}
        self._whole_rows = None if is_on_cpu() else WholeRows(lengths, sizes, inner)

    def _blocks(self, heads_per_key: int, window: int | None) -> tuple[list[QueryBlock], list[QueryBlock]]:
        """Who sees whom: prompts among themselves, and completions their prompts and themselves. The same each time."""
        if window not in self._known_blocks:
            P, T = self._prompts.width, self._completions.width
            real = None
            if not self._prompts.is_full:
                own = mx.ones((self._prompts.rows, T), mx.bool_)
                real = mx.repeat(mx.concatenate([self._prompts.is_real, own], axis=1), self._each, axis=0)
            of_prompts, of_completions = (None, None) if window is None or window >= P + T else self._places(window)
            self._known_blocks[window] = (
                query_blocks(P, P, heads_per_key, places=of_prompts),
                query_blocks(T, P + T, heads_per_key, real, of_completions),
            )
        return self._known_blocks[window]

    @property
    def _each(self) -> int:
        """G."""
        return self._completions.rows // self._prompts.rows

    def _places(self, window: int) -> tuple[Places, Places]:
        """Positions of the tokens of prompts, and of completions behind their prompts."""
        prompt, own = mx.arange(self._prompts.width)[None], mx.arange(self._completions.width)[None]
        lengths = mx.array(self._prompt_lengths[:1] if self._prompts.is_full else self._prompt_lengths)[:, None]
        lengths = lengths if self._prompts.is_full else mx.repeat(lengths, self._each, axis=0)
        own = own + lengths
        keys = mx.concatenate([mx.broadcast_to(prompt, (own.shape[0], prompt.shape[1])), own], axis=1)
        return Places(prompt, prompt, window), Places(own, keys, window)

    def sources(self, hidden: mx.array) -> mx.array:
        """Hidden states (N, D) → those that foretell the targets, (M, D)."""
        prompts, completions = mx.split(hidden, [self._prompts.count])
        last = prompts[self._last][:, None]
        each = self._members.collect(mx.broadcast_to(last, (*last.shape[:1], self._members.width, hidden.shape[-1])))
        return mx.concatenate([self._begun.collect(each[:, None]), completions])

    def in_rows(self, values: mx.array) -> mx.array:
        """One number a target, (M,) → (R, longest completion), 0 in the padding."""
        ordered = differentiable_read(values, lambda x: x[self._in_row_order], lambda x: x[self._in_target_order])
        return self._rows.spread(ordered)

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        """All (1, heads, N, d)."""
        if self._whole_rows is not None and not can_serve(q.shape[-1], q.dtype):
            return self.attend_keeping(q, k, v, scale, window)[0]

        @mx.custom_function
        def attended(q: mx.array, k: mx.array, v: mx.array) -> Any:
            return self.attend_keeping(q, k, v, scale, window)

        @attended.vjp
        def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
            q, k, v = primals
            return self.attend_gradient(q, k, v, scale, cotangents[0], outputs, window)

        return cast("tuple[mx.array, mx.array]", attended(q, k, v))[0]

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        """All (1, N, …)."""
        return self.rows.through(inputs, sizes, paced=False)

    def attend_keeping(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> Attended:
        """What `attend` gives, with what `attend_gradient` can make use of."""
        q, k, v = (_by_token(x) for x in (q, k, v))
        if self._whole_rows is not None:
            o, normalizer = _attend_in_whole_rows(self._whole_rows, q, k, v, scale, window)
            return Attended(o.swapaxes(0, 1)[None], normalizer)
        o, normalizer = self._attend_in_parts(q, k, v, scale, window)
        return Attended(o.swapaxes(0, 1)[None], normalizer)

    def _attend_in_parts(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None
    ) -> tuple[mx.array, mx.array]:
        """All (N, heads, d). Prompts among themselves, then completions to both: least work without fused kernels."""
        of_prompts, of_completions = self._blocks(q.shape[1] // k.shape[1], window)
        prompts, completions = zip(*(mx.split(x, [self._prompts.count]) for x in (q, k, v)), strict=True)
        q, k, v = (self._prompts.spread(x).swapaxes(1, 2) for x in prompts)  # (Q, heads, P, d)
        found = attention_in_blocks(q, k, v, scale, of_prompts)
        outputs = [[self._prompts.collect(x.swapaxes(1, 2)) for x in found]]
        if self._completions.count:
            q, own_k, own_v = (self._completions.spread(x).swapaxes(1, 2) for x in completions)
            k, v = self._behind_prompts(k, own_k), self._behind_prompts(v, own_v)
            found = attention_in_blocks(q, k, v, scale, of_completions)
            outputs.append([self._completions.collect(x.swapaxes(1, 2)) for x in found])
        o, normalizer = (mx.concatenate(list(parts)) for parts in zip(*outputs, strict=True))
        return o, normalizer

    def attend_gradient(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        o_grad: mx.array,
        attended: Sequence[mx.array],
        window: int | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The cotangents of q, k and v from that of what `attend` gave; by hand, because kernels are fused so.

        `attended` is what `attend_keeping` gave.
        """
        if self._whole_rows is not None:
            q, k, v, o_grad = (_by_token(x) for x in (q, k, v, o_grad))
            of_rows = _by_token(attended[0]), attended[1]
            exact = self._deterministic
            grads = _gradient_in_whole_rows(self._whole_rows, q, k, v, scale, o_grad, of_rows, window, exact=exact)
        else:
            o, normalizer = attended
            mean = mx.sum(_by_token(o_grad).astype(mx.float32) * _by_token(o), axis=-1)
            q, k, v, o_grad = (_by_token(x) for x in (q, k, v, o_grad))
            grads = self._gradient_in_parts(q, k, v, scale, o_grad, normalizer, mean, window)
        dq, dk, dv = (x.swapaxes(0, 1)[None] for x in grads)
        return dq, dk, dv

    def _gradient_in_parts(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        o_grad: mx.array,
        normalizer: mx.array,
        mean: mx.array,
        window: int | None,
    ) -> list[mx.array]:
        """The cotangents for `_attend_in_parts`: all (N, heads, d), the last two arguments (N, H)."""
        blocks_of_prompts, blocks_of_completions = self._blocks(q.shape[1] // k.shape[1], window)
        each = (q, k, v, normalizer, o_grad, mean)
        prompts, completions = zip(*(mx.split(x, [self._prompts.count]) for x in each), strict=True)
        q, k, v, *rest = (self._prompts.spread(x).swapaxes(1, 2) for x in prompts)
        P, Q = self._prompts.width, self._prompts.rows
        of_prompts = gradient_in_blocks(q, k, v, scale, blocks_of_prompts, *rest)
        if not self._completions.count:
            return [self._prompts.collect(x.swapaxes(1, 2)) for x in of_prompts]
        q, own_k, own_v, *rest = (self._completions.spread(x).swapaxes(1, 2) for x in completions)
        k, v = self._behind_prompts(k, own_k), self._behind_prompts(v, own_v)
        dq, dk, dv = gradient_in_blocks(q, k, v, scale, blocks_of_completions, *rest)
        to_prompts = [mx.sum(x[:, :, :P].reshape(Q, -1, *x[:, :, :P].shape[1:]), axis=1) for x in (dk, dv)]
        of_prompts = (of_prompts[0], of_prompts[1] + to_prompts[0], of_prompts[2] + to_prompts[1])
        return [
            mx.concatenate([self._prompts.collect(a.swapaxes(1, 2)), self._completions.collect(b.swapaxes(1, 2))])
            for a, b in zip(of_prompts, (dq, dk[:, :, P:], dv[:, :, P:]), strict=True)
        ]

    def _behind_prompts(self, prompts: mx.array, own: mx.array) -> mx.array:
        """Prompts (Q, K, P, d) and own places (Q·G, K, T, d) → (Q·G, K, P + T, d)."""
        Q, K, P, d = prompts.shape
        each = mx.broadcast_to(prompts[:, None], (Q, own.shape[0] // Q, K, P, d))
        return mx.concatenate([each.reshape(-1, K, P, d), own], axis=2)


def _attend_in_whole_rows(
    rows: WholeRows, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None
) -> tuple[mx.array, mx.array]:
    """All (N, heads, d); what comes, and `Attended.normalizer`. Each completion with a prompt of its own, which suits
    fused kernels.

    Padding is on the right, where nobody sees it, and may hold anything.
    """
    if can_serve(q.shape[-1], q.dtype):
        return flash_attention(q, k, v, rows.rows, scale=scale, window=window)
    q, k, v = (differentiable_read(x, rows.spread, rows.spread_back).swapaxes(1, 2) for x in (q, k, v))
    o = attention_of_rows(q, k, v, scale, window)
    return differentiable_read(o.swapaxes(1, 2), rows.collect, rows.collect_back), mx.zeros(0)


def _gradient_in_whole_rows(
    rows: WholeRows,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    o_grad: mx.array,
    attended: tuple[mx.array, mx.array],
    window: int | None,
    *,
    exact: bool,
) -> list[mx.array]:
    """The cotangents for `_attend_in_whole_rows`, from that of its result, and what it gave: all (N, heads, d). Those
    that are not `exact` may have other bits each time."""
    o, normalizer = attended
    if normalizer.size:
        dq, *of_keys = flash_gradient(q, k, v, rows.rows, o_grad, o, normalizer, scale=scale, window=window)
        return [dq, *map(rows.spread_back, of_keys)]
    q, k, v, o = (rows.spread(x).swapaxes(1, 2) for x in (q, k, v, o))
    o_grad = rows.collect_back(o_grad).swapaxes(1, 2)
    grads = gradient_of_rows(q, k, v, scale, o_grad, o if exact else None, window)
    return [rows.spread_back(x.swapaxes(1, 2)) for x in grads]


def _by_token(x: mx.array) -> mx.array:
    """(1, heads, N, d) → (N, heads, d); not by `x[0]`, which copies."""
    return x.squeeze(0).swapaxes(0, 1)


def distinct_prompts(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The prompts with neighbours that are equal taken as one, and how many each stands for."""
    distinct: list[Sequence[int]] = []
    sizes: list[int] = []
    for prompt in prompts:
        if distinct and (prompt is distinct[-1] or list(prompt) == list(distinct[-1])):
            sizes[-1] += 1
        else:
            distinct.append(prompt)
            sizes.append(1)
    return distinct, sizes


def _row_order(lengths: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Between the order of the targets, all first tokens before all others, and that of the rows: both ways, (M,)."""
    first, other = 0, sum(1 for length in lengths if length)
    to_rows: list[int] = []
    for length in lengths:
        if length:
            to_rows += [first, *range(other, other + length - 1)]
            first += 1
            other += length - 1
    to_targets = [0] * len(to_rows)
    for row, target in enumerate(to_rows):
        to_targets[target] = row
    return mx.array(to_rows, dtype=mx.int32), mx.array(to_targets, dtype=mx.int32)
