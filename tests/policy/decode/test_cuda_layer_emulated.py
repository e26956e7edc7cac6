"""A layer in one launch as NVIDIA cards compute it, its very source on a processor, against the plain cache."""

from __future__ import annotations

import random
from typing import NamedTuple

import mlx.core as mx
import msgspec
import pytest

from tests.support.emulated_cuda import EmulatedKernel
from tests.support.families import family_configs, shaken_policy
from troupe.policy import NetworkConfig, hidden_states, random_policy
from troupe.policy.decode import cuda_cache, cuda_kernels, cuda_layer
from troupe.policy.decode.cache import DecodingCache, PromptCache
from troupe.policy.decode.cuda_cache import CudaDecodingCache
from troupe.policy.model import Policy
from troupe.policy.network import fusing
from troupe.policy.network.linear import A, B

pytestmark = pytest.mark.slow  # each kind of head is compiled


class Case(NamedTuple):
    """Prompts of these lengths, rows of each; sizes of the network; blocks of a grid."""

    lengths: tuple[int, ...]
    width: int
    hidden: int = 96
    inside: int = 160
    heads: int = 4
    kv_heads: int = 2
    blocks: int = 3
    dtype: str = "bfloat16"


CASES = [
    Case((5, 20), 3),
    Case((9,), 8, blocks=5, dtype="float16"),
    Case((30, 4, 11), 7, heads=6, kv_heads=1, blocks=7),
    Case((7, 3), 1, hidden=1056, inside=4160, blocks=4),
    Case((3, 4, 5, 6), 16, hidden=64, blocks=5),
    Case((3,), 40, hidden=1056, inside=2080, blocks=2),
    Case((3, 9), 64, hidden=64, blocks=9),
]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_kernels.kernel.cache_clear()
    cuda_layer._kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "cuda_kernel", EmulatedKernel)
    monkeypatch.setattr(cuda_layer, "have_matrix_units", lambda: True)
    monkeypatch.setattr(cuda_kernels, "have_matrix_units", lambda: True)
    for module in (cuda_layer, cuda_kernels):
        monkeypatch.setattr(module, "shared_memory_limit", lambda: 227 * 1024)
    monkeypatch.setattr(fusing, "is_on_cpu", lambda: False)


