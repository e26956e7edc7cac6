"""Rows of several policies over one base, decoded together, are the rows of each decoded alone."""

import mlx.core as mx
import numpy as np
import pytest

from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import small_network
from troupe.policy import AdapterConfig, Completion, GenerationConfig, RolloutEngine, RolloutRequest, random_policy
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.modules import Adapter, init_adapter, resolve_adapter
from troupe.policy.network.architecture import NetworkConfig

CONFIG = small_network(vocab_size=90, tie_word_embeddings=True)
CONFIGS = {"qwen3": CONFIG} | {
    name: config
    for name, config in family_configs(vocab_size=90, initializer_range=0.3).items()
    if name in ("qwen2", "llama-biased", "gemma3-untied")
}
PROMPTS = [(1, 2, 3), (4, 5, 6, 7, 8), (9,), (10, 11), (12, 13, 14, 15)]
STOP = frozenset(range(6))


def trained(config: NetworkConfig, adapter: Adapter, base: Base, seed: int) -> dict[str, mx.array]:
    norms = base.row_norms(config, adapter) if adapter.kind == "dora" else None
    weights = init_adapter(config, adapter, "default", seed, norms)
    return {
        name: x + 0.2 * mx.random.normal(x.shape, key=mx.random.key(seed + n))
        for n, (name, x) in enumerate(weights.items())
    }


def decoded(engine: RolloutEngine, policies: list[int]) -> list[Completion]:
    requests = [
        RolloutRequest(prompt_ids=prompt, key=(7, place), policy=policy)
        for place, (prompt, policy) in enumerate(zip(PROMPTS, policies, strict=True))
    ]
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    return [completion for group in groups for completion in group.completions]


@pytest.mark.parametrize(
    "settings",
    [{"kind": "lora"}, {"kind": "dora"}, {"kind": "lora", "target_modules": ("q_proj", "down_proj")}],
    ids=str,
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_mixed_rows_are_those_of_each_policy_alone(config: NetworkConfig, settings: dict[str, object]) -> None:
    adapter = resolve_adapter(AdapterConfig(rank=4, **settings), config)  # type: ignore[arg-type]
    base = Base.of(config, dict(shaken_policy(config, 3).weights), adapter)
    generation = GenerationConfig(num_generations=3, max_completion_length=24)
    engine = RolloutEngine(config, generation, stop_ids=STOP, base=base)
    for policy, weights in enumerate([trained(config, adapter, base, 10), {}, trained(config, adapter, base, 50)]):
        engine.load(weights, 100 + policy, policy=policy)
    mixed = decoded(engine, [0, 1, 2, 0, 2])
    alone = [decoded(engine, [policy] * 5) for policy in range(3)]
    assert len({tuple(c.token_ids for c in alone[policy]) for policy in range(3)}) == 3, "the policies differ"
    for row, completion in enumerate(mixed):
        policy = [0, 1, 2, 0, 2][row // 3]
        other = alone[policy][row]
        assert completion.token_ids == other.token_ids
        np.testing.assert_allclose(completion.log_probs, other.log_probs, atol=5e-5)
        assert set(completion.versions) == {100 + policy}


def test_a_policy_that_is_not_there_is_told() -> None:
    weights = random_policy(CONFIG, 3).weights
    engine = RolloutEngine(CONFIG, GenerationConfig(num_generations=2, max_completion_length=2), stop_ids=STOP)
    engine.load(weights, 0)
    with pytest.raises(ValueError, match="only over one base"):
        engine.load(weights, 0, policy=1)
    with pytest.raises(RuntimeError, match="policy 3 was not loaded"):
        decoded(engine, [0, 0, 3, 0, 0])
