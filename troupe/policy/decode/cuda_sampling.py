"""The full chain of sampling as one kernel on NVIDIA cards: bias, penalties, temperature, filters, draw, log-probs.

MLX's own operations take some forty launches and a sort for it. Here a block reads its row a few times: top_k and
top_p each find the bin of 1/64 nat in which they end, and end in it by halves. The plain twin is `Sampler`. Both keep
the same ids, but where float32 sums of shares, exact here, decide at the limit of top_p or XTC; and they draw the same
ones, but where a uniform lies that near to a limit between two ids.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.decode.cuda_kernels import kernel
from troupe.policy.decode.filters import HALF_ULP, ROUNDING
from troupe.policy.decode.sampling import Sampler

_THREADS = 512
"""As many as the kernel has registers for."""


class _Settings(NamedTuple):
    """What a sampler's settings are to the kernel."""

    numbers: mx.array
    """Float32: temperature, least share of top_p, least log-ratio of min_p, probability and threshold of XTC, the
    penalties for repetition, presence and frequency."""
    counts: mx.array
    """Int32: top_k, min_tokens_to_keep, whether logits are changed, and how many ids are recent for each penalty."""
    bias_ids: mx.array
    bias: mx.array
    spared: mx.array
    """Ids that XTC never removes, int32."""
    nothing: mx.array
    """An id that no vocabulary has, (1, 1) int32."""


@lru_cache(maxsize=8)
def _settings(sampler: Sampler) -> _Settings:
    c = sampler.config
    repetition = c.repetition_context_size if c.repetition_penalty != 1.0 else 0
    presence = c.presence_context_size if c.presence_penalty != 0.0 else 0
    frequency = c.frequency_context_size if c.frequency_penalty != 0.0 else 0
    min_p = math.log(c.min_p) - ROUNDING if c.min_p > 0.0 else -math.inf
    top_p = max(0.0, c.top_p - HALF_ULP) if c.top_p < 1.0 else 2.0
    numbers = [c.temperature, top_p, min_p, c.xtc_probability, c.xtc_threshold]
    numbers += [c.repetition_penalty, c.presence_penalty, c.frequency_penalty]
    top_k, most = max(0, min(c.top_k, 2**31 - 1)), min(c.min_tokens_to_keep, 2**31 - 1)
    return _Settings(
        mx.array(numbers, dtype=mx.float32),
        mx.array([top_k, most, int(sampler.is_adjusting), repetition, presence, frequency], dtype=mx.int32),
        mx.array([min(id_, 2**31 - 1) for id_ in c.logit_bias] or [-1], dtype=mx.int32),
        mx.array(list(c.logit_bias.values()) or [0.0], dtype=mx.float32),
        mx.array(list(sampler.special_ids) or [-1], dtype=mx.int32),
        mx.array([[-1]], dtype=mx.int32),
    )


def draw_filtered(
    sampler: Sampler,
    logits: mx.array,
    uniforms: mx.array,
    recent: mx.array | None = None,
    filter_uniforms: mx.array | None = None,
    *,
    threads: int = _THREADS,
) -> tuple[mx.array, mx.array, mx.array]:
    """Logits (B, V), uniforms (B,) in [0, 1) → ids (B,), their log-probs (B,) under softmax(logits / temperature), and
    those under the distribution drawn from, in nats.

    `recent` (B, W) int32, −1 pads, newest last; `filter_uniforms` (B,) for XTC; `threads` of a block, 64 to 1024, a
    power of two. For temperatures above `GREEDY_BELOW` and up to 2²⁰ ids. Raises ValueError where the uniforms for XTC
    are missing.
    """
    if sampler.needs_uniforms and filter_uniforms is None:
        raise ValueError(
            f"xtc_probability is {sampler.config.xtc_probability}, but filter got no uniforms; give one for each row"
        )
    B, V = logits.shape
    settings = _settings(sampler)
    if recent is None or recent.shape[-1] == 0:
        recent = mx.broadcast_to(settings.nothing, (B, 1))
    ids, log_probs, sampled, _ = kernel("draw_filtered")(
        inputs=[
            logits,
            uniforms,
            uniforms if filter_uniforms is None else filter_uniforms,
            recent.astype(mx.int32),
            *settings[:5],
        ],
        template=[("T", logits.dtype), ("THREADS", threads)],
        grid=(B * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B,), (B,), (B,), (B, -(-V // 4) * 4)],
        output_dtypes=[mx.uint32, mx.float32, mx.float32, mx.float32],
    )
    return ids, log_probs, sampled
