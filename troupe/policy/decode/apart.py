"""One new token a row, whose scores to its prompt and to its own tokens are never joined: what is fast on a CPU.

Shapes as in `cache.py`.
"""

import mlx.core as mx

from troupe.policy.network.elementwise import compiled, exponential


def attend_apart(
    q: mx.array,
    prompt_keys: mx.array,
    prompt_values: mx.array,
    keys: mx.array,
    values: mx.array,
    padding: mx.array | None,
) -> mx.array:
    """Scaled queries (S, K, w, R, d) → (S, K, w, R, d), on a CPU: with one softmax over two arrays of scores, which
    are never joined, nor copied to be cut apart again.

    With few queries BLAS takes a quarter less for keys · queriesᵀ than for the other way about.
    """
    S, K, w, R, d = q.shape
    P = prompt_keys.shape[2]
    to_prompt = (prompt_keys @ q.reshape(S, K, w * R, d).swapaxes(-1, -2)).swapaxes(-1, -2)
    if padding is not None:
        to_prompt = to_prompt + padding
    to_prompt = to_prompt.reshape(S, K, w, R, P)
    to_own = keys @ q.swapaxes(-1, -2)  # (S, K, w, N, R)
    peak = mx.maximum(
        mx.max(to_prompt, axis=-1, keepdims=True), mx.max(to_own, axis=-2, keepdims=True).swapaxes(-1, -2)
    )
    of_prompt = compiled(_power_below, to_prompt.shape)(to_prompt, peak)
    of_own = compiled(_power_below, to_own.shape)(to_own, peak.swapaxes(-1, -2))
    total = mx.sum(of_prompt, axis=-1, keepdims=True) + mx.sum(of_own, axis=-2, keepdims=True).swapaxes(-1, -2)
    of_values = (of_prompt.reshape(S, K, w * R, P) @ prompt_values).reshape(q.shape)
    o: mx.array = (of_values + of_own.swapaxes(-1, -2) @ values) / total
    return o


def _power_below(scores: mx.array, peak: mx.array) -> mx.array:
    return exponential(scores - peak)
