"""The memory formula against arrays that are held and peaks that MLX measures; how a request list is split."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from tests.support.devices import compute_on
from tests.support.families import family_configs
from troupe.policy.decode import cache
from troupe.policy.decode import loop as decoding
from troupe.policy.decode.cache import DecodingCache, piece_length, prefill_chunks
from troupe.policy.decode.engine import RolloutEngine, split_into_waves
from troupe.policy.decode.memory import (
    cache_bytes,
    decode_memory_bytes,
    fused_copy_bytes,
)
from troupe.policy.decode.requests import GenerationConfig, RolloutRequest, TurnRequest
from troupe.policy.model import random_policy
from troupe.policy.network import attention
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.tensors import FINAL_NORM

MOE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
}


def config_of(**sizes: Any) -> NetworkConfig:
    standard: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 2048,
    }
    return NetworkConfig(**standard | sizes)


def decode(config: NetworkConfig, lengths: list[int], G: int, N: int) -> tuple[int, int]:
    """Decode to the end → (bytes at the peak beside the weights, bytes by the formula)."""
    policy = random_policy(config)
    generation = GenerationConfig(num_generations=G, max_completion_length=N)
    engine = RolloutEngine(config, generation, stop_ids=frozenset())
    engine.load(policy.weights, 0)
    engine.current_weights()
    requests = [RolloutRequest(prompt_ids=(1,) * n, key=(i,)) for i, n in enumerate(lengths)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    list(engine.decode(requests))
    formula = decode_memory_bytes(config, lengths, G, N, mx.float32)
    assert engine.memory_bytes(lengths) == formula
    return mx.get_peak_memory() - before, formula


def test_formula_by_hand() -> None:
    config = config_of(num_hidden_layers=2, num_key_value_heads=2)
    places = 3 * 7 + 3 * 5 * 11
    assert cache_bytes(config, [7, 4, 1], 5, 11, mx.bfloat16) == places * 2 * 2 * 16 * 2 * 2
    held = places * 2 * 2 * 16 * 2 * 4
    own = 3 * 5 * 11 * 2 * 2 * 16 * 2 * 4
    decoding = 9 * 15 * 50 * 4 + 10 * 15 * 4 * 18 * 4 + 8 * 15 * 64 * 4 + own * 2 / 2
    assert decode_memory_bytes(config, [7, 4, 1], 5, 11, mx.float32) == pytest.approx(held + decoding, abs=1)
    more = decode_memory_bytes(config, [7, 4, 1], 5, 11, mx.float32, is_filtering=True)
    assert more == pytest.approx(held + decoding + 19 * 15 * 50 * 4, abs=1)


def test_updates_that_copy_hold_all_own_keys_and_values_twice() -> None:
    config = config_of(num_hidden_layers=8, num_key_value_heads=2)
    own = 3 * 5 * 11 * 2 * 2 * 16 * 8 * 4
    in_place, copied = (
        decode_memory_bytes(config, [7, 4, 1], 5, 11, mx.float32, copies_updates=copies) for copies in (False, True)
    )
    assert copied - in_place == own - own * 2 / 8


@pytest.mark.parametrize(
    ("has_card", "head_dim", "expected"),
    [
        (True, 128, {"writes_scores": False, "copies_updates": False}),
        (True, 32, {"writes_scores": False, "copies_updates": True}),
        (True, 320, {"writes_scores": True, "copies_updates": True}),
        (False, 128, {"writes_scores": False, "copies_updates": True}),
        (False, 32, {"writes_scores": True, "copies_updates": True}),
        (None, 128, {"writes_scores": True, "copies_updates": False}),
    ],
)
def test_an_engine_counts_as_its_device_computes(
    has_card: bool | None, head_dim: int, expected: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an NVIDIA card, on an Apple GPU, and on a processor."""
    compute_on(monkeypatch, cpu=has_card is None)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: bool(has_card))
    monkeypatch.setattr(attention, "_has_cudnn_attention", lambda: True)
    config = config_of(head_dim=head_dim, num_hidden_layers=3)
    engine = RolloutEngine(config, GenerationConfig(num_generations=2, max_completion_length=9), stop_ids=frozenset())
    engine.load({FINAL_NORM: mx.zeros((1,), mx.bfloat16)}, 0)
    expected["in_blocks"] = has_card is None
    assert engine.memory_bytes([300, 7]) == decode_memory_bytes(config, [300, 7], 2, 9, mx.bfloat16, **expected)
    config = config_of(head_dim=head_dim, num_hidden_layers=3, max_position_embeddings=9000)
    engine.config = config
    assert engine.memory_bytes([7000]) == decode_memory_bytes(config, [7000], 2, 9, mx.bfloat16, **expected)


