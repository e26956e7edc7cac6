"""The loop of the engine against an oracle that knows no batch: each row alone, whole, in numpy, token by token. Its
dice: uniform and independent noise, a draw that never leaves the support."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.devices import compute_on
from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import small_network
from troupe.policy.decode import cache
from troupe.policy.decode import loop as decoding
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import Completion, GenerationConfig, RolloutRequest
from troupe.policy.decode.rows import NOISE_BLOCK, noise_block, row_key
from troupe.policy.decode.sampling import draw_by_shares
from troupe.policy.load import load_policy
from troupe.policy.model import Policy, random_policy
from troupe.policy.network.elementwise import exp

CONFIG = small_network(vocab_size=61, max_position_embeddings=64, initializer_range=0.25)
POLICY = random_policy(CONFIG, seed=5)
POLICIES = {
    name: shaken_policy(config, seed=5) for name, config in family_configs(hidden_size=32).items() if name != "qwen3"
} | {"qwen3": POLICY}
QUICK = ("qwen3", "qwen3-moe", "qwen3_5", "gemma3")
TOLERANCE = 1e-4
ROOM = CONFIG.max_position_embeddings


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=-1, keepdims=True)
    normalized: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalized


def logits_alone(prompt: tuple[int, ...], completion: Completion, policy: Policy = POLICY) -> np.ndarray:
    """(T, V) float64: what foretells each token of this one row, from a forward over nothing but the row."""
    row = [*prompt, *completion.token_ids]
    ids = mx.array([row + [0] * (ROOM - len(row))])  # padding on the right is never seen
    logits: np.ndarray = np.array(policy.model(ids))[0, len(prompt) - 1 : len(row) - 1].astype(np.float64)
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


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in POLICIES]
)
@settings(max_examples=5, deadline=None)
@given(cases(), st.sampled_from([(cache.WHOLE_PROMPT, cache.PIECE_TOKENS), (5, 9), (20, 64), (0, 1)]), st.booleans())
def test_any_batch_is_its_rows_alone(
    family: str,
    case: tuple[list[RolloutRequest], GenerationConfig, frozenset[int], int, int, int],
    pieces: tuple[int, int],
    on_cpu: bool,
) -> None:
    """`pieces`: up to how many places prompts are computed whole, and else how many tokens at once."""
    requests, generation, stop_ids, compact_every, prefill_tokens, together = case
    policy, tolerance = POLICIES[family], TOLERANCE * (4 if family.startswith("qwen3_5") else 1)  # its norms magnify
    with pytest.MonkeyPatch.context() as patch:
        compute_on(patch, cpu=on_cpu)
        patch.setattr(decoding, "COMPACT_EVERY", compact_every)
        patch.setattr(cache, "PREFILL_TOKENS", prefill_tokens)
        patch.setattr(cache, "WHOLE_PROMPT", pieces[0])
        patch.setattr(cache, "PIECE_TOKENS", pieces[1])
        engine = RolloutEngine(policy.config, generation, stop_ids=stop_ids)
        engine.load(policy.weights, 0)
        limit = engine.memory_bytes([max(len(request.prompt_ids) for request in requests)] * together) / 1e9
        engine = RolloutEngine(
            policy.config, msgspec.structs.replace(generation, memory_limit_gb=limit * 1.5), stop_ids=stop_ids
        )
        engine.load(policy.weights, 0)
        groups = {group.index: group.completions for group in engine.decode(requests)}
    assert sorted(groups) == list(range(len(requests)))
    for index, request in enumerate(requests):
        longest = min(generation.max_completion_length, ROOM - len(request.prompt_ids))
        for sample, completion in enumerate(groups[index]):
            ids = completion.token_ids
            alone = log_softmax(logits_alone(request.prompt_ids, completion, policy) / generation.temperature)
            np.testing.assert_allclose(completion.log_probs, alone[np.arange(len(ids)), list(ids)], atol=tolerance)
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


def test_noise_is_uniform_and_belongs_to_key_and_block() -> None:
    keys = [row_key((3, 1, 4), i) for i in range(2000)]
    assert len({*keys, row_key((3, 1), 4), row_key((31, 4), 0)}) == 2002
    noise = np.array(noise_block(keys, 0))
    assert noise.shape == (2000, 16)
    assert noise.min() >= 0
    assert noise.max() < 1
    counts = np.bincount((noise * 20).astype(int).ravel(), minlength=20)
    assert ((counts - 1600) ** 2 / 1600).sum() < 19 + 4 * np.sqrt(38)
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1
    np.testing.assert_array_equal(np.array(noise_block(keys[7:8], 0)), noise[7:8])
    assert not np.any(np.array(noise_block(keys[:1], 1)) == noise[0])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_draw_never_leaves_the_support(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    compute_on(monkeypatch, cpu=on_cpu)
    shares = mx.array([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]] * 7)
    uniforms = mx.array([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24, 1.0])
    assert draw_by_shares(shares, uniforms).tolist() == [1, 1, 3, 3, 4, 4, 4]


def test_the_draw_survives_a_real_vocabulary() -> None:
    V = 151_936
    shares = exp(mx.random.normal((4, V), key=mx.random.key(0)) * 3)
    shares[:, -1000:] = 0
    ids = np.array(draw_by_shares(shares, mx.array([0.0, 0.5, 0.999, 1 - 2.0**-24])))
    exact = np.array(shares).astype(np.float64)
    ends = np.cumsum(exact, axis=-1) / exact.sum(axis=-1, keepdims=True)
    for row, (token, uniform) in enumerate(zip(ids.astype(int), [0.0, 0.5, 0.999, 1.0], strict=True)):
        assert token < V - 1000
        assert ends[row, token - 1] - 1e-4 <= uniform <= ends[row, token] + 1e-4 if token else uniform == 0.0


def test_the_draw_in_two_steps_inverts_the_exact_distribution() -> None:
    shares = exp(mx.random.normal((64, 2048), key=mx.random.key(1)) * 4)
    shares[:, 128:640] = 0
    shares[:, 1000:1100] = 0
    uniforms = mx.random.uniform(shape=(64,), key=mx.random.key(2))
    uniforms[:3] = mx.array([0.0, 1 - 2.0**-24, 1.0])
    ids = np.array(draw_by_shares(shares, uniforms)).astype(int)
    exact = np.array(shares).astype(np.float64)
    assert np.all(exact[np.arange(64), ids] > 0)
    ends = np.cumsum(exact, axis=-1) / exact.sum(axis=-1, keepdims=True)
    past = ends[np.arange(64), ids]
    wanted = np.array(uniforms).astype(np.float64)
    assert np.all(wanted <= past + 1e-6)
    assert np.all(past - exact[np.arange(64), ids] / exact.sum(axis=-1) <= wanted + 1e-6)


def test_the_draw_in_two_steps_takes_the_first_and_last_id_with_a_share() -> None:
    shares = mx.zeros((2, 2048))
    shares[:, 700] = 0.25
    shares[:, 1300] = 0.25
    assert draw_by_shares(shares, mx.array([0.0, 1.0])).tolist() == [700, 1300]
