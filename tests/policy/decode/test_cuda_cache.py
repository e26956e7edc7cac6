"""The kernels for NVIDIA cards against their plain twins. Runs where MLX has such a card; nothing else can test it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import mlx.core as mx
import msgspec
import pytest

from tests.support.families import family_configs, shaken_policy
from troupe.policy import GenerationConfig, NetworkConfig, RolloutEngine, RolloutRequest, hidden_states, random_policy
from troupe.policy.decode import cuda_kernels
from troupe.policy.decode.cache import DecodingCache, PromptCache
from troupe.policy.decode.cuda_cache import CudaDecodingCache
from troupe.policy.decode.loop import draw_tokens
from troupe.policy.decode.sampling import Sampler
from troupe.policy.model import Policy
from troupe.policy.network.fusing import fuse_projections

pytestmark = pytest.mark.skipif(not cuda_kernels.are_available(), reason="MLX has no NVIDIA card here")


def config(heads: int = 8, kv_heads: int = 4, head_dim: int = 64) -> NetworkConfig:
    return NetworkConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )


FAMILIES = family_configs(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=4096,
    initializer_range=0.02,
)
FAMILIES |= {
    f"{name}-{window}": msgspec.structs.replace(kind, sliding_window=window)
    for name, kind in FAMILIES.items()
    if kind.has_windows
    for window in (40, 300)
}


def number(x: mx.array) -> float:
    return float(x.astype(mx.float32).item())  # type: ignore[arg-type]


def largest_difference(policy: Policy, lengths: Sequence[int], width: int) -> float:
    """Of the hidden states of both caches, fed with the same ids and thinned out halfway, over their largest number."""
    fused = fuse_projections(policy.config, policy.weights)
    dice, rows = random.Random(0), len(lengths) * width
    prompts = [[dice.randrange(policy.config.vocab_size) for _ in range(n)] for n in lengths]
    caches = []
    for kind in (DecodingCache, CudaDecodingCache):
        prompt = PromptCache(lengths)
        ids = mx.array([[*ids, *[0] * (max(lengths) - len(ids))] for ids in prompts])
        mx.eval(hidden_states(policy.config, fused, ids, attention=prompt), prompt.keys, prompt.values)
        caches.append(kind(prompt, width, 100))
    worst = 0.0
    for t in range(80):  # more than one block of places
        ids = mx.array([dice.randrange(policy.config.vocab_size) for _ in range(rows)])
        plain, ours = (cache.forward(policy.config, fused, ids).astype(mx.float32) for cache in caches)
        worst = max(worst, number(mx.max(mx.abs(plain - ours)) / mx.max(mx.abs(plain))))
        if t == 40 and width > 1:
            kept = [row for row in range(rows) if row % width]
            width -= 1
            rows = len(kept)
            for cache in caches:
                cache.select(list(range(len(lengths))), kept, width)
    return worst


@pytest.mark.parametrize(
    ("lengths", "width", "shape"),
    [([5, 17, 64], 4, {}), ([900], 2, {}), ([30, 700], 3, {"heads": 16, "head_dim": 128}), ([1], 1, {"kv_heads": 8})],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2), ("float16", 2e-2)])
def test_hidden_states_are_those_of_the_plain_cache(
    lengths: list[int], width: int, shape: dict[str, int], dtype: str, tolerance: float
) -> None:
    """float32 products are made with TF32 on these cards."""
    assert largest_difference(random_policy(config(**shape), dtype=dtype), lengths, width) < tolerance


@pytest.mark.parametrize("lengths", [[5, 17, 64], [900], [30, 2100]])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-3), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_so_are_they_in_every_family(name: str, dtype: str, tolerance: float, lengths: list[int]) -> None:
    """Without norms of queries and keys, with biases, with windows and two bases of positions."""
    assert largest_difference(shaken_policy(FAMILIES[name], dtype=dtype), lengths, 3) < tolerance


@pytest.mark.parametrize(
    ("lengths", "width", "shape", "together", "splits"),
    [
        ([40] * 32, 8, {}, 8, 1),
        ([7] * 57, 9, {"kv_heads": 2}, 4, 1),
        ([7] * 171, 3, {"kv_heads": 1, "heads": 4}, 3, 1),
        ([9, 40] * 16, 2, {}, 2, 1),
        ([2100, 3], 1, {}, 1, 4),
        ([50, 20], 3, {"head_dim": 256}, 1, 1),
        ([50, 20], 3, {"heads": 24}, 1, 1),
    ],
)
def test_so_are_they_however_the_work_is_divided(
    lengths: list[int], width: int, shape: dict[str, int], together: int, splits: int
) -> None:
    policy = random_policy(config(**shape), dtype="bfloat16")
    heads = policy.config.num_attention_heads, policy.config.num_key_value_heads, policy.config.head_dim
    plan = cuda_kernels.plan_launch(len(lengths) * width, width, *heads, mx.bfloat16, max(lengths))
    assert (plan.by_units, plan.together, plan.splits) == (True, together, splits)
    assert largest_difference(policy, lengths, width) < 5e-2


def test_a_draw_is_the_plain_one() -> None:
    logits = 3 * mx.random.normal((256, 151_936), key=mx.random.key(0)).astype(mx.bfloat16)
    uniforms = mx.random.uniform(shape=(256,), key=mx.random.key(1))
    sampler = Sampler(GenerationConfig(temperature=0.7), frozenset())
    ids, log_probs = draw_tokens(sampler, logits, uniforms, by_kernel=True)
    plain_ids, _ = draw_tokens(sampler, logits, uniforms)
    far = mx.abs(ids.astype(mx.int32) - plain_ids.astype(mx.int32))
    assert number(mx.sum(far == 0)) >= 250, "sums of 151,936 numbers are rounded differently"
    assert number(mx.max(far)) < 100
    scaled = logits.astype(mx.float32) / 0.7
    exact = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    assert number(mx.max(mx.abs(mx.take_along_axis(exact, ids[:, None], axis=-1)[:, 0] - log_probs))) < 1e-5


def test_so_is_one_by_the_full_chain() -> None:
    logits = 3 * mx.random.normal((64, 151_936), key=mx.random.key(0)).astype(mx.bfloat16)
    uniforms = mx.random.uniform(shape=(2, 64), key=mx.random.key(1))
    recent = mx.random.randint(0, 151_936, (64, 20), key=mx.random.key(2))
    chain = GenerationConfig(
        temperature=0.7, top_k=50, top_p=0.95, min_p=0.05, xtc_probability=0.5, repetition_penalty=1.1
    )
    sampler = Sampler(chain, (0, 1))
    found = [draw_tokens(sampler, logits, uniforms[0], recent, uniforms[1], by_kernel=True) for _ in range(2)]
    plain = draw_tokens(sampler, logits, uniforms[0], recent, uniforms[1])
    assert [x.tolist() for x in found[0]] == [x.tolist() for x in found[1]]
    same = found[0][0] == plain[0]
    assert number(mx.sum(same)) >= 62, "a share may be as large as the threshold but for rounding"
    for ours, theirs in zip(found[0][1:], plain[1:], strict=True):
        assert number(mx.max(mx.where(same, mx.abs(ours - theirs), 0))) < 1e-4


def test_what_has_no_share_is_never_drawn() -> None:
    never = -float("inf")
    logits = mx.array([[0.0, 0.0, never, 0.0, 0.0, never, never]] * 4)
    ids, log_probs = cuda_kernels.draw(logits, mx.array([0.0, 0.26, 0.51, 0.9999999]), 1.0)
    assert ids.tolist() == [0, 1, 3, 4]
    assert log_probs.tolist() == pytest.approx([-1.3862944] * 4)


def test_completions_repeat_and_tell_the_log_probs_of_the_model() -> None:
    policy = random_policy(config())
    generation = GenerationConfig(num_generations=8, max_completion_length=150)
    engine = RolloutEngine(policy.config, generation, stop_ids=frozenset(range(10)))
    engine.load(policy.weights, 0)
    dice = random.Random(0)
    requests = [
        RolloutRequest(prompt_ids=tuple(dice.randrange(1024) for _ in range(n)), key=(i,))
        for i, n in enumerate([3, 30, 64, 100])
    ]
    once, again = ({group.index: group for group in engine.decode(requests)} for _ in range(2))
    assert once == again
    for index, group in once.items():
        for completion in group.completions:
            log_probs = policy.compute_log_probs([requests[index].prompt_ids], [completion.token_ids])
            told = mx.array(completion.log_probs)
            assert number(mx.max(mx.abs(mx.array(log_probs).reshape(-1) - told))) < 5e-3
