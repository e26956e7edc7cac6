"""What makes tokens unlikelier or impossible: filters, penalties and logit bias. Arrays in, arrays out.

Shapes are (V,) or (B, V), V the vocabulary; what a
filter removes becomes −inf. `sampling.py` says in which order they act.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from troupe.policy.network.elementwise import exp

ROUNDING = 1e-6
"""Differences of float32 log-probs are no finer than this, so a token at the limit of min_p stays within it."""

HALF_ULP = 2.0**-24


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

    Tokens as likely as the last of these stay too, as in mlx-lm. `top_p` ≥ 1 changes nothing. Raises ValueError for
    `top_p` ≤ 0.
    """
    check_top_p(top_p)
    if top_p >= 1.0:
        return logprobs
    # The values alone are sorted, which is cheaper than sorting ids and carrying the values there and back.
    values = mx.sort(logprobs, axis=-1)
    powers = powers_of(values)
    likelier = mx.cumsum(powers, axis=-1, reverse=True, inclusive=False)
    # Half a float32 unit of slack lets .5 + .4 reach .9, and the total is summed in the order of the parts.
    limit = (top_p - HALF_ULP) * (likelier[..., :1] + powers[..., :1])
    count = mx.maximum(mx.sum(likelier < limit, axis=-1, keepdims=True), 1)
    last = mx.take_along_axis(values, logprobs.shape[-1] - count, axis=-1)
    return mx.where(logprobs < last, -math.inf, logprobs)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Remove tokens whose probability is below `min_p` times the largest (Nguyen et al. 2024,
    arXiv:2407.01082).

    At least the `min_tokens_to_keep` likeliest stay. `min_p` = 0 changes nothing. Raises ValueError for
    `min_p` outside [0, 1) or `min_tokens_to_keep` < 1.
    """
    check_min_p(min_p, min_tokens_to_keep)
    if min_p == 0.0 or min_tokens_to_keep >= logprobs.shape[-1]:
        return logprobs
    gap = logprobs - mx.max(logprobs, axis=-1, keepdims=True)
    too_unlikely = gap < math.log(min_p) - ROUNDING
    if min_tokens_to_keep > 1:
        likeliest = mx.argpartition(-gap, kth=min_tokens_to_keep - 1, axis=-1)[..., :min_tokens_to_keep]
        too_unlikely = mx.put_along_axis(too_unlikely, likeliest, mx.array(False), axis=-1)
    return mx.where(too_unlikely, -math.inf, logprobs)


def apply_xtc(
    logits: mx.array,
    xtc_probability: float,
    xtc_threshold: float,
    xtc_special_tokens: Sequence[int] = (),
    key: mx.array | None = None,
    *,
    uniforms: mx.array | None = None,
) -> mx.array:
    """Exclude top choices: with `xtc_probability`, drawn per row, remove every token above the threshold but
    the last.

    "Last" is the least likely token whose probability is above `xtc_threshold`, and those equal to it;
    `xtc_special_tokens` (ids) are never removed. `uniforms`: a number in [0, 1) for each row, () or (B,), that acts
    where it is below `xtc_probability`; without it they are drawn from `key`, one random key. Raises ValueError for a
    probability outside [0, 1] or a threshold outside [0, 0.5].
    """
    check_xtc(xtc_probability, xtc_threshold)
    if xtc_probability == 0.0:
        return logits
    if xtc_probability < 1.0 and uniforms is None:
        uniforms = mx.random.uniform(shape=logits.shape[:-1], key=key)
    spared = mark(xtc_special_tokens, logits.shape[-1]) if xtc_special_tokens else None
    return exclude_top_choices(logits, xtc_probability, xtc_threshold, spared, uniforms)


def apply_logit_bias(logits: mx.array, logit_bias: Mapping[int, float]) -> mx.array:
    """Add a number to the logits of some ids; −inf bans one. Ids of V and more are ignored.

    Raises ValueError for a negative id, and for NaN or +inf.
    """
    for id_, bias in logit_bias.items():
        check_bias(id_, bias)
    ids = [id_ for id_ in logit_bias if id_ < logits.shape[-1]]
    if not ids:
        return logits
    values = mx.array([logit_bias[id_] for id_ in ids], dtype=logits.dtype)
    return logits.at[..., mx.array(ids)].add(values)


def apply_repetition_penalty(
    logits: mx.array, tokens: mx.array | Sequence[int], penalty: float, context_size: int = 20
) -> mx.array:
    """Make recent tokens less likely: positive logits are divided by `penalty`, negative ones multiplied
    (Keskar 2019).

    `tokens`: ids (T,), for every row, or (B, T), one list a row; only the last `context_size` count. A token
    that comes twice is penalized once; ids outside [0, V) are ignored, so −1 can pad. Raises ValueError for
    `penalty` ≤ 0 or `context_size` < 1.
    """
    check_repetition(penalty, context_size)
    ids = _recent(logits, tokens, context_size)
    if penalty == 1.0 or ids.size == 0:
        return logits
    return _change_once(logits, ids, lambda chosen: mx.where(chosen < 0, chosen * penalty, chosen / penalty))


def apply_presence_penalty(
    logits: mx.array, tokens: mx.array | Sequence[int], penalty: float, context_size: int = 20
) -> mx.array:
    """Subtract `penalty` from the logit of every recent token, once however often it came.

    `tokens` and `context_size` as in `apply_repetition_penalty`; a negative `penalty` favours what came. Raises
    ValueError for a `penalty` that is no finite number or `context_size` < 1.
    """
    check_subtracted("presence", penalty, context_size)
    ids = _recent(logits, tokens, context_size)
    if penalty == 0.0 or ids.size == 0:
        return logits
    return _change_once(logits, ids, lambda chosen: chosen - penalty)


def apply_frequency_penalty(
    logits: mx.array, tokens: mx.array | Sequence[int], penalty: float, context_size: int = 20
) -> mx.array:
    """Subtract `penalty` from the logit of a recent token for every time it came; otherwise as presence."""
    check_subtracted("frequency", penalty, context_size)
    ids = _recent(logits, tokens, context_size)
    if penalty == 0.0 or ids.size == 0:
        return logits
    known = (ids >= 0) & (ids < logits.shape[-1])
    # All that is added to one place is alike, so the sum does not depend on the order on a parallel device.
    amounts = mx.where(known, -penalty, 0.0).astype(logits.dtype)
    ids = mx.where(known, ids, 0)
    if logits.ndim == 1:
        return logits.at[ids].add(amounts)
    return logits.at[mx.arange(logits.shape[0])[:, None], ids].add(amounts)


def exclude_top_choices(
    logits: mx.array, probability: float, threshold: float, spared: mx.array | None, uniforms: mx.array | None
) -> mx.array:
    """`apply_xtc` for checked settings: `spared` (…, V) is true where nothing is removed.

    Acts in every row at `probability` 1, else in those whose uniform lies below it.
    """
    powers = powers_of(logits)
    is_top = powers > threshold * mx.sum(powers, axis=-1, keepdims=True)
    removed = powers > mx.min(mx.where(is_top, powers, math.inf), axis=-1, keepdims=True)
    if spared is not None:
        removed = removed & ~spared
    if probability < 1.0 and uniforms is not None:
        removed = removed & (uniforms[..., None] < probability)
    return mx.where(removed, -math.inf, logits)


def powers_of(logits: mx.array) -> mx.array:
    """Float32 e^logits: shares, but for their sum. A row is shifted only where that could overflow or vanish.

    Log-probs are not, because the rounding of a shift moves the border of top_p by some ids of a large vocabulary.
    """
    logits = logits.astype(mx.float32)
    top = mx.max(logits, axis=-1, keepdims=True)
    return exp(logits - (top - mx.clip(top, -20.0, 60.0)))


def mark(ids: Sequence[int], V: int) -> mx.array:
    """Booleans (V,), true at `ids`; ids outside [0, V) are ignored."""
    marks = mx.zeros((V,), dtype=mx.bool_)
    known = [id_ for id_ in ids if 0 <= id_ < V]
    return mx.put_along_axis(marks, mx.array(known, dtype=mx.int32), mx.array(True), axis=0) if known else marks


def _recent(logits: mx.array, tokens: mx.array | Sequence[int], context_size: int) -> mx.array:
    """The last `context_size` ids, int32, one list for each row of `logits`."""
    ids = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
    ids = ids[..., -context_size:].astype(mx.int32)
    return mx.broadcast_to(ids, (*logits.shape[:-1], ids.shape[-1]))


def _change_once(logits: mx.array, ids: mx.array, change: Callable[[mx.array], mx.array]) -> mx.array:
    """`logits` with `change` applied at `ids`, once however often an id stands there; ids outside [0, V) are ignored.

    A stranger stands in for the largest known id of its row, which then is written twice with the same value.
    """
    known = (ids >= 0) & (ids < logits.shape[-1])
    largest = mx.max(mx.where(known, ids, -1), axis=-1, keepdims=True)
    ids = mx.where(known, ids, mx.maximum(largest, 0))
    chosen = mx.take_along_axis(logits, ids, axis=-1)
    changed = mx.where(largest >= 0, change(chosen), chosen).astype(logits.dtype)
    return mx.put_along_axis(logits, ids, changed, axis=-1)


def check_top_p(top_p: float) -> None:
    if not top_p > 0.0:
        raise ValueError(f"top_p is {top_p}, but must be above 0; 1 switches the filter off")


def check_min_p(min_p: float, min_tokens_to_keep: int) -> None:
    if not 0.0 <= min_p < 1.0:
        raise ValueError(f"min_p is {min_p}, but must lie in [0, 1); 0 switches the filter off")
    if min_tokens_to_keep < 1:
        raise ValueError(f"min_tokens_to_keep is {min_tokens_to_keep}, but at least 1 token must stay")


def check_xtc(probability: float, threshold: float) -> None:
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"xtc_probability is {probability}, but must lie in [0, 1]; 0 switches XTC off")
    if not 0.0 <= threshold <= 0.5:
        raise ValueError(f"xtc_threshold is {threshold}, but must lie in [0, 0.5]; above, nothing is ever removed")


def check_repetition(penalty: float, context_size: int) -> None:
    if not (penalty > 0.0 and math.isfinite(penalty)):
        raise ValueError(f"repetition_penalty is {penalty}, but must be a number above 0; 1 switches it off")
    _check_context("repetition", context_size)


def check_subtracted(name: str, penalty: float, context_size: int) -> None:
    if not math.isfinite(penalty):
        raise ValueError(f"{name}_penalty is {penalty}, but must be a finite number; 0 switches it off")
    _check_context(name, context_size)


def _check_context(name: str, context_size: int) -> None:
    if context_size < 1:
        raise ValueError(f"{name}_context_size is {context_size}, but must be at least 1")


def check_bias(id_: int, bias: float) -> None:
    if id_ < 0:
        raise ValueError(f"logit_bias has the token id {id_}, but ids start at 0")
    if not bias < math.inf:
        raise ValueError(f"logit_bias of token {id_} is {bias}, but must be a finite number, or -inf to ban the token")