def test_prefilling_of_long_prompts_counts_where_it_is_more() -> None:
    config = config_of(num_hidden_layers=2)
    prompts = 1000 * 2 * 4 * 16 * 2 * 4 * 1.5
    states = 1000 * 8 * 64 * 4
    scores = 2 * 4 * 1000**2 * 4
    assert decode_memory_bytes(config, [1000], 1, 1, mx.float32) == prompts + states + scores
    assert decode_memory_bytes(config, [1000], 1, 1, mx.float32, writes_scores=False) == prompts + states


def test_prompts_go_in_pieces_only_where_they_are_long_and_scores_would_be_written_out() -> None:
    """What is whole keeps its bits, so both numbers stay as they are."""
    assert [piece_length(4, P, writes_scores=True) for P in (1, 2048, 2049)] == [1, 2048, 256]
    assert piece_length(1, 16_000, writes_scores=True) == 1024
    assert piece_length(1, 16_000, writes_scores=False) == 16_000
    config = config_of(num_hidden_layers=2, max_position_embeddings=20_000)
    prompts = 16_000 * 2 * 4 * 16 * 2 * 4 * 1.5
    rest = 1024 * 8 * 64 * 4 + 7 * 4 * 64 * 16_000 * 4
    assert decode_memory_bytes(config, [16_000], 1, 1, mx.float32) == prompts + rest
    at_once = 1024 * 8 * 64 * 4 + 2 * 4 * 1024 * 16_000 * 4
    assert decode_memory_bytes(config, [16_000], 1, 1, mx.float32, in_blocks=False) == prompts + at_once


def test_a_long_prompt_takes_memory_by_its_length_not_by_the_square() -> None:
    config = config_of(num_hidden_layers=2, head_dim=8, max_position_embeddings=6000)
    half, whole = (decode(config, [n], 1, 1) for n in (2500, 5000))
    assert whole[0] < 2.1 * half[0]
    for peak, formula in (half, whole):
        assert 0.3 * formula < peak < 1.1 * formula


