"""Prompts are read, some of them together: their keys and values, and what follows from their last tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.decode.cache import PiecedPromptCache, PromptCache, piece_length
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.attention import attention_is_fused
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import hidden_states
from troupe.policy.network.routes import Routes, as_bytes
from troupe.policy.network.tensors import Weights, weights_dtype


class ReadPrompts(NamedTuple):
    """What becomes of some prompts, evaluated."""

    cache: PromptCache
    last: mx.array
    """(prompts, D) hidden state of each one's last token."""
    experts: list[bytes]
    """Of each, if recorded, the experts that its tokens went to."""


def read_prompts(
    config: NetworkConfig, weights: Weights, prompts: Sequence[Sequence[int]], *, records_experts: bool = False
) -> ReadPrompts:
    """Read prompts together, padded to the longest; in pieces where that takes less memory."""
    lengths = [len(prompt) for prompt in prompts]
    width = max(lengths)
    ids = mx.array([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    is_fused = attention_is_fused(
        config.head_dim, weights_dtype(weights), gradient=False, on_cpu=is_on_cpu(), windowed=config.has_windows
    )
    size = piece_length(len(prompts), width, writes_scores=not is_fused)
    recorded: list[mx.array] = []  # (prompts · tokens, L, k) of one piece after the other
    if size == width:
        part, routes = PromptCache(lengths), Routes(config) if records_experts else None
        states = hidden_states(config, weights, ids, attention=part, routes=routes)
        found = mx.take_along_axis(states, mx.array(lengths)[:, None, None] - 1, axis=1)[:, 0]
        recorded += [] if routes is None else [routes.chosen]
        mx.eval(found, part.arrays, recorded)
        return ReadPrompts(part, found, of_prompts(recorded, lengths))
    pieced, ends = PiecedPromptCache(lengths), dict[int, mx.array]()
    for start in range(0, width, size):
        routes = Routes(config) if records_experts else None
        ends |= pieced.forward(config, weights, ids[:, start : start + size], routes)
        recorded += [] if routes is None else [routes.chosen]
        mx.eval(recorded)
    last = mx.stack([ends[place] for place in range(len(prompts))])
    return ReadPrompts(pieced, last, of_prompts(recorded, lengths))


def of_prompts(pieces: Sequence[mx.array], lengths: Sequence[int]) -> list[bytes]:
    """Of each prompt, without what stands in its padding; each piece has the next tokens of all."""
    if not pieces:
        return []
    whole = mx.concatenate([x.reshape(len(lengths), -1, *x.shape[1:]) for x in pieces], axis=1)
    return [as_bytes(mx.contiguous(whole[row, :length])) for row, length in enumerate(lengths)]