def policy_of(case: Case) -> Policy:
    config = NetworkConfig(
        vocab_size=64,
        hidden_size=case.hidden,
        intermediate_size=case.inside,
        num_hidden_layers=2,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return random_policy(config, dtype=case.dtype)


def decoded(
    case: Case,
    policy: Policy,
    kinds: list[type[DecodingCache]],
    steps: int,
    beside: dict[str, mx.array] | None = None,
) -> list[list[mx.array]]:
    """Hidden states after each step, by each kind of cache. `beside`: an adapter."""
    fused = fusing.fuse_projections(policy.config, policy.weights) | (beside or {})
    dice = random.Random(0)
    prompts = [[dice.randrange(64) for _ in range(n)] for n in case.lengths]
    ids = mx.array([[*prompt, *[0] * (max(case.lengths) - len(prompt))] for prompt in prompts])
    rows = len(case.lengths) * case.width
    tokens = [mx.array([dice.randrange(64) for _ in range(rows)]) for _ in range(steps)]
    found = []
    for kind in kinds:
        prompt = PromptCache(case.lengths)
        mx.eval(hidden_states(policy.config, fused, ids, attention=prompt), prompt.keys, prompt.values)
        cache = kind(prompt, case.width, 100)
        states = []
        for t, token in enumerate(tokens):
            if t == 7:  # one row of each prompt ends
                kept = [row for row in range(rows) if row % case.width]
                cache.select(list(range(len(case.lengths))), kept, case.width - 1)
            states.append(cache.forward(policy.config, fused, token[: cache.width * len(case.lengths)]))
            mx.eval(states)
        found.append(states)
    return found


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_are_those_of_the_plain_cache(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layer, "multiprocessors", lambda: case.blocks)
    policy = policy_of(case)
    plain, ours = decoded(case, policy, [DecodingCache, CudaDecodingCache], 3)
    assert cuda_layer._kernel.cache_info().misses == 1, "by the kernel"
    for a, b in zip(plain, ours, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        apart = mx.max(mx.abs(a - b)) / mx.max(mx.abs(a))
        assert apart.item() < (3e-2 if case.dtype == "bfloat16" else 4e-3)  # type: ignore[operator]
    monkeypatch.setenv("EMULATED_SEED", "4")
    (again,) = decoded(case, policy, [CudaDecodingCache], 3)
    assert all(mx.array_equal(a, b).item() for a, b in zip(ours, again, strict=True)), "in any order of blocks"


FAMILIES = {
    name: msgspec.structs.replace(config, sliding_window=9) if config.has_windows else config
    for name, config in family_configs(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.02,
    ).items()
    if not config.sparse_layers and not config.delta_layers
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_kernel_or_the_plain_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without norms of queries and keys, biases, windows."""
    monkeypatch.setattr(cuda_layer, "multiprocessors", lambda: 3)
    monkeypatch.setattr(cuda_cache, "_WORTH_COMPILING", 1000)
    policy = shaken_policy(FAMILIES[name], dtype="bfloat16")
    plain, ours = decoded(CASES[0], policy, [DecodingCache, CudaDecodingCache], 12)
    for a, b in zip(plain, ours, strict=True):
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        assert mx.max(mx.abs(a - b)).item() < (4e-2 * mx.max(mx.abs(a))).item()  # type: ignore[operator]
    by_kernel = name.startswith(("qwen3", "mistral")) or name == "llama"
    assert bool(cuda_layer._kernel.cache_info().misses) == by_kernel


def test_an_adapter_that_the_first_layer_has_nothing_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_layer, "multiprocessors", lambda: 3)
    case = CASES[0]
    policy, module = policy_of(case), "model.layers.1.mlp.down_proj"
    beside = {
        f"{module}{kind}.weight": mx.random.normal(shape, key=mx.random.key(3)).astype(mx.bfloat16)
        for kind, shape in ((A, (4, case.inside)), (B, (case.hidden, 4)))
    }
    kinds = [DecodingCache, CudaDecodingCache]
    plain, ours = (states[-1].astype(mx.float32) for states in decoded(case, policy, kinds, 2, beside))
    (without,) = decoded(case, policy, [DecodingCache], 2)
    scale = mx.max(mx.abs(plain))
    assert mx.max(mx.abs(plain - ours)).item() < (3e-2 * scale).item()  # type: ignore[operator]
    assert mx.max(mx.abs(plain - without[-1])).item() > (0.1 * scale).item()  # type: ignore[operator]


@pytest.mark.parametrize("others", [1, 8, 16, 33, 99])
def test_what_a_row_gives_does_not_depend_on_how_many_others_there_are(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each is of a prompt of its own: of one prompt's rows some are attended to together."""
    monkeypatch.setattr(cuda_layer, "multiprocessors", lambda: 6)
    case = Case((9, *[4, 20] * 50), 1)
    policy = policy_of(case)
    fused = fusing.fuse_projections(policy.config, policy.weights)
    dice = random.Random(1)
    ids = mx.array([[dice.randrange(64) for _ in range(20)] for _ in case.lengths])
    read = PromptCache(case.lengths)
    mx.eval(hidden_states(policy.config, fused, ids, attention=read), read.keys, read.values)
    tokens = [mx.array([dice.randrange(64) for _ in case.lengths]) for _ in range(3)]

    def first_row(rows: int) -> list[mx.array]:
        prompt = PromptCache(case.lengths[:rows])
        prompt.keys = [mx.contiguous(keys[:rows]) for keys in read.keys]
        prompt.values = [mx.contiguous(values[:rows]) for values in read.values]
        cache = CudaDecodingCache(prompt, 1, 100)
        return [cache.forward(policy.config, fused, token[:rows])[0] for token in tokens]

    assert all(mx.array_equal(a, b).item() for a, b in zip(first_row(1), first_row(1 + others), strict=True))
    assert cuda_layer._kernel.cache_info().misses, "by the kernel"
