"""The gated delta rule, in chunks of tokens and step by step, behind a short convolution: the core of gated delta nets.

A head has a memory S, a matrix that it writes with a key and reads with a query. A token lets it fade by e^g and then
corrects by the rate β what the memory answers to its key:

    S ← e^g·S,    S ← S + k ⊗ β(v − Sᵀk),    o = Sᵀq

The tokens of a chunk are computed together, by the WY form of such products: (I + A)⁻¹ of a chunk says what its tokens
write, A being how far later keys resemble earlier ones. Queries, keys and values come out of a causal convolution of
each channel by itself, and SiLU; queries and keys are then of length 1. All of it in float32.

Shapes: B rows, T tokens, C channels (queries, keys, values), k taps, K key heads, H value heads, of which H/K share a
key head; a, b sizes of a head's keys and values; n chunks of c tokens.

Sources: Gated Delta Networks (arXiv:2412.06464); chunks and the WY form: DeltaNet (arXiv:2406.06484).
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.policy.network.elementwise import WORTHWHILE, compiled

CHUNK = 64
"""Tokens of a chunk, a power of two."""
SPAN_TOKENS = 2048
"""So many tokens, of all rows together, are computed at once, but a chunk of each row at the least."""
SPAN_CHUNKS = 8
"""No more of a row, for what MLX makes of so many on the way back grows faster than they do."""
ROWS = SPAN_TOKENS // CHUNK
"""So many rows are computed at once where memory counts."""
_EPSILON = 1e-6


class DeltaSizes(NamedTuple):
    """Of a gated delta net."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def channels(self) -> int:
        """C, of queries, keys and values together."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def memory(self) -> int:
        """Numbers of the memories of a row."""
        return self.value_heads * self.key_dim * self.value_dim

    @property
    def state(self) -> int:
        """Numbers of all that a row carries on."""
        return self.memory + (self.taps - 1) * self.channels


class DeltaInputs(NamedTuple):
    """What a gated delta net makes of tokens before they meet."""

    mixed: mx.array
    """Queries, keys and values before the convolution, (B, T, C)."""
    decay: mx.array
    """g, at most 0, float32 (B, T, H); 0 where nothing fades."""
    rate: mx.array
    """β, float32 (B, T, H); 0 where nothing is written: a place with both 0 is none."""
    kernel: mx.array
    """Of the convolution, (C, k)."""

    def of(self, rows: slice) -> "DeltaInputs":
        """Those of some rows."""
        return DeltaInputs(self.mixed[rows], self.decay[rows], self.rate[rows], self.kernel)


class DeltaState(NamedTuple):
    """What tokens leave to those that follow them."""

    window: mx.array
    """The last k − 1 of `DeltaInputs.mixed`, float32 (B, k − 1, C)."""
    memory: mx.array
    """float32 (B, H, a, b)."""

    def of(self, rows: slice | mx.array) -> "DeltaState":
        """That of some rows."""
        return DeltaState(self.window[rows], self.memory[rows])

    @classmethod
    def empty(cls, rows: int, sizes: DeltaSizes) -> "DeltaState":
        """Before the first token."""
        window = mx.zeros((rows, sizes.taps - 1, sizes.channels))
        return cls(window, mx.zeros((rows, sizes.value_heads, sizes.key_dim, sizes.value_dim)))


def rates(a: mx.array, b: mx.array, log_rate: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Two products (…, H) and two vectors (H,) → decay −e^log_rate·softplus(a + bias) and rate σ(b), float32."""
    a, b, log_rate, bias = (x.astype(mx.float32) for x in (a, b, log_rate, bias))
    return -mx.exp(log_rate) * mx.logaddexp(a + bias, mx.array(0.0)), mx.sigmoid(b)


def gated_norm(o: mx.array, z: mx.array, scale: mx.array, eps: float) -> mx.array:
    """What the rule gives (…, H, b), and the product that gates it (…, H·b) → (…, H·b) in the type of the latter."""
    gate = z.astype(mx.float32)
    y = mx.fast.rms_norm(o.astype(mx.float32), scale.astype(mx.float32), eps)
    return (y.reshape(gate.shape) * (gate * mx.sigmoid(gate))).astype(z.dtype)


