"""Prompts and completions as one row of tokens without padding, in which completions of one prompt share it.

What acts on single tokens (matrices, norms, the head over the vocabulary) meets N real tokens and no padding, and a
prompt that neighbouring completions share is computed once. Only attention lays the tokens out in rectangles. The last
token of a completion foretells nothing and is left out. Knows token ids and places, nothing of weights or losses.

Shapes: R completions of Q distinct prompts, at most G of each; P longest prompt, T longest completion without its last
token; N tokens, M completion tokens to be foretold; H query heads, K key/value heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.policy.network.cpu_attention import Block, attention, attention_gradient, blocks
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.gpu_attention import attention as attention_of_rows
from troupe.policy.network.gpu_attention import attention_gradient as gradient_of_rows

Read = Callable[[mx.array], mx.array]

SQUARE = 128
"""MLX 0.32 has a fused gradient of attention on CUDA where as many queries as keys are a multiple of this."""


def padded(length: int) -> int:
    """Places of a row of so many tokens, where whole rows attend."""
    return -(-length // SQUARE) * SQUARE


class Cells:
    """A rectangle whose rows are filled from the left, and the same n cells one after the other, without the padding.

    Both ways of laying them out are reads, each the gradient of the other: no sums, so no order of adding up.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: how many cells each row fills."""
        rows, self.width = len(lengths), max(1, *lengths)
        self.rows = rows
        self.count = sum(lengths)
        self.is_full = self.count == rows * self.width
        if not self.is_full:
            columns = mx.arange(self.width)
            self.is_real = columns < mx.array(list(lengths))[:, None]
            starts = [0, *accumulate(lengths)][:-1]
            self._cell_of = mx.where(self.is_real, mx.array(starts)[:, None] + columns, 0)
            self._place_of = mx.array(
                list(chain.from_iterable(range(i * self.width, i * self.width + n) for i, n in enumerate(lengths))),
                dtype=mx.int32,
            )

    def spread(self, x: mx.array) -> mx.array:
        """(n, …) → (rows, width, …), 0 in the padding."""
        if self.is_full:
            return x.reshape(self.rows, self.width, *x.shape[1:])
        return _read(x, self._spread, self._collect)

    def collect(self, x: mx.array) -> mx.array:
        """(rows, width, …) → (n, …)."""
        if self.is_full:
            return x.reshape(-1, *x.shape[2:])
        return _read(x, self._collect, self._spread)

    def _spread(self, x: mx.array) -> mx.array:
        nothing = mx.array(0, x.dtype)
        if self.count == 0:
            return mx.broadcast_to(nothing, (self.rows, self.width, *x.shape[1:]))
        is_real = self.is_real.reshape(*self.is_real.shape, *[1] * (x.ndim - 1))
        return mx.where(is_real, _take(x, self._cell_of), nothing)

    def _collect(self, x: mx.array) -> mx.array:
        return _take(x.reshape(-1, *x.shape[2:]), self._place_of)


def _read(x: mx.array, read: Read, gradient: Read) -> mx.array:
    """read(x), where gradient(cotangent) is the cotangent of x."""
    function = mx.custom_function(read)

    @function.vjp
    def vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return gradient(cotangent)

    return cast(mx.array, function(x))


class Attended(NamedTuple):
    """What came of attention, (1, H, N, d), and where it was written out log Σ e^score, float32 (N, H); else ()."""

    o: mx.array
    normalizer: mx.array


class Packing:
    """Where each token of R prompts and completions stands in one row (1, N); an `Attention` over that row."""

    def __init__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
        """R prompts of at least one id, R completions. Neighbouring equal prompts are taken as one."""
        distinct, sizes = _distinct(prompts)
        G = max(sizes)
        inner = [max(0, len(completion) - 1) for completion in completions]
        rows = iter(inner)
        lengths = [len(prompt) for prompt in distinct]
        self._prompts = Cells(lengths)
        self._completions = Cells([next(rows) if g < size else 0 for size in sizes for g in range(G)])
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
        self._known_blocks: tuple[list[Block], list[Block]] | None = None
        self._whole_rows = None if is_on_cpu() else _WholeRows(lengths, sizes, inner)

    def _blocks(self, heads_per_key: int) -> tuple[list[Block], list[Block]]:
        """Who sees whom: prompts among themselves, and completions their prompts and themselves. The same each time."""
        if self._known_blocks is None:
            P, T = self._prompts.width, self._completions.width
            real = None
            if not self._prompts.is_full:
                own = mx.ones((self._prompts.rows, T), mx.bool_)
                G = self._completions.rows // self._prompts.rows
                real = mx.repeat(mx.concatenate([self._prompts.is_real, own], axis=1), G, axis=0)
            self._known_blocks = blocks(P, P, heads_per_key), blocks(T, P + T, heads_per_key, real)
        return self._known_blocks

    def sources(self, hidden: mx.array) -> mx.array:
        """Hidden states (N, D) → those that foretell the targets, (M, D)."""
        prompts, completions = mx.split(hidden, [self._prompts.count])
        last = prompts[self._last][:, None]
        each = self._members.collect(mx.broadcast_to(last, (*last.shape[:1], self._members.width, hidden.shape[-1])))
        return mx.concatenate([self._begun.collect(each[:, None]), completions])

    def in_rows(self, values: mx.array) -> mx.array:
        """One number a target, (M,) → (R, longest completion), 0 in the padding."""
        ordered = _read(values, lambda x: x[self._in_row_order], lambda x: x[self._in_target_order])
        return self._rows.spread(ordered)

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        """See `Attention.attend`: all (1, heads, N, d)."""
        if self._whole_rows is not None:
            return self.attend_keeping(q, k, v, scale)[0]

        @mx.custom_function
        def attended(q: mx.array, k: mx.array, v: mx.array) -> Any:
            return self.attend_keeping(q, k, v, scale)

        @attended.vjp
        def vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
            q, k, v = primals
            return self.attend_gradient(q, k, v, scale, cotangents[0], outputs)

        return cast("tuple[mx.array, mx.array]", attended(q, k, v))[0]

    def attend_keeping(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> Attended:
        """What `attend` gives, with what `attend_gradient` can make use of."""
        q, k, v = (_by_token(x) for x in (q, k, v))
        if self._whole_rows is not None:
            o = _attend_in_whole_rows(self._whole_rows, q, k, v, scale)
            return Attended(o.swapaxes(0, 1)[None], mx.zeros(0))
        o, normalizer = self._attend_in_parts(q, k, v, scale)
        return Attended(o.swapaxes(0, 1)[None], normalizer)

    def _attend_in_parts(self, q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, mx.array]:
        """All (N, heads, d). Prompts among themselves, then completions to both: least work without fused kernels."""
        of_prompts, of_completions = self._blocks(q.shape[1] // k.shape[1])
        prompts, completions = zip(*(mx.split(x, [self._prompts.count]) for x in (q, k, v)), strict=True)
        q, k, v = (self._prompts.spread(x).swapaxes(1, 2) for x in prompts)  # (Q, heads, P, d)
        found = attention(q, k, v, scale, of_prompts)
        outputs = [[self._prompts.collect(x.swapaxes(1, 2)) for x in found]]
        if self._completions.count:
            q, own_k, own_v = (self._completions.spread(x).swapaxes(1, 2) for x in completions)
            k, v = self._behind_prompts(k, own_k), self._behind_prompts(v, own_v)
            found = attention(q, k, v, scale, of_completions)
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
        attended: Sequence[mx.array] | None = None,
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The cotangents of q, k and v from that of what `attend` gave; by hand, because kernels are fused so.

        `attended` is what `attend_keeping` gave; without it, it is computed again where it is needed.
        """
        if self._whole_rows is not None:
            q, k, v, o_grad = (_by_token(x) for x in (q, k, v, o_grad))
            grads = _gradient_in_whole_rows(self._whole_rows, q, k, v, scale, o_grad)
        else:
            o, normalizer = attended or self.attend_keeping(q, k, v, scale)
            mean = mx.sum(_by_token(o_grad).astype(mx.float32) * _by_token(o), axis=-1)
            q, k, v, o_grad = (_by_token(x) for x in (q, k, v, o_grad))
            grads = self._gradient_in_parts(q, k, v, scale, o_grad, normalizer, mean)
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
    ) -> list[mx.array]:
        """All (N, heads, d), the last two (N, H); see `_attend_in_parts` and `attention_gradient`."""
        blocks_of_prompts, blocks_of_completions = self._blocks(q.shape[1] // k.shape[1])
        each = (q, k, v, normalizer, o_grad, mean)
        prompts, completions = zip(*(mx.split(x, [self._prompts.count]) for x in each), strict=True)
        q, k, v, *rest = (self._prompts.spread(x).swapaxes(1, 2) for x in prompts)
        P, Q = self._prompts.width, self._prompts.rows
        of_prompts = attention_gradient(q, k, v, scale, blocks_of_prompts, *rest)
        if not self._completions.count:
            return [self._prompts.collect(x.swapaxes(1, 2)) for x in of_prompts]
        q, own_k, own_v, *rest = (self._completions.spread(x).swapaxes(1, 2) for x in completions)
        k, v = self._behind_prompts(k, own_k), self._behind_prompts(v, own_v)
        dq, dk, dv = attention_gradient(q, k, v, scale, blocks_of_completions, *rest)
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


def _attend_in_whole_rows(rows: _WholeRows, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """All (N, heads, d). Each completion with a prompt of its own, which suits fused kernels.

    Padding is on the right, where nobody sees it, and may hold anything.
    """
    q, k, v = (_read(x, rows.spread, rows.spread_back).swapaxes(1, 2) for x in (q, k, v))
    o = attention_of_rows(q, k, v, scale)
    return _read(o.swapaxes(1, 2), rows.collect, rows.collect_back)


def _gradient_in_whole_rows(
    rows: _WholeRows, q: mx.array, k: mx.array, v: mx.array, scale: float, o_grad: mx.array
) -> list[mx.array]:
    """All (N, heads, d); see `_attend_in_whole_rows`."""
    q, k, v = (rows.spread(x).swapaxes(1, 2) for x in (q, k, v))
    grads = gradient_of_rows(q, k, v, scale, rows.collect_back(o_grad).swapaxes(1, 2))
    return [rows.spread_back(x.swapaxes(1, 2)) for x in grads]


def _by_token(x: mx.array) -> mx.array:
    """(1, heads, N, d) → (N, heads, d); not by `x[0]`, which copies."""
    return x.squeeze(0).swapaxes(0, 1)


def _take(x: mx.array, index: mx.array) -> mx.array:
    """x[index] for (n, …), without gradient: rows are moved as words of 8 bytes, which MLX does three times faster."""
    rows = x.reshape(x.shape[0], -1)
    if rows.shape[1] * x.itemsize % 8 == 0 and not is_on_cpu():
        rows = mx.view(rows, mx.uint64)
    return mx.view(rows[index], x.dtype).reshape(*index.shape, *x.shape[1:])


class _WholeRows:
    """Between packed tokens and R rows of a prompt and its completion, padded on the right: by reads, and sums over G.

    A packed prompt token stands in the rows of all its completions; of what the rows say of it, the first row's is
    taken. Each read has its gradient beside it.
    """

    def __init__(self, lengths: Sequence[int], sizes: Sequence[int], inner: Sequence[int]) -> None:
        """Tokens of each of Q prompts, completions of each, tokens of each of R completions."""
        starts = [0, *accumulate(lengths)]
        own = [starts[-1], *(starts[-1] + n for n in accumulate(inner))]
        prompt_of = [q for q, size in enumerate(sizes) for _ in range(size)]
        rows = [[*range(starts[q], starts[q + 1]), *range(own[r], own[r + 1])] for r, q in enumerate(prompt_of)]
        S, G = padded(max(map(len, rows))), max(sizes)
        self._token_of = mx.array([row + [0] * (S - len(row)) for row in rows], dtype=mx.int32)
        first = [r == 0 or q != prompt_of[r - 1] for r, q in enumerate(prompt_of)]
        speaks = [[first[r]] * lengths[q] + [True] * inner[r] for r, q in enumerate(prompt_of)]
        self._speaks = mx.array([row + [False] * (S - len(row)) for row in speaks])[..., None, None]
        row_of = [0, *accumulate(sizes)]
        own_places = [r * S + lengths[q] + t for r, q in enumerate(prompt_of) for t in range(inner[r])]
        first_places = [row_of[q] * S + p for q, n in enumerate(lengths) for p in range(n)]
        self._places = mx.array(first_places + own_places, dtype=mx.int32)
        self._own_places = mx.array(own_places, dtype=mx.int32)
        members = mx.array(
            [[row_of[q] + min(g, size - 1) for g in range(G)] for q, size in enumerate(sizes)], dtype=mx.int32
        )
        of_token = mx.array([q for q, n in enumerate(lengths) for _ in range(n)], dtype=mx.int32)
        place_in_row = mx.array([p for n in lengths for p in range(n)], dtype=mx.int32)
        self._all_places = members[of_token] * S + place_in_row[:, None]  # (prompt tokens, G)
        self._is_member: mx.array | None = None
        if min(sizes) < G:
            self._is_member = (mx.arange(G) < mx.array(list(sizes))[:, None])[of_token][..., None, None]
        self._has_own = bool(own_places)

    def spread(self, x: mx.array) -> mx.array:
        """(N, heads, d) → (R, S, heads, d)."""
        return _take(x, self._token_of)

    def spread_back(self, x: mx.array) -> mx.array:
        """The gradient of `spread`: (R, S, heads, d) → (N, heads, d)."""
        flat = x.reshape(-1, *x.shape[2:])
        each = _take(flat, self._all_places)
        prompts = each[:, 0]
        if each.shape[1] > 1:
            if self._is_member is not None:
                each = mx.where(self._is_member, each, mx.array(0, x.dtype))
            prompts = mx.sum(each, axis=1)
        return mx.concatenate([prompts, _take(flat, self._own_places)]) if self._has_own else prompts

    def collect(self, x: mx.array) -> mx.array:
        """(R, S, heads, d) → (N, heads, d)."""
        return _take(x.reshape(-1, *x.shape[2:]), self._places)

    def collect_back(self, x: mx.array) -> mx.array:
        """The gradient of `collect`: (N, heads, d) → (R, S, heads, d)."""
        return mx.where(self._speaks, _take(x, self._token_of), mx.array(0, x.dtype))


def _distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
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
