"""Keys and values of earlier tokens, for decoding many rows that share prompts.

A prompt's keys and values are computed once and lie once in memory, in a *slot*; the `width` rows of that slot read
them together, as one matrix product. What each row has sampled itself lies in preallocated blocks, written in place.
All rows are equally far into their completions, so one length serves all.

Shapes: S slots, w rows a slot, B = S·w rows in slot order, H query heads, K key/value heads, R = H/K, d head size,
P longest prompt, N places for own tokens.

Source of the two-part attention: shared-prefix decoding as in Hydragen (arXiv:2402.05099), here with one softmax.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from troupe.policy.decode.apart import attend_apart
from troupe.policy.decode.states import PromptStates, RowStates
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import Places, attention_block_by_block, attention_mask, query_blocks
from troupe.policy.network.delta import DeltaInputs, DeltaSizes
from troupe.policy.network.elementwise import is_fast_here, is_on_cpu
from troupe.policy.network.forward import WholeRows, hidden_states
from troupe.policy.network.routes import Routes
from troupe.policy.network.tensors import Weights

PREFILL_TOKENS = 8192
"""Most prompt tokens, padding included, that are prefilled at once."""
WHOLE_PROMPT = 2048
"""Up to so many places a portion of prompts is computed in one piece, also where scores are written out."""
PIECE_TOKENS = 1024
"""So many tokens, padding included, are computed at once of prompts that are longer."""
BLOCK = 64
"""Places by which the room for own tokens grows."""
PACED_TOKENS = 1024
"""So many prompt tokens are worth waiting for one layer of them after the other."""


def piece_length(prompts: int, longest: int, *, writes_scores: bool) -> int:
    """How many tokens of each of the `prompts` of a portion, padded to `longest`, are computed at once.

    Where scores are written out they grow with the square of what is computed at once; a kernel that does without
    takes a portion whole, however long.
    """
    if not writes_scores or longest <= WHOLE_PROMPT:
        return longest
    return max(1, PIECE_TOKENS // prompts)


def prefill_chunks(lengths: Sequence[int]) -> Iterator[range]:
    """Split prompts of these lengths, in order, into runs of at most PREFILL_TOKENS places each, padding included."""
    start = longest = 0
    for index, length in enumerate(lengths):
        if index > start and (index - start + 1) * max(longest, length) > PREFILL_TOKENS:
            yield range(start, index)
            start = index
            longest = 0
        longest = max(longest, length)
    yield range(start, len(lengths))


class PromptCache(WholeRows):
    """Attention within whole prompts, padded on the right, that keeps their keys and values."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: how many tokens each prompt has."""
        self.lengths = list(lengths)
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []
        self.states = PromptStates(lengths)

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        return [*self.keys, *self.values, *self.states.arrays]

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        """Keeps what each prompt leaves behind."""
        return self.states.recur(layer, inputs, sizes, 0)

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        """Keeps k and v, (prompts, K, P, d), of one layer after the other."""
        self.keys.append(mx.contiguous(k))  # not a view, which would hold queries and all
        self.values.append(mx.contiguous(v))
        if k.shape[0] * k.shape[2] >= PACED_TOKENS:
            mx.async_eval(self.keys[-1], self.values[-1])  # type: ignore[no-untyped-call]
            mx.eval(self.keys[-2:-1])  # a layer ahead of the device, not more: each holds its whole inside
        return super().attend(layer, q, k, v, scale, window)


