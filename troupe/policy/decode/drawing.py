"""The engine's dice: which uniform number belongs to which token, and the draw that it decides.

A row's numbers are a hash of its key and the token's position, the same on
every device and whatever stands beside it in a batch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx

from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.sampling import Sampler, draw_by_shares
from troupe.policy.network.elementwise import exp

NOISE_BLOCK = 16
"""Uniform numbers that one hash of 64 bytes gives."""


def row_key(request_key: Sequence[int], sample: int) -> bytes:
    """What names the random stream of one sample: 16 bytes, distinct for distinct (request key, sample)."""
    text = ",".join(map(str, (*request_key, sample)))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def noise_block(keys: Sequence[bytes], block: int, purpose: bytes = b"") -> mx.array:
    """Uniform numbers k/2²⁴ in [0, 1) for token positions block·16 … block·16+15 of rows → float32 (rows, 16).

    Other purposes (at most 16 bytes) give independent numbers.
    """
    place = block.to_bytes(8, "little")
    digests = b"".join(hashlib.blake2b(place, key=key, person=purpose).digest() for key in keys)
    numbers = mx.array(cast(Any, memoryview(array("I", digests))))  # by the buffer protocol, as uint32
    return (numbers >> 8).astype(mx.float32).reshape(len(keys), NOISE_BLOCK) * 2.0**-24


def draw_tokens(
    sampler: Sampler,
    logits: mx.array,
    uniforms: mx.array,
    recent: mx.array | None = None,
    filter_uniforms: mx.array | None = None,
) -> list[mx.array]:
    """Logits (B, V), uniforms (B,) → ids (B,), their log-probs under softmax(logits / temperature), and, where anything
    is on that changes this distribution, those under the one drawn from.

    `recent` (B, W) ids, −1 pads, for the penalties; `filter_uniforms` (B,) for XTC.
    """
    if sampler.is_filtering or sampler.is_greedy:
        log_probs = sampler.scale(logits)
        adjusted = log_probs
        if sampler.is_adjusting:
            adjusted = sampler.scale(sampler.adjust(logits, () if recent is None else recent))
        ids, sampled = sampler.choose(adjusted, uniforms, filter_uniforms)
        chosen = mx.take_along_axis(log_probs, ids[:, None], axis=-1)[:, 0]
        return [ids, chosen, sampled] if sampler.is_filtering else [ids, chosen]
    if cuda_kernels.are_available():
        return list(cuda_kernels.draw(logits, uniforms, sampler.config.temperature))
    scaled = logits.astype(mx.float32)
    if sampler.config.temperature != 1.0:
        scaled = scaled / sampler.config.temperature
    scaled = scaled - mx.max(scaled, axis=-1, keepdims=True)
    powers = exp(scaled)  # serves the draw and the log-probability
    ids = draw_by_shares(powers, uniforms)
    chosen = mx.take_along_axis(scaled, ids[:, None], axis=-1)[:, 0]
    return [ids, chosen - mx.log(mx.sum(powers, axis=-1))]
