"""Choosing the next token: penalties, temperature, filters and the draw. Arrays in, arrays out.

Callers bring logits, recent ids and randomness. Shapes are (V,) or (B, V), V the vocabulary; what a filter removes
becomes −inf.

Order, stated once (docs/sampling.md has the table of edge values): logit bias, repetition, presence and frequency
penalty (`Sampler.adjust`), temperature (`Sampler.scale`), top_k, top_p, min_p, XTC (`Sampler.filter`), the draw.
Each works on what the one before left, and shares are those of the remaining mass, as if it had been renormalized.
Temperature 0 takes the likeliest token after the penalties; filters cannot change that one, and XTC is off.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated

import mlx.core as mx
import msgspec

from troupe.policy.decode.filters import (
    apply_frequency_penalty,
    apply_logit_bias,
    apply_min_p,
    apply_presence_penalty,
    apply_repetition_penalty,
    apply_top_p,
    check_bias,
    check_min_p,
    check_repetition,
    check_subtracted,
    check_top_p,
    check_xtc,
    exclude_top_choices,
    mark,
)
from troupe.policy.network.elementwise import exp, is_on_cpu

GREEDY_BELOW = 1e-5
"""Temperatures under this act as 0, the most likely token: dividing by less would overflow float32 logits."""

_LARGEST_UNIFORM = 1.0 - 2.0**-24

_DRAW_BLOCK = 128
"""Ids that a draw in two steps looks at together."""


class SamplingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is drawn. Defaults sample the model's own distribution. Raises ValueError out of bounds."""

    temperature: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    """Logits are divided by this; 0 takes the most likely token."""
    top_p: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    """Keep the fewest likeliest tokens whose share reaches this; 1 is off."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 or less, or V and more, is off."""
    min_p: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Remove tokens less likely than this times the likeliest; 0 is off."""
    min_tokens_to_keep: Annotated[int, msgspec.Meta(ge=1)] = 1
    """min_p leaves at least this many tokens."""
    xtc_probability: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    """How often a token is drawn without the top choices, `apply_xtc`; 0 is off."""
    xtc_threshold: Annotated[float, msgspec.Meta(ge=0.0, le=0.5)] = 0.1
    """A top choice is a token likelier than this."""
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    """Positive logits of recent tokens are divided by this, negative ones multiplied; 1 is off."""
    repetition_context_size: Annotated[int, msgspec.Meta(ge=1)] = 20
    """How many of the last tokens are recent for the repetition penalty."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every recent token; 0 is off."""
    presence_context_size: Annotated[int, msgspec.Meta(ge=1)] = 20
    """How many of the last tokens are recent for the presence penalty."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a recent token for every time it came; 0 is off."""
    frequency_context_size: Annotated[int, msgspec.Meta(ge=1)] = 20
    """How many of the last tokens are recent for the frequency penalty."""
    logit_bias: dict[Annotated[int, msgspec.Meta(ge=0)], float] = {}
    """Token id → what is added to its logit, a finite number in a run: −1000 bans a token. Ids of V and more are
    ignored."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        check_top_p(self.top_p)
        check_min_p(self.min_p, self.min_tokens_to_keep)
        check_xtc(self.xtc_probability, self.xtc_threshold)
        check_repetition(self.repetition_penalty, self.repetition_context_size)
        check_subtracted("presence", self.presence_penalty, self.presence_context_size)
        check_subtracted("frequency", self.frequency_penalty, self.frequency_context_size)
        for id_, bias in self.logit_bias.items():
            check_bias(id_, bias)


def categorical_sample(logits: mx.array, temperature: float, key: mx.array | None = None) -> mx.array:
    """Draw ids from softmax(logits / temperature): (V,) → scalar, (B, V) → (B,), uint32. Temperature 0 is
    argmax.

    `key`: None (the thread's own random state), one key (2,), or one key per row (B, 2); with the last, what
    a row draws depends on its key and logits alone. Raises ValueError for a negative temperature or a key of
    another shape.
    """
    _check_temperature(temperature)
    if temperature < GREEDY_BELOW:
        return mx.argmax(logits, axis=-1)
    scaled = _divide(logits, temperature)
    if key is None or key.ndim == 1:
        return mx.random.categorical(scaled, key=key)
    if key.shape != (*logits.shape[:-1], 2):
        raise ValueError(
            f"random keys have shape {tuple(key.shape)}, but logits {tuple(logits.shape)} take one key (2,) "
            "or a key per row (B, 2)"
        )
    drawn: mx.array = mx.vmap(lambda row, row_key: mx.random.categorical(row, key=row_key))(scaled, key)
    return drawn


def draw_by_shares(shares: mx.array, uniforms: mx.array) -> mx.array:
    """Shares (B, V) ≥ 0, in any unit, and uniforms (B,) in [0, 1) → ids (B,); an id without share is never drawn."""
    if is_on_cpu() and shares.ndim == 2 and shares.shape[-1] % _DRAW_BLOCK == 0 and shares.shape[-1] > 8 * _DRAW_BLOCK:
        return _draw_in_two_steps(shares, uniforms)
    sums = mx.cumsum(shares, axis=-1)
    if not is_on_cpu():
        sums = mx.where(shares > 0, sums, -1.0)  # sums made in parallel may rise where nothing is added
    # below the largest sum even after rounding, so that some id with a share is past it
    target = mx.minimum(uniforms, _LARGEST_UNIFORM)[..., None] * mx.max(sums, axis=-1, keepdims=True)
    return mx.argmax(sums > target, axis=-1)


def _draw_in_two_steps(shares: mx.array, uniforms: mx.array) -> mx.array:
    """`draw_by_shares` on a CPU: first a block of ids by the blocks' sums, then an id in it; a fifth of the work."""
    B, V = shares.shape
    blocks = shares.reshape(B, V // _DRAW_BLOCK, _DRAW_BLOCK)
    sums = mx.cumsum(mx.sum(blocks, axis=-1), axis=-1)
    target = mx.minimum(uniforms, _LARGEST_UNIFORM)[:, None] * sums[:, -1:]
    block = mx.argmax(sums > target, axis=-1, keepdims=True)
    before = mx.take_along_axis(mx.pad(sums[:, :-1], [(0, 0), (1, 0)]), block, axis=-1)
    inside = mx.cumsum(mx.take_along_axis(blocks, block[..., None], axis=1)[:, 0], axis=-1)
    # the block's sum was rounded otherwise than its last partial sum, which must be past what is left
    left = mx.minimum(target - before, inside[:, -1:] * _LARGEST_UNIFORM)
    return (block * _DRAW_BLOCK + mx.argmax(inside > left, axis=-1, keepdims=True))[:, 0]


class Sampler:
    """Draws tokens as a `SamplingConfig` says. Holds no other state, so one serves any number of threads.

    For a decoding engine: `adjust`, `scale`, `filter`, `draw`, in this order, with the uniforms of `filter` and those
    of `draw` independent of each other.
    """

    def __init__(self, config: SamplingConfig, special_ids: Iterable[int] = ()) -> None:
        """`special_ids`: ids that XTC never removes, such as those that end a completion."""
        self.config = config
        self.special_ids = tuple(sorted(set(special_ids)))

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.config.temperature < GREEDY_BELOW

    @property
    def context_size(self) -> int:
        """How many of the last ids `adjust` looks at: the longest window of the penalties that are on, else 0."""
        config = self.config
        return max(
            config.repetition_context_size if config.repetition_penalty != 1.0 else 0,
            config.presence_context_size if config.presence_penalty != 0.0 else 0,
            config.frequency_context_size if config.frequency_penalty != 0.0 else 0,
        )

    @property
    def is_adjusting(self) -> bool:
        """Whether `adjust` changes anything: a penalty or a logit bias is on."""
        return self.context_size > 0 or bool(self.config.logit_bias)

    @property
    def needs_uniforms(self) -> bool:
        """Whether `filter` needs a random number for each row: XTC is on, but not always."""
        return 0.0 < self.config.xtc_probability < 1.0 and not self.is_greedy

    @property
    def is_filtering(self) -> bool:
        """Whether anything is on that makes the distribution drawn from differ from softmax(logits / temperature)."""
        config = self.config
        is_excluding = config.xtc_probability > 0.0 and not self.is_greedy
        return self.is_adjusting or config.top_k > 0 or config.top_p < 1.0 or config.min_p > 0.0 or is_excluding

    def adjust(self, logits: mx.array, recent: mx.array | Sequence[int] = ()) -> mx.array:
        """Logit bias and penalties: logits (V,) or (B, V) → float32 logits of the same shape.

        `recent`: int32 ids (T,) or (B, T), −1 pads, newest last; each penalty looks at its own last ids.
        """
        config = self.config
        logits = apply_logit_bias(logits.astype(mx.float32), config.logit_bias)
        logits = apply_repetition_penalty(logits, recent, config.repetition_penalty, config.repetition_context_size)
        logits = apply_presence_penalty(logits, recent, config.presence_penalty, config.presence_context_size)
        return apply_frequency_penalty(logits, recent, config.frequency_penalty, config.frequency_context_size)

    def scale(self, logits: mx.array) -> mx.array:
        """Float32 log-probs of logits / temperature, in the shape of `logits`; at temperature 0 of plain logits."""
        scaled = _divide(logits, 1.0 if self.is_greedy else self.config.temperature)
        return scaled - _log_sum_exp(scaled)

    def filter(self, logprobs: mx.array, uniforms: mx.array | None = None) -> mx.array:
        """`logprobs` with removed tokens at −inf, *not* renormalized: subtract the logsumexp for that.

        `uniforms`: a number in [0, 1) for each row, () or (B,), for XTC. Raises ValueError where it is missing.
        """
        values, ids = self._narrow(logprobs, uniforms)
        if values.shape == logprobs.shape:
            return values
        return mx.put_along_axis(mx.full(logprobs.shape, -math.inf, logprobs.dtype), ids, values, axis=-1)

    def choose(
        self, logprobs: mx.array, uniforms: mx.array, filter_uniforms: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """`filter` and `draw` in one: log-probs (B, V) → ids (B,), uint32, and log-probs (B,) they were drawn with.

        Where top_k is on, only k numbers a row are worked on. `filter_uniforms` are those of `filter`.
        """
        values, ids = self._narrow(logprobs, filter_uniforms)
        values = values - mx.max(values, axis=-1, keepdims=True)
        powers = exp(values)  # serves the draw and the log-probability
        places = mx.argmax(values, axis=-1) if self.is_greedy else draw_by_shares(powers, uniforms)
        chosen = mx.take_along_axis(values, places[..., None], axis=-1)[..., 0] - mx.log(mx.sum(powers, axis=-1))
        return mx.take_along_axis(ids, places[..., None], axis=-1)[..., 0], chosen

    def draw(self, filtered_logprobs: mx.array, uniforms: mx.array) -> mx.array:
        """Inverse-CDF draw: log-probs (B, V), normalized or not, and one uniform [0, 1) a row (B,) → ids (B,), uint32.

        A removed id is never drawn, whatever float32 sums over V terms round to; at V = 151,936 they shift cumulative
        shares by up to about 3e-4. At temperature 0 the argmax.
        """
        if self.is_greedy:
            return mx.argmax(filtered_logprobs, axis=-1)
        return draw_by_shares(exp(filtered_logprobs), uniforms)

    def sample(self, logits: mx.array, key: mx.array | None = None, recent: mx.array | Sequence[int] = ()) -> mx.array:
        """Adjust, scale, filter and draw: (V,) → scalar id, (B, V) → (B,) ids. `key` as in `categorical_sample`."""
        logprobs = self.scale(self.adjust(logits, recent) if self.is_adjusting else logits)
        if self.is_greedy:
            return mx.argmax(logprobs, axis=-1)
        uniforms = None
        if self.needs_uniforms:
            key, uniforms = _split_uniforms(key, logits.shape[:-1])
        values, ids = self._narrow(logprobs, uniforms)
        places = categorical_sample(values, 1.0, key)[..., None]
        return mx.take_along_axis(ids, places, axis=-1)[..., 0]

    def _narrow(self, logprobs: mx.array, uniforms: mx.array | None) -> tuple[mx.array, mx.array]:
        """The filters' result (…, K) at the ids (…, K), ascending: the top_k likeliest where that is on, else all."""
        config = self.config
        if self.needs_uniforms and uniforms is None:
            raise ValueError(
                f"xtc_probability is {config.xtc_probability}, but filter got no uniforms; give one for each row"
            )
        V = logprobs.shape[-1]
        ids = mx.broadcast_to(mx.arange(V, dtype=mx.uint32), logprobs.shape)
        if 0 < config.top_k < V:
            ids = mx.sort(mx.argpartition(-logprobs, kth=config.top_k - 1, axis=-1)[..., : config.top_k], axis=-1)
            logprobs = mx.take_along_axis(logprobs, ids, axis=-1)
        logprobs = apply_top_p(logprobs, config.top_p)
        logprobs = apply_min_p(logprobs, config.min_p, config.min_tokens_to_keep)
        if config.xtc_probability == 0.0 or self.is_greedy:
            return logprobs, ids
        spared = mark(self.special_ids, V)[ids] if self.special_ids else None
        logprobs = exclude_top_choices(logprobs, config.xtc_probability, config.xtc_threshold, spared, uniforms)
        return logprobs, ids


def _split_uniforms(key: mx.array | None, rows: tuple[int, ...]) -> tuple[mx.array | None, mx.array]:
    """What is left of `key`, and a number in [0, 1) for each of `rows`, which depends on that row's key alone."""
    if key is None:
        return None, mx.random.uniform(shape=rows)
    if key.ndim == 1:
        rest, own = mx.random.split(key)
        return rest, mx.random.uniform(shape=rows, key=own)
    pairs: mx.array = mx.vmap(mx.random.split)(key)
    uniforms: mx.array = mx.vmap(lambda own: mx.random.uniform(key=own))(pairs[:, 1])
    return pairs[:, 0], uniforms


def _log_sum_exp(logits: mx.array) -> mx.array:
    """log Σ e^logits over the last axis, which stays, by the exponential that is fast on a CPU."""
    top = mx.max(logits, axis=-1, keepdims=True)
    return top + mx.log(mx.sum(exp(logits - top), axis=-1, keepdims=True))


def _divide(logits: mx.array, temperature: float) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def _check_temperature(temperature: float) -> None:
    if not (temperature >= 0.0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature is {temperature}, but must be a number of at least 0; 0 takes the likeliest token"
        )
