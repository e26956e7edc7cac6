"""Two ways to lay packed tokens out in rectangles, whose rows are filled from the left, and back.

Every way is a read with its gradient beside it, which is a read too where no token stands twice, so that there is no
order of adding up.

Shapes: N tokens of Q prompts, then of R completions, at most G of a prompt; S places of a row; d head size.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import cast

import mlx.core as mx

from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.flash_attention import RowsOfTokens

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
        return differentiable_read(x, self._spread, self._collect)

    def collect(self, x: mx.array) -> mx.array:
        """(rows, width, …) → (n, …)."""
        if self.is_full:
            return x.reshape(-1, *x.shape[2:])
        return differentiable_read(x, self._collect, self._spread)

    def _spread(self, x: mx.array) -> mx.array:
        nothing = mx.array(0, x.dtype)
        if self.count == 0:
            return mx.broadcast_to(nothing, (self.rows, self.width, *x.shape[1:]))
        is_real = self.is_real.reshape(*self.is_real.shape, *[1] * (x.ndim - 1))
        return mx.where(is_real, read_rows(x, self._cell_of), nothing)

    def _collect(self, x: mx.array) -> mx.array:
        return read_rows(x.reshape(-1, *x.shape[2:]), self._place_of)


def differentiable_read(x: mx.array, read: Read, gradient: Read) -> mx.array:
    """read(x), where gradient(cotangent) is the cotangent of x."""
    function = mx.custom_function(read)

    @function.vjp
    def vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return gradient(cotangent)

    return cast(mx.array, function(x))


def read_rows(x: mx.array, index: mx.array) -> mx.array:
    """x[index] for (n, …), without gradient: rows are moved as words of 8 bytes, which MLX does three times faster."""
    rows = x.reshape(x.shape[0], -1)
    if rows.shape[1] * x.itemsize % 8 == 0 and not is_on_cpu():
        rows = mx.view(rows, mx.uint64)
    return mx.view(rows[index], x.dtype).reshape(*index.shape, *x.shape[1:])


class WholeRows:
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
        spans = [
            [0 if first[r] else lengths[q], lengths[q] + inner[r], lengths[q], starts[q], own[r] - lengths[q]]
            for r, q in enumerate(prompt_of)
        ]
        self.rows = RowsOfTokens(mx.array(spans, dtype=mx.int32), S)
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
        return read_rows(x, self._token_of)

    def spread_back(self, x: mx.array) -> mx.array:
        """The gradient of `spread`: (R, S, heads, d) → (N, heads, d)."""
        flat = x.reshape(-1, *x.shape[2:])
        each = read_rows(flat, self._all_places)
        prompts = each[:, 0]
        if each.shape[1] > 1:
            if self._is_member is not None:
                each = mx.where(self._is_member, each, mx.array(0, x.dtype))
            prompts = mx.sum(each, axis=1)
        return mx.concatenate([prompts, read_rows(flat, self._own_places)]) if self._has_own else prompts

    def collect(self, x: mx.array) -> mx.array:
        """(R, S, heads, d) → (N, heads, d)."""
        return read_rows(x.reshape(-1, *x.shape[2:]), self._places)

    def collect_back(self, x: mx.array) -> mx.array:
        """The gradient of `collect`: (N, heads, d) → (R, S, heads, d)."""
        return mx.where(self._speaks, read_rows(x, self._token_of), mx.array(0, x.dtype))
