"""Choosing the next token: temperature, filters and the draw. Arrays in, arrays out.

Knows nothing of models, text, batches of requests or which random key belongs to which row: callers bring
logits and randomness. Shapes are (V,) or (B, V), V the vocabulary; what a filter removes becomes −inf.

Order, stated once: temperature scaling, then top_k, top_p, min_p, each on what the one before left (the order
of transformers' `generate`, which TRL samples with; mlx-lm applies top_k last). Shares are always those of
the remaining mass, as if it had been renormalized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import mlx.core as mx
import msgspec

GREEDY_BELOW = 1e-5
"""Temperatures under this act as 0, the most likely token: dividing by less would overflow float32 logits."""

ROUNDING = 1e-6
"""Float32 sums and logarithms of shares are no finer than this, so equality at a limit is meant within it."""

_LARGEST_UNIFORM = 1.0 - 2.0**-24


class SamplingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a token is drawn. Defaults sample the model's own distribution. Raises ValueError out of bounds."""

    temperature: Annotated[float, msgspec.Meta(ge=0.0)] = 1.0
    """Logits are divided by this; 0 takes the most likely token."""
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    """Keep the fewest likeliest tokens whose share reaches this; 1 is off."""
    top_k: int = 0
    """Keep this many likeliest tokens; 0 or less, or V and more, is off."""
    min_p: Annotated[float, msgspec.Meta(ge=0.0, lt=1.0)] = 0.0
    """Remove tokens less likely than this times the likeliest; 0 is off."""
    min_tokens_to_keep: Annotated[int, msgspec.Meta(ge=1)] = 1
    """min_p leaves at least this many tokens."""

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        _check_top_p(self.top_p)
        if self.top_p > 1.0:
            raise ValueError(f"top_p is {self.top_p}, but a share is at most 1; 1 switches the filter off")
        _check_min_p(self.min_p, self.min_tokens_to_keep)


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keep exactly the `top_k` likeliest tokens; of equal ones those with the lower id.

    `top_k` ≤ 0 or ≥ V changes nothing.
    """
    if top_k <= 0 or top_k >= logprobs.shape[-1]:
        return logprobs
    removed = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, removed, mx.array(-math.inf, logprobs.dtype), axis=-1)


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Nucleus filter (Holtzman et al. 2020): keep the fewest likeliest tokens whose share is ≥ `top_p`.

    Of equal tokens the lower ids stay. The likeliest always stays; `top_p` ≥ 1 changes nothing. Raises
    ValueError for `top_p` ≤ 0.
    """
    _check_top_p(top_p)
    if top_p >= 1.0:
        return logprobs
    order = mx.argsort(-logprobs, axis=-1)
    values = mx.take_along_axis(logprobs, order, axis=-1)
    probs = mx.softmax(values.astype(mx.float32), axis=-1)
    before = mx.cumsum(probs, axis=-1, inclusive=False)  # share of all likelier tokens
    limit = max(top_p - ROUNDING, ROUNDING)
    kept = mx.where(before < limit, values, -math.inf)
    return mx.put_along_axis(logprobs, order, kept, axis=-1)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Remove tokens whose probability is below `min_p` times the largest (Nguyen et al. 2024,
    arXiv:2407.01082).

    At least the `min_tokens_to_keep` likeliest stay. `min_p` = 0 changes nothing. Raises ValueError for
    `min_p` outside [0, 1) or `min_tokens_to_keep` < 1.
    """
    _check_min_p(min_p, min_tokens_to_keep)
    if min_p == 0.0 or min_tokens_to_keep >= logprobs.shape[-1]:
        return logprobs
    gap = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
    too_unlikely = gap < math.log(min_p) - ROUNDING
    if min_tokens_to_keep > 1:
        likeliest = mx.topk(gap, min_tokens_to_keep, axis=-1)
        too_unlikely = too_unlikely & (gap < mx.min(likeliest, axis=-1, keepdims=True))
    return mx.where(too_unlikely, -math.inf, logprobs)


def apply_xtc(
    logits: mx.array,
    xtc_probability: float,
    xtc_threshold: float,
    xtc_special_tokens: Sequence[int] = (),
    key: mx.array | None = None,
) -> mx.array:
    """Exclude top choices: with `xtc_probability`, drawn per row, remove every token above the threshold but
    the last.

    "Last" is the least likely token whose probability is above `xtc_threshold`; `xtc_special_tokens` (ids)
    are never removed. `key` is one random key. Raises ValueError for a probability outside [0, 1] or a
    threshold outside [0, 0.5].
    """
    if not 0.0 <= xtc_probability <= 1.0:
        raise ValueError(f"xtc_probability is {xtc_probability}, but must lie in [0, 1]")
    if not 0.0 <= xtc_threshold <= 0.5:
        raise ValueError(f"xtc_threshold is {xtc_threshold}, but must lie in [0, 0.5]; above, nothing is ever removed")
    if xtc_probability == 0.0:
        return logits
    probs = mx.softmax(logits.astype(mx.float32), axis=-1)
    last = mx.min(mx.where(probs > xtc_threshold, probs, math.inf), axis=-1, keepdims=True)
    removed = probs > last
    if xtc_special_tokens:
        removed[..., mx.array(list(xtc_special_tokens))] = False
    if xtc_probability < 1.0:
        removed = removed & (mx.random.uniform(shape=last.shape, key=key) < xtc_probability)
    return mx.where(removed, -math.inf, logits)


def apply_repetition_penalty(
    logits: mx.array, tokens: mx.array | Sequence[int], penalty: float, context_size: int = 20
) -> mx.array:
    """Make recent tokens less likely: positive logits are divided by `penalty`, negative ones multiplied
    (Keskar 2019).

    `tokens`: ids (T,), for every row, or (B, T), one list a row; only the last `context_size` count. A token
    that comes twice is penalized once; ids outside [0, V) are ignored, so −1 can pad. Raises ValueError for
    `penalty` ≤ 0 or `context_size` < 1.
    """
    if not (penalty > 0.0 and math.isfinite(penalty)):
        raise ValueError(f"repetition penalty is {penalty}, but must be a number above 0; 1 switches it off")
    if context_size < 1:
        raise ValueError(f"repetition context_size is {context_size}, but must be at least 1")
    ids = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
    if penalty == 1.0 or ids.size == 0:
        return logits
    V = logits.shape[-1]
    recent = ids[..., -context_size:].astype(mx.int32)
    recent = mx.where((recent >= 0) & (recent < V), recent, V)  # all strangers meet in a column that is cut off
    recent = mx.broadcast_to(recent, (*logits.shape[:-1], recent.shape[-1]))
    seen = mx.zeros((*logits.shape[:-1], V + 1), dtype=mx.bool_)
    seen = mx.put_along_axis(seen, recent, mx.array(True), axis=-1)[..., :V]
    return mx.where(seen, mx.where(logits < 0, logits * penalty, logits / penalty), logits)


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


class Sampler:
    """Draws tokens as a `SamplingConfig` says. Holds no other state, so one serves any number of threads."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config

    @property
    def is_filtering(self) -> bool:
        """Whether a filter is on, so that the distribution drawn from differs from the scaled one."""
        return self.config.top_k > 0 or self.config.top_p < 1.0 or self.config.min_p > 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.config.temperature < GREEDY_BELOW

    def scale(self, logits: mx.array) -> mx.array:
        """Float32 log-probs of logits / temperature, in the shape of `logits`; at temperature 0 of plain logits."""
        scaled = _divide(logits, 1.0 if self.is_greedy else self.config.temperature)
        return scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)

    def filter(self, logprobs: mx.array) -> mx.array:
        """`logprobs` with removed tokens at −inf, *not* renormalized: subtract the logsumexp for that."""
        config = self.config
        logprobs = apply_top_k(logprobs, config.top_k)
        logprobs = apply_top_p(logprobs, config.top_p)
        return apply_min_p(logprobs, config.min_p, config.min_tokens_to_keep)

    def draw(self, filtered_logprobs: mx.array, uniforms: mx.array) -> mx.array:
        """Inverse-CDF draw: log-probs (B, V), normalized or not, and one uniform [0, 1) a row (B,) → ids (B,), uint32.

        A removed id is never drawn, whatever float32 sums over V terms round to; at V = 151,936 they shift cumulative
        shares by up to about 3e-4. At temperature 0 the argmax.
        """
        if self.is_greedy:
            return mx.argmax(filtered_logprobs, axis=-1)
        probs = mx.exp(filtered_logprobs)
        # A parallel sum may rise at an id of probability 0; at −1 such an id is never past the target.
        reached = mx.where(probs > 0, mx.cumsum(probs, axis=-1), -1.0)
        target = mx.minimum(uniforms, _LARGEST_UNIFORM)[..., None] * mx.max(reached, axis=-1, keepdims=True)
        return mx.argmax(reached > target, axis=-1)

    def sample(self, logits: mx.array, key: mx.array | None = None) -> mx.array:
        """Scale, filter and draw: (V,) → scalar id, (B, V) → (B,) ids. `key` as in `categorical_sample`."""
        logprobs = self.scale(logits)
        if self.is_filtering:
            logprobs = self.filter(logprobs)
        return categorical_sample(logprobs, 0.0 if self.is_greedy else 1.0, key)


def _divide(logits: mx.array, temperature: float) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits if temperature == 1.0 else logits / temperature


def _check_temperature(temperature: float) -> None:
    if not (temperature >= 0.0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature is {temperature}, but must be a number of at least 0; 0 takes the likeliest token"
        )


def _check_top_p(top_p: float) -> None:
    if not top_p > 0.0:
        raise ValueError(f"top_p is {top_p}, but must be above 0; 1 switches the filter off")


def _check_min_p(min_p: float, min_tokens_to_keep: int) -> None:
    if not 0.0 <= min_p < 1.0:
        raise ValueError(f"min_p is {min_p}, but must lie in [0, 1); 0 switches the filter off")
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep is {min_tokens_to_keep}, but at least 1 token must stay")
