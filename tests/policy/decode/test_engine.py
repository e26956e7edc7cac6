"""The decoding engine against whole-row forwards, against itself row by row, and against the distribution."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support.tiny import small_network
from troupe.errors import ModelError
from troupe.policy.decode import cache
from troupe.policy.decode import loop as decoding
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.loop import draw_tokens
from troupe.policy.decode.memory import fused_copy_bytes
from troupe.policy.decode.requests import CompletedGroup, Completion, GenerationConfig, RolloutRequest
from troupe.policy.decode.sampling import Sampler
from troupe.policy.load import load_policy
from troupe.policy.model import Policy, random_policy
from troupe.policy.network.tensors import init_weights

CONFIG = small_network(vocab_size=61, max_position_embeddings=80, initializer_range=0.25)
POLICY = random_policy(CONFIG, seed=5)
STOP = frozenset({7, 8, 9})
RAGGED = [
    RolloutRequest(prompt_ids=tuple((3 * i + n) % 61 for i in range(n)), key=(0, 1, n)) for n in (4, 9, 1, 30, 17)
]
EQUAL = [RolloutRequest(prompt_ids=tuple(range(n, n + 6)), key=(0, 2, n)) for n in range(3)]


def engine_for(
    generation: GenerationConfig, *, stop_ids: frozenset[int] = STOP, policy: Policy = POLICY
) -> RolloutEngine:
    engine = RolloutEngine(policy.config, generation, stop_ids=stop_ids)
    engine.load(policy.weights, 0)
    return engine


def by_index(groups: Iterable[CompletedGroup]) -> list[tuple[Completion, ...]]:
    return [group.completions for group in sorted(groups, key=lambda group: group.index)]


def scaled_log_probs(prompt: tuple[int, ...], completion: Completion, temperature: float) -> np.ndarray:
    """(T, V) log-softmax(logits / temperature) from one forward over the whole row, in float64."""
    ids = mx.array([[*prompt, *completion.token_ids]])
    logits = np.array(POLICY.model(ids))[0, len(prompt) - 1 : -1].astype(np.float64) / temperature
    logits -= logits.max(axis=-1, keepdims=True)
    normalized: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalized


def largest_gap(
    requests: list[RolloutRequest], groups: list[tuple[Completion, ...]], temperature: float = 1.0
) -> float:
    """Between the log-probs that the engine reports and those of whole-row forwards."""
    gaps = []
    for request, completions in zip(requests, groups, strict=True):
        for completion in completions:
            table = scaled_log_probs(request.prompt_ids, completion, temperature)
            theirs = table[np.arange(len(table)), list(completion.token_ids)]
            gaps.append(np.abs(theirs - completion.log_probs).max())
    return float(max(gaps))


@pytest.mark.parametrize("requests", [RAGGED, EQUAL])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_whole_rows(requests: list[RolloutRequest], temperature: float) -> None:
    generation = GenerationConfig(num_generations=4, max_completion_length=40, temperature=temperature)
    groups = by_index(engine_for(generation).decode(requests))
    assert largest_gap(requests, groups, temperature) < 1e-4
    assert all(c.sampling_log_probs == c.log_probs for group in groups for c in group)


def test_a_batch_is_its_rows_alone() -> None:
    engine = engine_for(GenerationConfig(num_generations=3, max_completion_length=30))
    together = by_index(engine.decode(RAGGED))
    for request, group in zip(RAGGED, together, strict=True):
        [alone] = by_index(engine.decode([request]))
        for one, other in zip(alone, group, strict=True):
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_runs_repeat_bit_for_bit() -> None:
    generation = GenerationConfig(num_generations=4, max_completion_length=30)
    first, second = (list(engine_for(generation).decode(RAGGED)) for _ in range(2))
    assert first == second


def test_keys_alone_tell_samples_apart() -> None:
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=20), stop_ids=frozenset())
    request = EQUAL[0]
    other = msgspec.structs.replace(request, key=(0, 2, 99))
    same, again, different = by_index(engine.decode([request, request, other]))
    assert [c.token_ids for c in same] == [c.token_ids for c in again]
    assert len({c.token_ids for c in (*same, *different)}) == 4


def test_rows_end_at_stop_ids_or_at_the_limit() -> None:
    engine = engine_for(GenerationConfig(num_generations=6, max_completion_length=25))
    reasons = set()
    for group in by_index(engine.decode(RAGGED)):
        for completion in group:
            assert not STOP & set(completion.token_ids[:-1])
            stopped = completion.token_ids[-1] in STOP
            assert completion.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(completion.token_ids) == 25
            lengths = {len(completion.token_ids), len(completion.log_probs), len(completion.versions)}
            assert lengths == {len(completion.sampling_log_probs)}
            reasons.add(completion.finish_reason)
    assert reasons == {"stop", "length"}


def test_positions_bound_each_prompt_by_itself() -> None:
    requests = [RolloutRequest(prompt_ids=(1,) * n, key=(n,)) for n in (10, 75, 79)]
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=50), stop_ids=frozenset())
    groups = list(engine.decode(requests))
    assert [group.index for group in groups] == [2, 1, 0]
    assert [len(c.token_ids) for group in by_index(groups) for c in group] == [50, 50, 5, 5, 1, 1]
    assert largest_gap(requests, by_index(groups)) < 1e-4


def test_groups_come_when_their_last_row_ends_ties_in_request_order() -> None:
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=40))
    requests = [RolloutRequest(prompt_ids=(i + 1, i + 2), key=(i,)) for i in range(12)]
    groups = list(engine.decode(requests))
    ends = [(max(len(c.token_ids) for c in group.completions), group.index) for group in groups]
    assert ends == sorted(ends)
    assert sorted(group.index for group in groups) == list(range(12))


def test_finished_rows_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    draw = draw_tokens

    def counting(sampler: Sampler, logits: mx.array, *rest: mx.array, by_kernel: bool) -> list[mx.array]:
        sizes.append(logits.shape[0])
        return draw(sampler, logits, *rest, by_kernel=by_kernel)

    monkeypatch.setattr("troupe.policy.decode.loop.draw_tokens", counting)
    stop = frozenset(range(0, 61, 4))
    engine = engine_for(GenerationConfig(num_generations=8, max_completion_length=60), stop_ids=stop)
    groups = by_index(engine.decode(RAGGED))
    assert largest_gap(RAGGED, groups) < 1e-4
    assert sizes[0] == 40
    assert sizes[-1] < 20
    changes = [t for t, (a, b) in enumerate(itertools.pairwise(sizes), 1) if a != b]
    assert changes
    assert all(t % decoding.COMPACT_EVERY == 0 for t in changes)
    longest = max(len(c.token_ids) for group in groups for c in group)
    assert len(sizes) <= min(60, longest + 1)  # one token is on its way when the last row ends


@pytest.mark.parametrize("change", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.9}])
def test_filtered_log_probs_are_renormalized(change: dict[str, float]) -> None:
    generation = msgspec.convert(
        {"num_generations": 3, "max_completion_length": 12, "temperature": 0.9, **change}, GenerationConfig
    )
    groups = by_index(engine_for(generation).decode(EQUAL))
    assert largest_gap(EQUAL, groups, 0.9) < 1e-4
    sampler = Sampler(generation)
    for request, completions in zip(EQUAL, groups, strict=True):
        for completion in completions:
            table = scaled_log_probs(request.prompt_ids, completion, 0.9)
            kept = np.array(sampler.filter(mx.array(table.astype(np.float32)))).astype(np.float64)
            kept -= np.log(np.exp(kept).sum(axis=-1, keepdims=True))
            theirs = kept[np.arange(len(kept)), list(completion.token_ids)]
            np.testing.assert_allclose(completion.sampling_log_probs, theirs, atol=1e-4)


def test_temperature_zero_takes_the_likeliest_and_reports_plain_log_probs() -> None:
    generation = GenerationConfig(num_generations=2, max_completion_length=10, temperature=0.0)
    groups = by_index(engine_for(generation).decode(RAGGED))
    assert largest_gap(RAGGED, groups) < 1e-4
    for request, completions in zip(RAGGED, groups, strict=True):
        table = scaled_log_probs(request.prompt_ids, completions[0], 1.0)
        assert list(completions[0].token_ids) == table.argmax(axis=-1).tolist()
        assert completions[0] == completions[1]


@pytest.mark.parametrize("change", [{}, {"top_k": 6}, {"temperature": 1.7}])
def test_samples_follow_the_distribution(change: dict[str, float]) -> None:
    n = 4000
    settings = {"num_generations": n, "max_completion_length": 1, **change}
    generation = msgspec.convert(settings, GenerationConfig)
    request = EQUAL[1]
    [group] = by_index(engine_for(generation).decode([request]))
    counts = np.bincount([c.token_ids[0] for c in group], minlength=61)
    log_probs = scaled_log_probs(request.prompt_ids, group[0], generation.temperature)[0]
    kept = np.array(Sampler(generation).filter(mx.array(log_probs.astype(np.float32))[None]))[0]
    shares = np.exp(kept.astype(np.float64))
    shares /= shares.sum()
    assert counts[shares == 0].sum() == 0
    rare = shares * n < 5  # a chi-square wants five expected in every cell, so the rare ones share one
    expected = np.append(shares[~rare], shares[rare].sum()) * n
    seen = np.append(counts[~rare], counts[rare].sum())
    filled = expected > 0
    chi_square = ((seen - expected)[filled] ** 2 / expected[filled]).sum()
    freedom = filled.sum() - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)  # about one in 30,000


def test_weights_exchanged_between_tokens_mark_every_token_with_its_version() -> None:
    requests = [RolloutRequest(prompt_ids=(5, 6), key=(n,)) for n in range(4)]
    requests.append(RolloutRequest(prompt_ids=(1,) * 70, key=(9,)))  # has room for ten tokens, so it ends first
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=30), stop_ids=frozenset())
    before = by_index(engine.decode(requests))
    newer = init_weights(CONFIG, mx.random.key(77))
    mx.eval(newer)
    running = engine.decode(requests)
    first = next(running)
    assert first.index == 4
    engine.load(newer, 1)
    after = by_index(running)
    for old, new in zip(before[:4], after, strict=True):
        for one, other in zip(old, new, strict=True):
            switch = other.versions.index(1)
            assert other.versions == (0,) * switch + (1,) * (30 - switch)
            assert 10 <= switch <= 12
            assert one.token_ids[:switch] == other.token_ids[:switch]
            assert one.token_ids != other.token_ids
    engine.load(newer, 1)
    fresh = by_index(engine.decode(requests))
    assert fresh[0][0].versions == (1,) * 30


def test_abort_from_another_thread_hands_over_what_there_is() -> None:
    generation = GenerationConfig(num_generations=2, max_completion_length=40)
    requests = [RolloutRequest(prompt_ids=(5,), key=(0,)), RolloutRequest(prompt_ids=(1,) * 77, key=(1,))]
    engine = engine_for(generation, stop_ids=frozenset())
    whole = by_index(engine.decode(requests))
    running = engine.decode(requests)
    assert next(running).index == 1
    caller = threading.Thread(target=engine.abort)
    caller.start()
    caller.join()
    [cut] = list(running)
    assert cut.index == 0
    for one, other in zip(cut.completions, whole[0], strict=True):
        assert one.finish_reason == "aborted"
        assert 3 <= len(one.token_ids) <= 5
        assert one.token_ids == other.token_ids[: len(one.token_ids)]
        assert len(one.versions) == len(one.log_probs) == len(one.token_ids)
    assert by_index(engine.decode(requests)) == whole  # and the next decode is none the worse


def test_groups_that_end_at_the_same_token_come_together() -> None:
    generation = GenerationConfig(num_generations=2, max_completion_length=9)
    engine = engine_for(generation)
    prompts_read, *lists = list(engine.decode_lists(RAGGED))
    assert prompts_read == []
    assert [group for together in lists for group in together] == list(engine.decode(RAGGED))
    ends = [{max(len(c.token_ids) for c in group.completions) for group in together} for together in lists]
    assert all(len(lengths) == 1 for lengths in ends)
    order = [lengths.pop() for lengths in ends]
    assert order == sorted(set(order)), "one list a token"
    alike = list(engine_for(generation, stop_ids=frozenset()).decode_lists(EQUAL))
    assert [[group.index for group in together] for together in alike] == [[], [0, 1, 2]]
    with pytest.raises(ModelError, match="request 1: its prompt is empty"):
        engine.decode_lists([RAGGED[0], RolloutRequest(prompt_ids=(), key=(0,))])


def test_abort_before_the_first_token_leaves_nothing() -> None:
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=4))
    running = engine.decode(EQUAL)
    engine.abort()
    assert list(running) == []


def test_nothing_to_decode() -> None:
    assert list(engine_for(GenerationConfig()).decode([])) == []


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "request 1: its prompt is empty"),
        ((1, 61), r"request 1: id 61 is not in the model's vocabulary \[0, 61\)"),
        ((-1,), "request 1: id -1"),
        ((1,) * 80, "request 1: a prompt of 80 tokens leaves no room .* 80 positions"),
    ],
)
def test_unusable_prompts_are_refused_before_decoding(prompt: tuple[int, ...], message: str) -> None:
    requests = [EQUAL[0], RolloutRequest(prompt_ids=prompt, key=(1,))]
    with pytest.raises(ModelError, match=message):
        engine_for(GenerationConfig()).decode(requests)


def test_decode_needs_weights() -> None:
    engine = RolloutEngine(CONFIG, GenerationConfig(), stop_ids=STOP)
    with pytest.raises(RuntimeError, match="decode came before load"):
        engine.decode(EQUAL)


def test_long_prompts_are_prefilled_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    generation = GenerationConfig(num_generations=2, max_completion_length=6)
    whole = by_index(engine_for(generation).decode(RAGGED))
    monkeypatch.setattr(cache, "PREFILL_TOKENS", 20)
    parts = by_index(engine_for(generation).decode(RAGGED))
    assert [[c.token_ids for c in group] for group in parts] == [[c.token_ids for c in group] for group in whole]


def test_stop_strings_end_rows_and_stay_in_the_text(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    free = GenerationConfig(num_generations=4, max_completion_length=30)
    letters = policy.tokenizer.decode(range(97, 123))
    generation = msgspec.structs.replace(free, stop=tuple(letters))
    requests = [RolloutRequest(prompt_ids=(97, n), key=(n,)) for n in range(6)]

    def decode(generation: GenerationConfig) -> list[tuple[Completion, ...]]:
        engine = RolloutEngine(policy.config, generation, stop_ids=policy.eos_ids, tokenizer=policy.tokenizer)
        engine.load(policy.weights, 0)
        return by_index(engine.decode(requests))

    ended = 0
    for whole, cut in zip(decode(free), decode(generation), strict=True):
        for long, short in zip(whole, cut, strict=True):
            first = next((n for n, id_ in enumerate(long.token_ids, 1) if 97 <= id_ < 123), len(long.token_ids))
            assert short.token_ids == long.token_ids[:first]
            if 97 <= short.token_ids[-1] < 123:
                assert short.finish_reason == "stop"
                assert policy.tokenizer.decode_sampled(short.token_ids)[-1] in letters
                ended += 1
    assert ended > 5


def test_stop_strings_without_tokenizer_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no tokenizer"):
        RolloutEngine(CONFIG, GenerationConfig(stop=("x",)), stop_ids=STOP)


def test_rows_that_repeat_themselves_are_cut_off() -> None:
    generation = GenerationConfig(num_generations=1, max_completion_length=60, temperature=0.0)
    whole = by_index(engine_for(generation, stop_ids=frozenset()).decode(RAGGED))
    cutting = msgspec.structs.replace(generation, repetition_cutoff=3, repetition_pattern=8)
    cut = by_index(engine_for(cutting, stop_ids=frozenset()).decode(RAGGED))
    reasons = [group[0].finish_reason for group in cut]
    assert "repetition" in reasons  # greedy decoding of random weights falls into loops
    for (long,), (short,) in zip(whole, cut, strict=True):
        ids = short.token_ids
        assert ids == long.token_ids[: len(ids)]
        repeats = any(ids[-p:] * 3 == ids[-3 * p :] for p in range(1, 9))
        assert repeats == (short.finish_reason == "repetition")


def test_a_stream_is_the_completion_as_it_comes() -> None:
    engine = engine_for(GenerationConfig(num_generations=1, max_completion_length=20))
    for request in RAGGED:
        [group] = engine.decode([request])
        assert tuple(engine.stream(request)) == group.completions[0].token_ids
    coming = engine.stream(RAGGED[0])
    next(coming)
    engine.abort()
    assert list(coming) == []
    with pytest.raises(ModelError, match="prompt is empty"):
        engine.stream(RolloutRequest(prompt_ids=(), key=()))
    with pytest.raises(ValueError, match="num_generations is 2"):
        engine_for(GenerationConfig(num_generations=2)).stream(RAGGED[0])


def test_a_memory_limit_makes_waves_and_the_same_tokens() -> None:
    free = GenerationConfig(num_generations=3, max_completion_length=20)
    engine = engine_for(free)
    together = by_index(engine.decode(RAGGED))
    limit = engine.memory_bytes([4, 9, 1]) / 1e9
    limited = engine_for(msgspec.structs.replace(free, memory_limit_gb=limit))
    groups = list(limited.decode(RAGGED))
    waves = [0 if group.index < 3 else 1 if group.index == 3 else 2 for group in groups]
    assert waves == [0, 0, 0, 1, 2]
    assert list(limited.decode(RAGGED)) == groups
    for ours, theirs in zip(by_index(groups), together, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.token_ids == other.token_ids
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_a_prompt_beyond_the_memory_limit_is_refused_before_decoding() -> None:
    engine = engine_for(GenerationConfig(num_generations=3, max_completion_length=20, memory_limit_gb=1e-5))
    with pytest.raises(ModelError, match=r"request 0: 3 completions .* take .* GB, but memory_limit_gb is 1e-05"):
        engine.decode(RAGGED)


def test_abort_leaves_out_waves_not_begun() -> None:
    free = GenerationConfig(num_generations=2, max_completion_length=20)
    limit = engine_for(free).memory_bytes([30]) / 1e9
    engine = engine_for(msgspec.structs.replace(free, memory_limit_gb=limit), stop_ids=frozenset())
    running = engine.decode([RAGGED[3]] * 3)
    assert next(running).index == 0
    engine.abort()
    assert list(running) == []


def test_released_weights_are_let_go_and_others_loaded() -> None:
    policy = random_policy(CONFIG, seed=1)
    engine = RolloutEngine(CONFIG, GenerationConfig(num_generations=2, max_completion_length=4), stop_ids=frozenset())
    request = RolloutRequest(prompt_ids=(1, 2, 3), key=(0,))
    engine.load(policy.weights, 0)
    [first] = engine.decode([request])
    mx.clear_cache()
    held = mx.get_active_memory()
    engine.release()
    assert held - mx.get_active_memory() >= fused_copy_bytes(CONFIG, mx.float32)
    with pytest.raises(RuntimeError, match="no weights yet"):
        engine.decode([request])
    engine.load(policy.weights, 0)
    assert list(engine.decode([request])) == [first]


def test_how_far_a_decode_is_can_be_asked_at_any_time() -> None:
    """Each group that comes is as long as the engine says, give or take the token that is under way."""
    engine = engine_for(GenerationConfig(num_generations=2, max_completion_length=20))
    seen = []
    for group in engine.decode(RAGGED):
        longest = max(len(completion.token_ids) for completion in group.completions)
        assert abs(longest - engine.tokens) <= 1
        seen.append(engine.tokens)
    assert seen == sorted(seen)
    next(iter(engine.decode_lists(EQUAL)))
    assert engine.tokens == 0, "only the prompts are read"
