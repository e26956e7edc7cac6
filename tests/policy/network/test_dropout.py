"""Dropout: how much, the same wherever it is computed, and its gradient."""

import mlx.core as mx
import pytest

from tests.support.tiny import small_network
from troupe.policy import AdapterConfig, TokenStatistics, completion_gradients, random_policy
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.modules import init_adapter, resolve_adapter
from troupe.policy.network.dropout import Dropout, RowKeys, completion_key, prompt_key, token_keys

CONFIG = small_network(tie_word_embeddings=True)
PROMPTS = [[1, 2, 3], [1, 2, 3], [7, 8], [7, 8]]
COMPLETIONS = [[4, 5, 6, 7], [9, 8], [3, 2, 1, 0, 5], [6]]


def row_keys(gid: int, samples: int, prompt: list[int], step: int) -> list[tuple[int, int]]:
    return [(prompt_key(prompt, step), completion_key(gid, sample)) for sample in range(samples)]


KEYS = [*row_keys(11, 2, PROMPTS[0], 5), *row_keys(12, 2, PROMPTS[2], 5)]


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_so_much_is_dropped_and_the_mean_stays(rate: float) -> None:
    keys = token_keys([[1] * 500], [[2] * 501], row_keys(3, 1, [1], 0), seed=0)
    x = Dropout(rate, keys).of("model.layers.0.self_attn.q_proj", mx.ones((1, 1000, 256)))
    assert float(mx.mean(x == 0.0)) == pytest.approx(rate, abs=0.005)
    assert float(mx.mean(x)) == pytest.approx(1.0, abs=0.005)
    by_column, by_token = mx.mean(x == 0.0, axis=1), mx.mean(x == 0.0, axis=2)
    assert float(mx.max(mx.abs(by_column - rate))) < 0.1
    assert float(mx.max(mx.abs(by_token - rate))) < 0.2


def test_what_is_dropped_follows_from_row_token_matrix_seed_and_pass() -> None:
    def dropped(
        module: str = "model.layers.1.mlp.gate_proj", *, seed: int = 0, number: int = 0, keys: RowKeys = KEYS
    ) -> mx.array:
        tokens = token_keys(PROMPTS, COMPLETIONS, keys, seed=seed, pass_number=number)
        return Dropout(0.5, tokens).of(module, x)

    def same(a: mx.array, b: mx.array) -> bool:
        return bool(mx.array_equal(a, b).item())

    x = mx.ones((1, token_keys(PROMPTS, COMPLETIONS, KEYS, seed=0).size, 64))
    assert same(dropped(), dropped())
    assert same(dropped(), dropped("model.layers.1.mlp.up_proj"))  # the same input
    assert same(dropped(), dropped("model.layers.1.mlp.gate_up_proj"))
    assert not same(dropped(), dropped("model.layers.1.mlp.down_proj"))
    assert not same(dropped(), dropped("model.layers.0.mlp.gate_proj"))
    assert not same(dropped(), dropped(seed=1))
    assert not same(dropped(), dropped(number=1))
    assert not same(dropped(seed=1), dropped(number=1))
    assert not same(dropped(), dropped(keys=[*KEYS[:2], *row_keys(13, 2, PROMPTS[2], 5)]))
    assert not same(dropped(), dropped(keys=[*KEYS[:2], *row_keys(12, 2, PROMPTS[2], 6)]))


def test_no_row_loses_in_one_pass_or_seed_what_another_lost_in_another() -> None:
    rows = row_keys(7, 8, PROMPTS[0], 0)
    x, lost = mx.ones((1, 1, 64)), set[tuple[float, ...]]()
    for _, own in rows:
        for seed, number in ((seed, number) for seed in range(4) for number in range(4)):
            keys = token_keys([[1]], [[1]], [(own, own)], seed=seed, pass_number=number)
            lost.add(tuple(Dropout(0.5, keys).of("model.layers.0.mlp.up_proj", x)[0, 0].tolist()))  # type: ignore[arg-type]
    assert len(lost) == 8 * 4 * 4


def direction(name: str, like: mx.array) -> mx.array:
    return mx.random.normal(like.shape, key=mx.random.key(len(name) + like.size))


def gradients(dropout: bool, rows: slice, shift: float = 0.0) -> tuple[dict[str, mx.array], mx.array]:
    policy = random_policy(CONFIG, 3)
    adapter = resolve_adapter(AdapterConfig(kind="lora", rank=4), CONFIG)
    base = Base.of(CONFIG, dict(policy.weights), adapter)
    trained = init_adapter(CONFIG, adapter, "default", 5)
    trained = {name: x + 0.1 if name.endswith("lora_B.weight") else x for name, x in trained.items()}
    trained = {name: x + shift * direction(name, x) for name, x in trained.items()}
    network = base.completed(CONFIG, trained)
    drop = None
    if dropout:
        drop = Dropout(0.3, token_keys(PROMPTS[rows], COMPLETIONS[rows], KEYS[rows], seed=0))

    def total(statistics: TokenStatistics) -> tuple[mx.array, tuple[()]]:
        return statistics.log_probs.sum(), ()

    found: dict[str, mx.array] = {}
    chunks = completion_gradients(CONFIG, network, PROMPTS[rows], COMPLETIONS[rows], total, of_base=False, dropout=drop)
    value = mx.array(0.0)
    while True:
        try:
            _, portion = next(chunks)
        except StopIteration as end:
            value = end.value[0]
            break
        found |= base.gradients(network, portion)
    return found, value


def test_the_gradient_of_a_batch_does_not_depend_on_how_it_is_cut() -> None:
    whole, value = gradients(True, slice(0, 4))
    first, second = gradients(True, slice(0, 2)), gradients(True, slice(2, 4))
    assert float(value) == pytest.approx(float(first[1] + second[1]), rel=1e-5)
    for name, gradient in whole.items():
        assert mx.allclose(gradient, first[0][name] + second[0][name], rtol=1e-4, atol=1e-4).item()
    without, other = gradients(False, slice(0, 4))
    assert abs(float(value - other)) > 0.01
    assert without.keys() == whole.keys()


def test_the_gradient_is_the_slope() -> None:
    found, _ = gradients(True, slice(0, 4))
    step = 1e-3
    ahead, behind = (float(gradients(True, slice(0, 4), shift)[1]) for shift in (step, -step))
    slope = sum(float((gradient * direction(name, gradient)).sum()) for name, gradient in found.items())
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=5e-3)
