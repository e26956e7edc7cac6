"""The work that is timed: rounds of decoding, steps of the learner, and copies, of a random policy."""

import hashlib
import random
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import msgspec

from troupe.actors.learner.batch import CompletionLogProbs
from troupe.grpo import LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.policy import (
    PRESETS,
    GenerationConfig,
    NetworkConfig,
    Policy,
    RolloutEngine,
    RolloutRequest,
    Weights,
    parameter_count,
)

GROUP = 8
"""Rows that share a prompt, where there are so many."""
LEARN_ROWS, LEARN_TOKENS, LEARN_PROMPT = 8, 512, 64
_LEAST_GB = 16.0
"""That learning and decoding of the larger policy take beside each other, with room for what MLX keeps."""
_LR = 1e-6


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured with."""

    name: str
    policy: NetworkConfig
    dtype: str
    prompt_tokens: int = 128
    new_tokens: int = 128
    learn_tokens: int = LEARN_TOKENS
    overlap_tokens: int = LEARN_TOKENS
    """Of the rows of a step that goes on beside decoding."""
    copy_bytes: int = 2**28

    @property
    def parameters(self) -> int:
        """Numbers of the policy."""
        return parameter_count(self.policy)


SMALL = Size(
    name="8.9 million parameters",
    policy=NetworkConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    ),
    dtype="float32",
    new_tokens=32,
    overlap_tokens=128,
    copy_bytes=2**26,
)
"""For processors, and for cards without memory for the other."""
LARGE = Size(name="Qwen3-0.6B", policy=PRESETS["Qwen3-0.6B"], dtype="bfloat16")


def size_for(limit_gb: float | None) -> Size:
    """The size for a device whose arrays may take so much; None: a processor."""
    return LARGE if limit_gb is not None and limit_gb >= _LEAST_GB else SMALL


class Decoding:
    """Rounds of decoding of so many rows. Belongs to the thread that made it."""

    def __init__(self, size: Size, policy: Policy, rows: int) -> None:
        self._size, self._prompts = size, max(1, rows // GROUP)
        generation = GenerationConfig(num_generations=rows // self._prompts, max_completion_length=size.new_tokens)
        self.engine = RolloutEngine(size.policy, generation, stop_ids=frozenset(), base=policy.base)
        self.engine.load(policy.weights, 0)

    def round(self, number: int = 0) -> str:
        """Decode one round → a digest of its tokens and log-probabilities. `number` decides prompts and noise."""
        dice, size = random.Random(number), self._size
        requests = [
            RolloutRequest(
                prompt_ids=tuple(dice.randrange(size.policy.vocab_size) for _ in range(size.prompt_tokens)),
                key=(0, number, place),
            )
            for place in range(self._prompts)
        ]
        groups = sorted(self.engine.decode(requests), key=lambda group: group.index)
        said = [(list(each.token_ids), list(each.log_probs)) for group in groups for each in group.completions]
        return hashlib.sha256(repr(said).encode()).hexdigest()


class Learning:
    """Steps of the learner from the same weights."""

    def __init__(self, size: Size, weights: Weights) -> None:
        dice, vocabulary = random.Random(0), size.policy.vocab_size
        prompt_tokens = min(LEARN_PROMPT, size.learn_tokens // 2)
        prompt = [dice.randrange(vocabulary) for _ in range(prompt_tokens)]
        rows = [
            [dice.randrange(vocabulary) for _ in range(size.learn_tokens - prompt_tokens)] for _ in range(LEARN_ROWS)
        ]
        advantages = [dice.gauss(0, 1) for _ in rows]
        self._batch = make_batch(
            [prompt] * LEARN_ROWS, rows, [[-10.0] * len(row) for row in rows], advantages, pad_id=0
        )
        self._log_probs = CompletionLogProbs(size.policy, 1.0, recompute=True, entropy_gradient=False)
        self._weights, self._state = weights, adamw_init(weights)
        mx.eval(self._state)

    def step(self) -> Weights:
        """One step; the next goes on with the optimizer's state, and with the weights of the beginning."""
        result = train_on_batch(self._weights, self._state, self._batch, self._log_probs, LearnerConfig(), lr=_LR)
        mx.eval(result.weights, result.optimizer_state)
        self._state = result.optimizer_state
        return result.weights


def digest(weights: Weights) -> str:
    """Of all bits of some weights."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(memoryview(cast(Any, mx.contiguous(weights[name]).view(mx.uint8))))
        found.update(memoryview(cast(Any, mx.contiguous(weights[name]).view(mx.uint8))))
    return found.hexdigest()


def copier(size: Size) -> Callable[[], None]:
    """What copies an array of `copy_bytes` once, when called."""
    array = mx.zeros((size.copy_bytes // 4,), dtype=mx.uint32)
    mx.eval(array)

    def copy() -> None:
        mx.eval(array + 1)

    return copy