class PiecedPromptCache(PromptCache):
    """The same for prompts that are computed some tokens at a time: these see all before them.

    Beside keys and values no more than a piece's scores are held, on a CPU those of a block of its queries: they grow
    with a prompt's length, not with its square. `forward` takes the pieces in order.
    """

    offset: int

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: how many tokens each prompt has, padding not counted."""
        super().__init__(lengths)
        self.offset = 0
        self._unseen: int | None = None  # the layer whose results only hidden states need, where nobody wants these

    def forward(
        self, config: NetworkConfig, weights: Weights, ids: mx.array, routes: Routes | None = None
    ) -> dict[int, mx.array]:
        """The next T ids of every prompt (prompts, T) → of each prompt that ends among them, by its place, the hidden
        state of its last token (D,). All of it is computed."""
        start, stop = self.offset, self.offset + ids.shape[1]
        ending = [place for place, length in enumerate(self.lengths) if start < length <= stop]
        is_seen = ending or routes is not None or config.layer(config.num_hidden_layers - 1).is_delta
        self._unseen = None if is_seen else config.attention_layers - 1
        states = hidden_states(config, weights, ids, attention=self, routes=routes)
        last = {place: states[place, self.lengths[place] - 1 - start] for place in ending}
        mx.eval(self.arrays, last)
        self.offset = stop
        return last

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        keys, values = self._write(self.keys, layer, k), self._write(self.values, layer, v)
        mx.async_eval(self.keys[layer], self.values[layer])  # type: ignore[no-untyped-call]
        mx.eval(self.keys[layer - 1 : layer])  # as for prompts that are computed whole
        if layer == self._unseen:
            return q
        T, S, heads_per_key = q.shape[2], keys.shape[2], q.shape[1] // k.shape[1]
        if not is_on_cpu():
            mask = attention_mask(T, S, window)
            return mx.fast.scaled_dot_product_attention(q, keys, values, scale=scale, mask=mask)
        places = None
        if window is not None and window < S:
            at = mx.arange(S)[None]
            places = Places(at[:, -T:], at, window)
        among = query_blocks(T, S, heads_per_key, places=places)
        return attention_block_by_block(q, keys, values, scale, among, window)

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        return self.states.recur(layer, inputs, sizes, self.offset)

    def _write(self, kept: list[mx.array], layer: int, new: mx.array) -> mx.array:
        """Put (prompts, K, T, d) at the next places of one layer → everything so far."""
        start, stop = self.offset, self.offset + new.shape[2]
        if layer == len(kept):
            kept.append(mx.zeros((*new.shape[:2], max(self.lengths), new.shape[3]), new.dtype))
        buffer = kept.pop(layer)  # the update can reuse the memory only where nothing else refers to it
        buffer[:, :, start:stop] = new
        kept.insert(layer, buffer)
        return buffer[:, :, :stop]


def join_prompts(parts: Sequence[PromptCache]) -> PromptCache:
    """Several caches as one, padded to the longest prompt; the parts are emptied layer by layer to spare memory."""
    if len(parts) == 1:
        return parts[0]
    whole = PromptCache([length for part in parts for length in part.lengths])
    longest = max(whole.lengths)
    for _ in range(len(parts[0].keys)):
        for kept, pieces in ((whole.keys, [p.keys for p in parts]), (whole.values, [p.values for p in parts])):
            layer = [piece.pop(0) for piece in pieces]
            padded = [mx.pad(x, [(0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0)]) for x in layer]
            kept.append(mx.concatenate(padded))
            mx.eval(kept[-1])
    whole.states.join([part.states for part in parts])
    return whole


class DecodingCache:
    """Attention of one new token a row to the row's prompt and to its own earlier tokens."""

    def __init__(self, prompts: PromptCache, width: int, limit: int) -> None:
        """`width` rows for every prompt, none of which will have more than `limit` tokens of its own."""
        self.width = width
        self.length = 0
        """Own tokens that every row holds."""
        self._limit = limit
        self.states = RowStates(prompts.states, width)
        self._prompt_lengths = prompts.lengths
        self._prompt_keys = prompts.keys
        self._prompt_values = prompts.values
        self._keys: list[mx.array] = []  # (S, K, w, N, d) a layer
        self._values: list[mx.array] = []
        self._far: tuple[tuple[int, int], mx.array] | None = None
        self._describe_prompts()

    @property
    def offset(self) -> int | mx.array:
        """Rotary position of the next token: one for all where all prompts are equally long, else (B,)."""
        if self._row_lengths is None:
            return self._prompt_lengths[0] + self.length
        return self._row_lengths + self.length

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held, to be evaluated with the token that was made last."""
        return [*self._prompt_keys, *self._prompt_values, *self._keys, *self._values, *self.states.arrays]

    @property
    def prompt_lengths(self) -> Sequence[int]:
        """How many tokens the prompt of each slot has."""
        return self._prompt_lengths

    @property
    def layers(self) -> int:
        """How many layers have keys and values here."""
        return len(self._prompt_keys)

    def prompts(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the slots' prompts in one layer, (S, K, P, d)."""
        return self._prompt_keys[layer], self._prompt_values[layer]

    def own(self, layer: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the rows' own tokens in one layer, (B, K, N, d), when there are any."""
        keys, values = (x[layer].transpose(0, 2, 1, 3, 4) for x in (self._keys, self._values))
        return keys.reshape(-1, *keys.shape[2:]), values.reshape(-1, *values.shape[2:])

    def empty(self, layer: int) -> None:
        """Let go of what one layer holds; nothing is decoded any more."""
        for kept in (self._prompt_keys, self._prompt_values, self._keys, self._values):
            kept[layer : layer + 1] = [mx.array(0)] if layer < len(kept) else []

    def forward(self, config: NetworkConfig, weights: Weights, ids: mx.array, routes: Routes | None = None) -> mx.array:
        """The next token of every row (B,) → hidden states (B, D); the token is counted."""
        hidden = hidden_states(config, weights, ids[:, None], attention=self, routes=routes)[:, 0]
        self.advance()
        return hidden

    def attend(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None = None
    ) -> mx.array:
        """T = 1. Call `advance` when every layer has seen the token."""
        prompt_keys, prompt_values = self._prompt_keys[layer], self._prompt_values[layer]
        S, K, P, d = prompt_keys.shape
        B, H = q.shape[:2]
        w, R = self.width, H // K
        keys = self._write(self._keys, layer, k.reshape(S, w, K, d).transpose(0, 2, 1, 3))
        values = self._write(self._values, layer, v.reshape(S, w, K, d).transpose(0, 2, 1, 3))
        q = (q * scale).reshape(S, w, K, R, d).transpose(0, 2, 1, 3, 4)
        hidden = self._padding
        if window is not None:
            hidden = self._hidden_from(window)
            keys, values = keys[..., -window:, :], values[..., -window:, :]
        if is_fast_here(q):
            o = attend_apart(q, prompt_keys, prompt_values, keys, values, hidden)
            return o.transpose(0, 2, 1, 3, 4).reshape(B, H, 1, d)
        to_prompt = q.reshape(S, K, w * R, d) @ prompt_keys.swapaxes(-1, -2)
        if hidden is not None:
            to_prompt = to_prompt + hidden
        to_own = q @ keys.swapaxes(-1, -2)
        scores = mx.concatenate([to_prompt.reshape(S, K, w, R, P), to_own], axis=-1)
        shares = mx.softmax(scores, axis=-1, precise=True)
        o = (shares[..., :P].reshape(S, K, w * R, P) @ prompt_values).reshape(S, K, w, R, d)
        o = o + shares[..., P:] @ values
        return o.transpose(0, 2, 1, 3, 4).reshape(B, H, 1, d)

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        """T = 1."""
        return self.states.recur(layer, inputs, sizes)

    def advance(self) -> None:
        """Count the token that every layer has just seen."""
        self.length += 1

    def select(
        self, slots: Sequence[int], rows: Sequence[int], width: int, before: Callable[[int], None] | None = None
    ) -> None:
        """Keep only `rows` (indexes into the B of now, `width` for each slot to be) of the prompts in `slots`. `before`
        is called before each layer is touched, one after the other."""
        whole = list(range(len(self._prompt_lengths)))
        chosen, picked = None if list(slots) == whole else mx.array(list(slots)), mx.array(list(rows))
        for layer in range(self.layers):
            if before is not None:
                before(layer)
            arrays = self._select(layer, chosen, picked, (len(slots), width))
            if before is not None:
                mx.eval(arrays)
        self._prompt_lengths = [self._prompt_lengths[slot] for slot in slots]
        self.states.select(rows)
        self.width = width
        self._describe_prompts()

    def _select(self, layer: int, slots: mx.array | None, rows: mx.array, shape: tuple[int, int]) -> list[mx.array]:
        """The same in one layer; None: the prompts of all slots, in their order. → What became of its arrays."""
        for prompts in (self._prompt_keys, self._prompt_values) if slots is not None else ():
            prompts[layer] = prompts[layer][slots]
        for kept in (self._keys, self._values) if layer < len(self._keys) else ():
            S, K, w, N, d = kept[layer].shape
            picked = kept[layer].transpose(0, 2, 1, 3, 4).reshape(S * w, K, N, d)[rows]
            kept[layer] = mx.contiguous(picked.reshape(*shape, K, N, d).transpose(0, 2, 1, 3, 4))
        return [
            kept[layer]
            for kept in (self._prompt_keys, self._prompt_values, self._keys, self._values)
            if layer < len(kept)
        ]

    def _hidden_from(self, window: int) -> mx.array | None:
        """The additive mask of prompt tokens that are padding, or too far back for the next token, (S, 1, 1, P); None
        where there are none."""
        if max(self._prompt_lengths) + self.length < window:
            return self._padding
        if self._far is None or self._far[0] != (window, self.length):
            seen_from = mx.array(self._prompt_lengths)[:, None] + (self.length + 1 - window)
            dtype = self._prompt_keys[0].dtype
            far = mx.arange(self._prompt_keys[0].shape[2]) < seen_from
            mask = mx.where(far, mx.array(-math.inf, dtype), mx.array(0, dtype))[:, None, None]
            self._far = (window, self.length), mask if self._padding is None else mask + self._padding
        return self._far[1]

    def _describe_prompts(self) -> None:
        """Positions and the additive mask of the padding, (S, 1, 1, P); neither where all prompts are equally long."""
        lengths = self._prompt_lengths
        self._far = None
        self._row_lengths: mx.array | None = None
        self._padding: mx.array | None = None
        P, dtype = self._prompt_keys[0].shape[2], self._prompt_keys[0].dtype
        if min(lengths) < P:
            padded = mx.arange(P) >= mx.array(lengths)[:, None]
            self._padding = mx.where(padded, mx.array(-math.inf, dtype), mx.array(0, dtype))[:, None, None]
        if min(lengths) < max(lengths):
            self._row_lengths = mx.repeat(mx.array(lengths), self.width)

    def _write(self, kept: list[mx.array], layer: int, new: mx.array) -> mx.array:
        """Put (S, K, w, d) at the next place of one layer → everything so far, (S, K, w, length + 1, d)."""
        if layer == len(kept) or kept[layer].shape[3] == self.length:
            more = max(1, min(BLOCK, self._limit - self.length))
            room = mx.zeros((*new.shape[:3], more, new.shape[-1]), new.dtype)
            kept[layer : layer + 1] = [mx.concatenate([kept[layer], room], axis=3) if self.length else room]
            mx.eval(kept[layer])  # before the next layer's: otherwise all of them are there twice
        buffer = kept[layer]
        del kept[layer : layer + 1]  # the update can reuse the memory only where nothing else refers to it
        buffer[:, :, :, self.length] = new
        kept.insert(layer, buffer)
        return buffer[:, :, :, : self.length + 1]