def spans(rows: int, T: int) -> tuple[int, list[slice]]:
    """How long a chunk of T tokens is, and the parts of them, padded to whole chunks, that are computed at once."""
    chunk = CHUNK
    while chunk > 8 and chunk // 2 >= T:
        chunk //= 2
    size = chunk * min(SPAN_CHUNKS, max(1, SPAN_TOKENS // (rows * chunk)))
    end = -(-T // chunk) * chunk
    return chunk, [slice(start, min(start + size, end)) for start in range(0, end, size)]


def through_rows(
    inputs: DeltaInputs, state: DeltaState, sizes: DeltaSizes, lengths: Sequence[int] | None = None, *, paced: bool
) -> tuple[mx.array, DeltaState, list[mx.array]]:
    """Rows behind what came before them: o float32 (B, T, H, b), what they leave, and the memories before each span.

    `lengths`: tokens of each row, what is behind them being no tokens (decay and rate 0); None: all T. `paced`: one
    span is there before the next is begun, which holds memory low, and which nothing that is differentiated can do.
    """
    B, T = inputs.mixed.shape[:2]
    chunk, parts = spans(B, T)
    longer, decay, rate = _padded(inputs, state, parts[-1].stop)
    memory, outputs, begun = state.memory, [], []
    for part in parts:
        begun.append(memory)
        seen = longer[:, part.start : part.stop + sizes.taps - 1]
        o, memory = _through_span(sizes, chunk, seen, decay[:, part], rate[:, part], inputs.kernel, memory)
        outputs.append(o)
        if paced:
            mx.eval(o, memory)
    o = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)
    return o[:, :T], DeltaState(_last(longer, lengths, T, sizes.taps), memory), begun


def back_through_rows(
    inputs: DeltaInputs,
    state: DeltaState,
    sizes: DeltaSizes,
    begun: Sequence[mx.array],
    lengths: Sequence[int],
    o_grad: mx.array,
    left_grad: DeltaState | None,
) -> tuple[DeltaInputs, DeltaState]:
    """From the cotangents of what `through_rows` gave, `begun` among it, to those of the inputs and of the state.

    Span by span from behind, each evaluated before the next: no more is held than one span makes.
    """
    B, T = inputs.mixed.shape[:2]
    chunk, parts = spans(B, T)
    longer, decay, rate = _padded(inputs, state, parts[-1].stop)
    o_grad = mx.pad(o_grad.astype(mx.float32), [(0, 0), (0, parts[-1].stop - T), (0, 0), (0, 0)])
    memory_grad = mx.zeros_like(state.memory) if left_grad is None else left_grad.memory
    kernel_grad, over = mx.zeros(inputs.kernel.shape), mx.zeros((B, sizes.taps - 1, sizes.channels))
    found: list[tuple[mx.array, mx.array, mx.array]] = []
    for part, memory in zip(reversed(parts), reversed(begun), strict=True):
        seen = longer[:, part.start : part.stop + sizes.taps - 1]
        arguments = [seen, decay[:, part], rate[:, part], inputs.kernel.astype(mx.float32), memory]
        function = partial(_through_span, sizes, chunk)
        grads = mx.vjp(function, arguments, [o_grad[:, part], memory_grad])[1]
        seen_grad, memory_grad, kernel_grad = grads[0], grads[4], kernel_grad + grads[3]
        size = part.stop - part.start
        own = seen_grad[:, sizes.taps - 1 :]  # what the next span sees of this one is at its end
        own = mx.concatenate([own[:, : size - sizes.taps + 1], own[:, size - sizes.taps + 1 :] + over], axis=1)
        over = seen_grad[:, : sizes.taps - 1]
        found.append((own, grads[1], grads[2]))
        mx.eval(found[-1], over, memory_grad, kernel_grad)
    mixed_grad, decay_grad, rate_grad = (
        x[0] if len(x) == 1 else mx.concatenate(list(x[::-1]), axis=1) for x in zip(*found, strict=True)
    )
    longer_grad = mx.concatenate([over, mixed_grad], axis=1)
    if left_grad is not None:
        last = partial(_last, lengths=lengths, T=T, taps=sizes.taps)
        longer_grad = longer_grad + mx.vjp(last, [longer], [left_grad.window])[1][0]
    before = sizes.taps - 1
    mixed_grad = longer_grad[:, before : before + T].astype(inputs.mixed.dtype)
    kernel_grad = kernel_grad.astype(inputs.kernel.dtype)
    grads_of_inputs = DeltaInputs(mixed_grad, decay_grad[:, :T], rate_grad[:, :T], kernel_grad)
    return grads_of_inputs, DeltaState(longer_grad[:, :before], memory_grad)


def one_step(inputs: DeltaInputs, state: DeltaState, sizes: DeltaSizes) -> tuple[mx.array, DeltaState]:
    """One more token of every row: inputs with T = 1 → o float32 (B, 1, H, b), and what it leaves."""
    B, (_, H, a, b) = inputs.mixed.shape[0], state.memory.shape
    longer = mx.concatenate([state.window, inputs.mixed.astype(mx.float32)], axis=1)
    q, k, v = _heads(longer, inputs.kernel, sizes)  # (B, K, 1, 1, a) twice, (B, K, H/K, 1, b)
    q, k = (mx.broadcast_to(x, (*v.shape[:3], 1, a)).reshape(B, H, 1, a) for x in (q, k))
    v = v.reshape(B, H, 1, b)
    fade = mx.exp(inputs.decay).reshape(B, H, 1, 1)
    both = fade * (mx.concatenate([k, q], axis=2) @ state.memory)  # what the memory answers, (B, H, 2, b)
    written = inputs.rate.reshape(B, H, 1, 1) * (v - both[:, :, :1])
    arguments = fade, state.memory, k.reshape(B, H, a, 1), written
    memory = (compiled(_faded, state.memory.shape) if state.memory.size > WORTHWHILE else _faded)(*arguments)
    o = both[:, :, 1:] + mx.sum(q * k, axis=-1, keepdims=True) * written
    return o.reshape(B, 1, H, b), DeltaState(longer[:, 1:], memory)


def _faded(fade: mx.array, memory: mx.array, k: mx.array, written: mx.array) -> mx.array:
    return fade * memory + k * written


def _padded(inputs: DeltaInputs, state: DeltaState, end: int) -> tuple[mx.array, mx.array, mx.array]:
    """The rows behind their window, float32 (B, k − 1 + end, C); decays and rates (B, end, H)."""
    more = [(0, 0), (0, end - inputs.mixed.shape[1]), (0, 0)]
    longer = mx.concatenate([state.window, mx.pad(inputs.mixed.astype(mx.float32), more)], axis=1)
    return longer, mx.pad(inputs.decay, more), mx.pad(inputs.rate, more)


def _last(longer: mx.array, lengths: Sequence[int] | None, T: int, taps: int) -> mx.array:
    """The last k − 1 tokens of rows that stand behind k − 1 others."""
    if lengths is None or min(lengths) == T:
        return longer[:, T : T + taps - 1]
    places = mx.array(list(lengths))[:, None] + mx.arange(taps - 1)
    return mx.take_along_axis(longer, places[..., None], axis=1)


def _heads(longer: mx.array, kernel: mx.array, sizes: DeltaSizes) -> tuple[mx.array, mx.array, mx.array]:
    """(B, k − 1 + T, C) → queries and keys (B, K, 1, T, a), of length a^−½ and 1, and values (B, K, H/K, T, b)."""
    T, kernel = longer.shape[1] - sizes.taps + 1, kernel.astype(mx.float32)
    y = longer[:, :T] * kernel[:, 0]
    for tap in range(1, sizes.taps):
        y = y + longer[:, tap : tap + T] * kernel[:, tap]
    y = y * mx.sigmoid(y)
    K, keys = sizes.key_heads, sizes.key_heads * sizes.key_dim
    q, k, v = mx.split(y, [keys, 2 * keys], axis=-1)
    q, k = (x.reshape(*x.shape[:2], K, 1, sizes.key_dim).transpose(0, 2, 3, 1, 4) for x in (q, k))
    q, k = (x * mx.rsqrt(mx.sum(x * x, axis=-1, keepdims=True) + _EPSILON) for x in (q, k))
    v = v.reshape(*v.shape[:2], K, -1, sizes.value_dim).transpose(0, 2, 3, 1, 4)
    return q * sizes.key_dim**-0.5, k, v


def _through_span(
    sizes: DeltaSizes,
    chunk: int,
    longer: mx.array,
    decay: mx.array,
    rate: mx.array,
    kernel: mx.array,
    memory: mx.array,
) -> tuple[mx.array, mx.array]:
    """Whole chunks of tokens, first each by itself, then one behind the other → o (B, T, H, b), and the memory."""
    B, T, H = decay.shape
    K, n = sizes.key_heads, T // chunk

    def chunks(x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:3], n, chunk, *x.shape[4:])

    q, k, v = (chunks(x) for x in _heads(longer, kernel, sizes))
    decay, rate = (chunks(x.reshape(B, T, K, H // K).transpose(0, 2, 3, 1)) for x in (decay, rate))
    total = mx.cumsum(decay, axis=-1)
    sees = mx.tri(chunk, dtype=mx.float32) > 0
    fades = mx.exp(mx.where(sees, total[..., :, None] - total[..., None, :], mx.array(-float("inf"))))
    rate, grown, whole = rate[..., None], mx.exp(total)[..., None], total[..., -1:]
    keys = k.swapaxes(-1, -2)
    inverse = unit_lower_inverse((k @ keys) * (rate * fades))
    values, answers = inverse @ (rate * v), inverse @ (rate * grown * k)
    among = (q @ keys) * fades
    reads, writes = grown * q, mx.exp(whole - total)[..., None] * k
    left = mx.exp(whole)[..., None]
    memory = memory.reshape(B, K, H // K, *memory.shape[2:])
    outputs = []
    apart = ([y.squeeze(3) for y in mx.split(x, n, axis=3)] for x in (values, answers, reads, among, left, writes))
    for value, answer, read, inside, stays, write in zip(*apart, strict=True):
        written = value - answer @ memory
        outputs.append(read @ memory + inside @ written)
        memory = stays * memory + write.swapaxes(-1, -2) @ written
    o = mx.stack(outputs, axis=3).reshape(B, H, T, -1).swapaxes(1, 2)
    return o, memory.reshape(B, H, *memory.shape[3:])


@cache
def _pairs(size: int, block: int) -> list[list[list[int]]]:
    """Where, in a flat matrix, the blocks lie that are left of every second block of the diagonal, (pairs, b, b)."""
    return [
        [[((2 * p + 1) * block + r) * size + 2 * p * block + c for c in range(block)] for r in range(block)]
        for p in range(size // block // 2)
    ]


def _inverse(a: mx.array) -> mx.array:
    """(I + A)⁻¹ of what is below the diagonal of a (…, c, c): of blocks of 1, of 2, … to the whole. Powers of A, whose
    sums are the same, would grow beyond float32 where keys are alike."""
    size = a.shape[-1]
    flat = a.reshape(*a.shape[:-2], size * size)
    found = mx.ones((*a.shape[:-2], size, 1, 1), a.dtype)
    block = 1
    while block < size:
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        below = -(second @ mx.take(flat, mx.array(_pairs(size, block)), axis=-1) @ first)
        above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        found = mx.concatenate([above, mx.concatenate([below, second], axis=-1)], axis=-2)
        block *= 2
    return found.squeeze(-3)


@mx.custom_function
def _lower_inverse(a: mx.array) -> Any:
    return _inverse(a)


@_lower_inverse.vjp
def _lower_inverse_vjp(a: mx.array, cotangent: mx.array, inverse: mx.array) -> Any:
    turned = inverse.swapaxes(-1, -2)
    return mx.tril(-(turned @ cotangent @ turned), -1)


def unit_lower_inverse(a: mx.array) -> mx.array:
    """(I + A)⁻¹, A being what is below the diagonal of a (…, c, c), c a power of two."""
    return cast(mx.array, _lower_inverse(a))