def test_keys_and_values_are_those_held(monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[DecodingCache] = []

    class Kept(DecodingCache):
        def advance(self) -> None:
            caches[:] = [self]
            super().advance()

    monkeypatch.setattr(decoding, "DecodingCache", Kept)
    config = config_of(num_hidden_layers=3)
    decode(config, [3, 40, 9], 4, 70)
    # the last token is never attended to; its place is there
    assert sum(x.nbytes for x in caches[0].arrays) == cache_bytes(config, [3, 40, 9], 4, 70, mx.float32)


@pytest.mark.parametrize(
    ("sizes", "lengths", "G", "N"),
    [
        pytest.param({"head_dim": 32}, [4, 20, 9, 4], 8, 128, marks=pytest.mark.slow),
        pytest.param({"head_dim": 32}, [64] * 8, 8, 64, marks=pytest.mark.slow),
        ({"num_hidden_layers": 2, "vocab_size": 30000}, [8] * 4, 8, 8),
    ],
)
def test_the_peak_is_close_to_the_formula(sizes: dict[str, Any], lengths: list[int], G: int, N: int) -> None:
    """How far MLX has let go of one step's arrays when the next one's are made depends on its threads."""
    peak, formula = decode(config_of(**sizes), lengths, G, N)
    assert 0.85 * formula < peak < 1.1 * formula


@pytest.mark.parametrize(
    ("sizes", "lengths", "G", "N"),
    [
        ({"num_hidden_layers": 2}, [512, 300], 2, 4),
        ({"num_hidden_layers": 2, "intermediate_size": 2048}, [32] * 16, 1, 1),
        ({"num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 2}, [4], 32, 100),
        ({"num_hidden_layers": 1, "vocab_size": 2000}, [100, 50, 20, 200], 8, 64),
        pytest.param(MOE, [10, 400, 30], 4, 20, marks=pytest.mark.slow),
        (MOE | {"num_experts_per_tok": 4, "moe_intermediate_size": 32, "num_hidden_layers": 4}, [8] * 4, 8, 64),
    ],
)
def test_the_peak_is_never_more_than_a_tenth_over(sizes: dict[str, Any], lengths: list[int], G: int, N: int) -> None:
    """How much less it is depends on how far MLX runs ahead, which a busy machine does not let it."""
    peak, formula = decode(config_of(**sizes), lengths, G, N)
    assert 0.1 * formula < peak < 1.1 * formula


def take_turns(config: NetworkConfig, lengths: list[int], G: int, N: int, observed: int) -> list[float]:
    """Three turns of a session → of each the peak beside the weights, over the bytes by the formula."""
    policy = random_policy(config)
    engine = RolloutEngine(config, GenerationConfig(max_completion_length=N), stop_ids=frozenset())
    engine.load(policy.weights, 0)
    engine.current_weights()
    session, before = engine.session(), mx.get_active_memory()
    rows, shares = [(place, sample) for place in range(len(lengths)) for sample in range(G)], []
    for turn in range(3):
        kept = [(lengths[place] + turn * (observed + N) - observed - 1) * bool(turn) for place, _ in rows]
        ids = {row: (1,) * (observed if turn else lengths[row[0]]) for row in rows}
        new = [len(ids[row]) + bool(turn) for row in rows]
        mx.clear_cache()
        mx.reset_peak_memory()
        requests = [TurnRequest(row=row, ids=ids[row], start=0, room=N, fresh=not turn) for row in rows]
        list(session.decode(requests))
        shares.append((mx.get_peak_memory() - before) / session.memory_bytes(kept, new, N))
    return shares


@pytest.mark.parametrize(
    ("sizes", "lengths", "G", "N", "observed"),
    [
        pytest.param({"head_dim": 32}, [4, 20, 9, 4], 8, 128, 50, marks=pytest.mark.slow),
        ({"num_hidden_layers": 2}, [300], 8, 8, 200),
        ({"num_hidden_layers": 2, "intermediate_size": 2048}, [32] * 16, 1, 1, 32),
        ({"num_hidden_layers": 1, "vocab_size": 2000}, [100, 50, 20, 200], 4, 32, 10),
        (MOE | {"num_hidden_layers": 4}, [10, 400, 30], 4, 8, 40),
    ],
)
def test_the_peak_of_a_turn_is_never_more_than_a_tenth_over(
    sizes: dict[str, Any], lengths: list[int], G: int, N: int, observed: int
) -> None:
    """The first reads prompts once that the formula counts for every row."""
    first, *others = take_turns(config_of(**sizes), lengths, G, N, observed)
    assert first < 1.1
    for share in others:
        assert 0.3 < share < 1.1


def test_prompts_are_prefilled_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PREFILL_TOKENS", 20)
    assert list(prefill_chunks([4, 9, 1, 30, 17])) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(prefill_chunks([5, 5, 5, 5, 5])) == [range(4), range(4, 5)]


def test_waves_are_as_full_as_the_limit_allows() -> None:
    lengths = [5, 1, 1, 9, 2, 2, 2]
    assert split_into_waves(lengths, sum, None) == [range(7)]
    assert split_into_waves(lengths, sum, 22) == [range(7)]
    assert split_into_waves(lengths, sum, 7) == [range(3), range(3, 4), range(4, 7)]
    assert split_into_waves(lengths, sum, 1) == [range(i, i + 1) for i in range(7)]
    assert split_into_waves([], sum, None) == split_into_waves([], sum, 3) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", family_configs().values(), ids=family_configs())
def test_the_fused_copy_is_what_is_copied(config: NetworkConfig, dtype: str) -> None:
    weights = random_policy(config, dtype=dtype).weights
    fused = fuse_projections(config, weights)
    copied = sum(array.nbytes for name, array in fused.items() if array is not weights.get(name))
    assert fused_copy_bytes(config, weights[FINAL_NORM].dtype) == copied
