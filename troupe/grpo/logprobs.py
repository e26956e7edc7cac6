"""Log-probabilities of chosen tokens and entropies, from logits.

Logits are of the temperature wanted already. Shapes: (…) any leading axes, V the vocabulary. Everything is computed in
float32, whatever the dtype of the logits.
"""

from __future__ import annotations

import mlx.core as mx


def selective_log_softmax(logits: mx.array, target_ids: mx.array) -> mx.array:
    """log p(a) = ℓ_a − log Σ_v exp ℓ_v, in nats, for the chosen ids a alone.

    `logits` (…, V); `target_ids` (…) integers in [0, V), or (…, K) for K ids a position. Returns float32 of the shape
    of `target_ids`.
    """
    logits = logits.astype(mx.float32)
    log_normalizer = mx.logsumexp(logits, axis=-1, keepdims=True)
    if target_ids.ndim == logits.ndim:
        return mx.take_along_axis(logits, target_ids, axis=-1) - log_normalizer
    return (mx.take_along_axis(logits, target_ids[..., None], axis=-1) - log_normalizer)[..., 0]


def entropy_from_logits(logits: mx.array) -> mx.array:
    """H = −Σ_v p_v log p_v in nats, with p = softmax(ℓ).

    `logits` (…, V), finite or −inf (an excluded token). Returns float32 (…).
    """
    logits = logits.astype(mx.float32)
    log_probs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    # An excluded token contributes 0; clamping keeps 0 · −inf from making it NaN.
    return -mx.sum(mx.exp(log_probs) * mx.maximum(log_probs, mx.finfo(mx.float32).min), axis=-1)
