"""The loop of the engine against an oracle that knows no batch: each row alone, whole, in numpy, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from troupe.policy.decode import loop as decoding
from troupe.policy.decode import memory
from troupe.policy.decode.drawing import NOISE_BLOCK, noise_block, row_key
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import Completion, GenerationConfig, RolloutRequest
from troupe.policy.model import load_policy, random_policy
from troupe.policy.network.architecture import Qwen3Config

CONFIG = Qwen3Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    initializer_range=0.25,
)
POLICY = random_policy(CONFIG, seed=5)
TOLERANCE = 1e-4
ROOM = CONFIG.max_position_embeddings


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    normalized: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalized


def logits_alone(prompt: tuple[int, ...], completion: Completion) -> np.ndarray:
    """(T, V) float64: what foretells each token of this one row, from a forward over nothing but the row."""
    row = [*prompt, *completion.token_ids]
    ids = mx.array([row + [0] * (ROOM - len(row))])  # padding on the right is never seen
    logits: np.ndarray = np.array(POLICY.model(ids))[0, len(prompt) - 1 : len(row) - 1].astype(np.float64)
    return logits


def uniforms(request: RolloutRequest, sample: int, purpose: bytes = b"") -> np.ndarray:
    blocks = [noise_block([row_key(request.key, sample)], n, purpose) for n in range(ROOM // NOISE_BLOCK)]
    numbers: np.ndarray = np.concatenate([np.array(block)[0] for block in blocks])
    return numbers


def check_draws(log_probs: np.ndarray, numbers: np.ndarray, token_ids: tuple[int, ...]) -> int:
    """Each token must be the one that its number draws from (T, V) log-probs → how many tokens differ.

    A token may differ only where the number lies within the tolerance of a boundary between the two.
    """
    differ = 0
    for row, number, token in zip(np.exp(log_probs), numbers[: len(token_ids)], token_ids, strict=True):
        ends = np.cumsum(row)
        if token == int(np.argmax(ends > number)):
            continue
        differ += 1
        begin = ends[token - 1] if token else 0.0
        assert begin - TOLERANCE <= number <= ends[token] + TOLERANCE
        assert row[token] > 0
    return differ


def test_the_oracle_of_draws_sees_a_wrong_token() -> None:
    log_probs = np.log(np.array([[0.25, 0.5, 0.25]] * 2))
    assert check_draws(log_probs, np.array([0.3, 0.8]), (1, 2)) == 0
    assert check_draws(log_probs, np.array([0.25 + TOLERANCE / 2, 0.8]), (0, 2)) == 1
    with pytest.raises(AssertionError):
        check_draws(log_probs, np.array([0.3, 0.8]), (0, 2))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[RolloutRequest], GenerationConfig, frozenset[int], int, int, int]:
    """Requests, settings, stop ids; how often rows leave, tokens prefilled at once, prompts that memory is for."""
    lengths = draw(st.lists(st.integers(1, ROOM - 1), min_size=1, max_size=6))
    seed = draw(st.integers(0, 2**32))
    requests = [
        RolloutRequest(prompt_ids=tuple((seed + 7 * i + 3 * j) % 61 for j in range(n)), key=(seed, i))
        for i, n in enumerate(lengths)
    ]
    generation = GenerationConfig(
        num_generations=draw(st.integers(1, 4)),
        max_completion_length=draw(st.integers(1, 24)),
        temperature=draw(st.sampled_from([1.0, 0.7, 1.5])),
    )
    stop_ids = frozenset(draw(st.sets(st.integers(0, 60), max_size=12)))
    return (
        requests,
        generation,
        stop_ids,
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 40, 100, 8192])),
        draw(st.integers(1, 6)),
    )


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from([(memory.WHOLE_PROMPT, memory.PIECE_TOKENS), (5, 9), (20, 64), (0, 1)]))
def test_any_batch_is_its_rows_alone(
    case: tuple[list[RolloutRequest], GenerationConfig, frozenset[int], int, int, int], pieces: tuple[int, int]
) -> None:
    """`pieces`: up to how many places prompts are computed whole, and else how many tokens at once."""
    requests, generation, stop_ids, compact_every, prefill_tokens, together = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "COMPACT_EVERY", compact_every)
        patch.setattr(memory, "PREFILL_TOKENS", prefill_tokens)
        patch.setattr(memory, "WHOLE_PROMPT", pieces[0])
        patch.setattr(memory, "PIECE_TOKENS", pieces[1])
        engine = RolloutEngine(CONFIG, generation, stop_ids=stop_ids)
        engine.load(POLICY.weights, 0)
        limit = engine.memory_bytes([max(len(request.prompt_ids) for request in requests)] * together) / 1e9
        engine = RolloutEngine(
            CONFIG, msgspec.structs.replace(generation, memory_limit_gb=limit * 1.5), stop_ids=stop_ids
        )
        engine.load(POLICY.weights, 0)
        groups = {group.index: group.completions for group in engine.decode(requests)}
    assert sorted(groups) == list(range(len(requests)))
    for index, request in enumerate(requests):
        longest = min(generation.max_completion_length, ROOM - len(request.prompt_ids))
        for sample, completion in enumerate(groups[index]):
            ids = completion.token_ids
            alone = log_softmax(logits_alone(request.prompt_ids, completion) / generation.temperature)
            np.testing.assert_allclose(completion.log_probs, alone[np.arange(len(ids)), list(ids)], atol=TOLERANCE)
            check_draws(alone, uniforms(request, sample), ids)
            end = next((n for n, id_ in enumerate(ids, 1) if id_ in stop_ids), longest)
            assert len(ids) == end
            assert completion.finish_reason == ("stop" if ids[-1] in stop_ids else "length")


def adjusted(
    logits: np.ndarray, context: list[int], settings: dict[str, Any], number: float, spared: frozenset[int]
) -> np.ndarray:
    """Bias, penalties, temperature 0.8 and XTC for one token, (V,) logits → (V,) log-probs, by definition."""
    logits = logits.copy()
    for id_, bias in settings.get("logit_bias", {}).items():
        logits[id_] += bias
    penalty, W = settings.get("repetition_penalty", 1.0), settings.get("repetition_context_size", 20)
    for id_ in set(context[-W:]):
        logits[id_] *= penalty if logits[id_] < 0 else 1 / penalty
    for id_ in set(context[-settings.get("presence_context_size", 20) :]):
        logits[id_] -= settings.get("presence_penalty", 0.0)
    for id_ in context[-settings.get("frequency_context_size", 20) :]:
        logits[id_] -= settings.get("frequency_penalty", 0.0)
    log_probs = log_softmax(logits / 0.8)
    if number < settings.get("xtc_probability", 0.0):
        above = [id_ for id_ in range(61) if np.exp(log_probs[id_]) > settings["xtc_threshold"]]
        for id_ in sorted(above, key=lambda id_: -log_probs[id_])[:-1]:
            if id_ not in spared:
                log_probs[id_] = -np.inf
    return log_softmax(log_probs)


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.5, "repetition_context_size": 6},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7, "frequency_context_size": 40},
        {"logit_bias": {3: 4.0, 5: -float("inf")}},
        {"xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"xtc_probability": 1.0, "xtc_threshold": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    ],
)
def test_penalties_look_back_over_prompt_and_completion(change: dict[str, Any]) -> None:
    stop_ids = frozenset(range(0, 61, 9))
    generation = GenerationConfig(num_generations=4, max_completion_length=30, temperature=0.8, **change)
    requests = [RolloutRequest(prompt_ids=tuple(range(n, 2 * n)), key=(n,)) for n in (1, 4, 11, 30)]
    engine = RolloutEngine(CONFIG, generation, stop_ids=stop_ids)
    engine.load(POLICY.weights, 0)
    changed = differ = 0
    for group in engine.decode(requests):
        request = requests[group.index]
        for sample, completion in enumerate(group.completions):
            ids = completion.token_ids
            logits = logits_alone(request.prompt_ids, completion)
            numbers = uniforms(request, sample, b"filter")
            row = [*request.prompt_ids, *ids]
            really = np.stack(
                [
                    adjusted(logits[t], row[: len(request.prompt_ids) + t], change, numbers[t], stop_ids)
                    for t in range(len(ids))
                ]
            )
            places = (np.arange(len(ids)), list(ids))
            np.testing.assert_allclose(completion.log_probs, log_softmax(logits / 0.8)[places], atol=TOLERANCE)
            np.testing.assert_allclose(completion.sampling_log_probs, really[places], atol=TOLERANCE)
            differ += check_draws(really, uniforms(request, sample), ids)
            changed += int((np.abs(np.subtract(completion.log_probs, completion.sampling_log_probs)) > 0.01).sum())
    assert changed > 20
    assert differ <= 2


def test_xtc_spares_special_tokens_and_newlines(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    generation = GenerationConfig(xtc_probability=0.5)
    engine = RolloutEngine(policy.config, generation, stop_ids=frozenset({3}), tokenizer=policy.tokenizer)
    assert engine.sampler.special_ids == (3, 10, 256, 257)
    assert RolloutEngine(policy.config, generation, stop_ids=frozenset({3})).sampler.special_ids == (3,)
