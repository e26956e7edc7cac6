"""What rows hold of their own, each by itself: taken out of a decode's cache, put together anew, and read on.

A history is a `PromptCache` whose prompts are rows: keys and values (rows, K, P, d) a layer, padded on the right, and
the states of gated delta nets. What stands in the padding are numbers, but they mean nothing.
"""

from collections.abc import Sequence

import mlx.core as mx

from troupe.policy.decode.cache import PACED_TOKENS, PREFILL_TOKENS, DecodingCache, PromptCache
from troupe.policy.decode.prompts import ReadPrompts, of_prompts
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import (
    PORTION,
    Places,
    QueryBlock,
    attention_block_by_block,
    block_size,
    query_blocks,
)
from troupe.policy.network.delta import DeltaState
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import hidden_states
from troupe.policy.network.layouts import read_rows
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import Weights

_NOWHERE = 2**30
"""A position that no token has."""


class Departure:
    """Rows of a decode that leave it with all that they hold: their prompts and some of their own tokens."""

    def __init__(
        self, cache: DecodingCache, rows: Sequence[int], own: Sequence[int], states: Sequence[DeltaState]
    ) -> None:
        """`rows` by their places, `own` how many of their tokens count, `states` theirs, layer by layer, where there
        are gated delta nets."""
        slots = [row // cache.width for row in rows]
        before = [cache.prompt_lengths[slot] for slot in slots]
        self.history = PromptCache([a + b for a, b in zip(before, own, strict=True)])
        """What they hold, when every layer was taken."""
        self.history.states.layers = list(states)
        self._cache, self._gap = cache, _Gap(before, own)
        self._longest, self._P = max(own), max(before)
        self._slots, self._rows = mx.array(slots), mx.array(list(rows))

    def take(self, layer: int) -> None:
        """Take over one layer; they come in order."""
        whole = [x[:, :, : self._P][self._slots] for x in self._cache.prompts(layer)]
        if self._longest:
            own = (x[:, :, : self._longest][self._rows] for x in self._cache.own(layer))
            whole = [mx.concatenate(list(parts), axis=2) for parts in zip(whole, own, strict=True)]
        keys, values = map(self._gap.closed, whole)
        mx.eval(keys, values)
        self.history.keys.append(keys)
        self.history.values.append(values)


def split(parts: Sequence[PromptCache], orders: Sequence[Sequence[int]]) -> list[PromptCache]:
    """Put rows together anew: for each of `orders`, the rows at these places of all parts, one behind the other, padded
    to the longest. A row may be taken more than once. The parts are emptied layer by layer to spare memory."""
    if len(parts) == 1 and [list(order) for order in orders] == [list(range(len(parts[0].lengths)))]:
        return [parts[0]]
    lengths = [length for part in parts for length in part.lengths]
    found = [PromptCache([lengths[place] for place in order]) for order in orders]
    chosen = [mx.array(list(order)) for order in orders]
    longest = max(max(piece.lengths) for piece in found)
    for _ in range(len(parts[0].keys)):
        for name in ("keys", "values"):
            whole = mx.concatenate([_of_length(getattr(part, name).pop(0), longest) for part in parts])
            for piece, places in zip(found, chosen, strict=True):
                kept: list[mx.array] = getattr(piece, name)
                kept.append(mx.contiguous(whole[places][:, :, : max(piece.lengths)]))
                mx.eval(kept[-1])
    for _ in range(len(parts[0].states.layers)):
        window, memory = zip(*(part.states.layers.pop(0) for part in parts), strict=True)
        state = DeltaState(mx.concatenate(list(window)), mx.concatenate(list(memory)))
        for piece, places in zip(found, chosen, strict=True):
            piece.states.layers.append(state.of(places))
            mx.eval(piece.states.layers[-1])
    return found


def reading_portions(kept: Sequence[int], more: Sequence[int], heads: int) -> list[list[int]]:
    """Which rows are read on together: those with about as many new tokens. Rows have `kept` and read `more`."""
    found: list[list[int]] = []
    for row in sorted(range(len(more)), key=lambda row: more[row]):
        if found:
            together = [*found[-1], row]
            T, P = more[row], max(kept[other] for other in together)
            scores = len(together) * heads * min(T, block_size(T)) * (P + T)
            if len(together) * T <= PREFILL_TOKENS and scores <= PORTION:
                found[-1].append(row)
                continue
        found.append([row])
    return found


class HistoryCache(PromptCache):
    """Attention of new tokens, padded on the right, to what each row holds and to themselves. They are kept."""

    def __init__(self, held: PromptCache, more: Sequence[int]) -> None:
        """`more`: how many new tokens each row has, at least one; `held` is emptied layer by layer."""
        super().__init__([a + b for a, b in zip(held.lengths, more, strict=True)])
        self.offset = mx.array(held.lengths, dtype=mx.int32)
        self.states.go_on(held.states, more)
        self._held, self._gap = held, _Gap(held.lengths, more)
        self._blocks: dict[int | None, list[QueryBlock]] = {}

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        P = max(self._held.lengths)
        keys = mx.concatenate([self._held.keys.pop(0)[:, :, :P], k], axis=2)
        values = mx.concatenate([self._held.values.pop(0)[:, :, :P], v], axis=2)
        self.keys.append(self._gap.closed(keys))
        self.values.append(self._gap.closed(values))
        o = self._attended(q, keys, values, scale, window)
        if k.shape[0] * keys.shape[2] >= PACED_TOKENS:
            mx.async_eval(self.keys[-1], self.values[-1], o)  # type: ignore[no-untyped-call]
            mx.eval(self.keys[-2:-1])  # as for prompts that are computed whole
        return o

    def _attended(self, q: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        (B, H, T, _), S = q.shape, keys.shape[2]
        window = None if window is None or window >= S else window
        if is_on_cpu():
            if window not in self._blocks:
                self._blocks[window] = self._query_blocks(T, S, H // keys.shape[1], window)
            return attention_block_by_block(q, keys, values, scale, self._blocks[window])
        found = []
        new, history, is_there = self._positions(T, S)
        at = mx.concatenate([mx.where(is_there, history, _NOWHERE), new], axis=1)[:, None, None, :]
        for start in range(0, T, size := max(1, PORTION // (B * H * S))):
            queries = new[:, None, start : start + size, None]
            mask = at <= queries
            if window is not None:
                mask = mx.logical_and(mask, at > queries - window)
            part = q[:, :, start : start + size]
            found.append(mx.fast.scaled_dot_product_attention(part, keys, values, scale=scale, mask=mask))
            if size < T:
                mx.eval(found[-1])  # the scores of one part after the other
        return found[0] if len(found) == 1 else mx.concatenate(found, axis=2)

    def _query_blocks(self, T: int, S: int, heads_per_key: int, window: int | None) -> list[QueryBlock]:
        new, history, is_there = self._positions(T, S)
        real = mx.concatenate([is_there, new >= 0], axis=1) if min(self._held.lengths) < S - T else None
        at = mx.concatenate([mx.broadcast_to(history, is_there.shape), new], axis=1)
        return query_blocks(T, S, heads_per_key, real, None if window is None else Places(new, at, window))

    def _positions(self, T: int, S: int) -> tuple[mx.array, mx.array, mx.array]:
        """Of new tokens (B, T), of places of histories (S − T,), and which of the latter have a token (B, S − T)."""
        before, history = mx.array(self._held.lengths)[:, None], mx.arange(S - T)
        return before + mx.arange(T), history, history < before


def read_on(
    config: NetworkConfig,
    weights: Weights,
    held: PromptCache,
    news: Sequence[Sequence[int]],
    *,
    records_experts: bool = False,
) -> ReadPrompts:
    """Read new tokens of rows, at least one of each, behind what they hold, which is emptied."""
    more = [len(ids) for ids in news]
    T = max(more)
    ids = mx.array([[*ids, *[0] * (T - len(ids))] for ids in news])
    cache, routes = HistoryCache(held, more), Routes(config) if records_experts else None
    states = hidden_states(config, weights, ids, attention=cache, routes=routes)
    last = mx.take_along_axis(states, mx.array(more)[:, None, None] - 1, axis=1)[:, 0]
    recorded = [] if routes is None else [routes.chosen]
    mx.eval(last, cache.arrays, recorded)
    return ReadPrompts(cache, last, of_prompts(recorded, more))


class _Gap:
    """Between the first tokens of rows, of which the longest has P, and those that follow from place P on."""

    def __init__(self, before: Sequence[int], more: Sequence[int]) -> None:
        """Of each row so many stand before the gap and behind it."""
        self._longest = max(a + b for a, b in zip(before, more, strict=True))
        self._places: mx.array | None = None
        if set(before) != {P := max(before)}:
            first = mx.array(list(before))[:, None]
            both, place = first + mx.array(list(more))[:, None], mx.arange(self._longest)
            self._places = mx.where(place < first, place, mx.where(place < both, place + (P - first), 0))

    def closed(self, x: mx.array) -> mx.array:
        """(rows, K, P + T, d) → the same without the gap, (rows, K, longest, d)."""
        if self._places is None:
            return mx.contiguous(x[:, :, : self._longest])
        n, K, S, d = x.shape
        heads = mx.arange(n * K).reshape(n, K, 1) * S
        return read_rows(x.reshape(n * K * S, d), heads + self._places[:, None])


def _of_length(x: mx.array, length: int) -> mx.array:
    """(rows, K, P, d) cut or padded to so many places."""
    return x[:, :, :length] if x.shape[2] >= length else mx.pad(x, [(0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)])
