"""The network against transformers' logits, hand-worked sizes and its own other paths."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.policy.forward_vectors import ABOUT, MODELS, SHIPPED, model_folder, tensors
from tests.test_oracles import oracle
from troupe.policy.architecture import Qwen3Config
from troupe.policy.cache import DecodingCache, PromptCache
from troupe.policy.folders import read_model_folder
from troupe.policy.qwen3 import (
    Weights,
    expected_shapes,
    fuse_projections,
    hidden_states,
    init_weights,
    parameter_count,
    project,
)
from troupe.policy.rotary import YarnScaling

SMALL = Qwen3Config(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    initializer_range=0.3,
)


YARN = YarnScaling(factor=4.0, original_max_position_embeddings=16)


def load(name: str) -> tuple[Qwen3Config, Weights, dict[str, mx.array]]:
    return *read_model_folder(model_folder(name), "float32"), tensors()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_logits_are_those_of_transformers(name: str, fused: bool) -> None:
    config, weights, vectors = load(name)
    network = fuse_projections(config, weights) if fused else weights
    mask = np.array(vectors["A/attention_mask"])
    padding = mx.array((1 - mask).sum(axis=1))
    hidden = hidden_states(config, network, vectors["A/input_ids"], lengths_of_left_padding=padding)
    logits = project(config, network, hidden)

    theirs = np.array(vectors[f"A/{name}/logits"])
    assert np.abs(np.array(logits) - theirs)[mask == 1].max() < 1e-4

    log_probs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    ours = np.take_along_axis(log_probs[:, :-1], np.array(vectors["A/input_ids"])[:, 1:, None], axis=-1)[..., 0]
    assert np.abs(ours - np.array(vectors[f"A/{name}/token_logprobs"]))[mask[:, :-1] == 1].max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_row_equals_the_row_alone(name: str) -> None:
    config, weights, vectors = load(name)
    ids = vectors["A/input_ids"]
    padding = (1 - vectors["A/attention_mask"]).sum(axis=1)
    padded = hidden_states(config, weights, ids, lengths_of_left_padding=padding)
    for row, places in enumerate(np.array(padding)):
        alone = hidden_states(config, weights, ids[row : row + 1, places:])
        assert float(mx.abs(padded[row : row + 1, places:] - alone).max()) < 1e-4
    assert mx.all(mx.isfinite(padded)).item()


def test_fused_rotation_kernels_agree_with_the_cpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = mx.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    padding = mx.array([0, 1])
    weights = init_weights(SMALL, mx.random.key(0))
    here = hidden_states(SMALL, weights, ids, lengths_of_left_padding=padding)
    monkeypatch.setattr("troupe.policy.qwen3.is_on_cpu", lambda: False)
    fused = hidden_states(SMALL, weights, ids, lengths_of_left_padding=padding)
    assert float(mx.abs(here - fused)[0].max()) < 1e-5
    assert float(mx.abs(here - fused)[1, 1:].max()) < 1e-5


def test_bfloat16_stays_near_float32() -> None:
    weights = init_weights(SMALL, mx.random.key(0))
    half = {name: w.astype(mx.bfloat16) for name, w in weights.items()}
    ids = mx.arange(12)[None]
    exact = hidden_states(SMALL, {name: w.astype(mx.float32) for name, w in half.items()}, ids)
    rounded = hidden_states(SMALL, half, ids)
    assert rounded.dtype == mx.bfloat16
    assert float(mx.abs(rounded.astype(mx.float32) - exact).max()) < 0.1


def test_gradient_is_the_slope() -> None:
    weights = init_weights(SMALL, mx.random.key(1))
    ids = mx.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])

    def loss(weights: dict[str, mx.array]) -> mx.array:
        logits = project(SMALL, weights, hidden_states(SMALL, weights, ids))
        return mx.mean(mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, ids[..., None], axis=-1)[..., 0])

    gradients = mx.grad(loss)(weights)
    assert gradients.keys() == weights.keys()
    for seed, name in enumerate(sorted(weights)):
        direction = mx.random.normal(weights[name].shape, key=mx.random.key(seed))
        direction = direction / mx.linalg.norm(direction)
        step = 1e-2
        ahead = loss({**weights, name: weights[name] + step * direction}).item()
        behind = loss({**weights, name: weights[name] - step * direction}).item()
        slope = (gradients[name] * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / (2 * step), abs=2e-4, rel=2e-2), name


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_that_of_transformers(name: str) -> None:
    config, _, _ = load(name)
    assert parameter_count(config) == ABOUT["models"][name]["num_parameters"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameter_count(Qwen3Config.preset(name)) == count


def test_initial_weights_have_the_shapes_and_spread_they_should() -> None:
    config = Qwen3Config.from_dict(json.loads((SHIPPED / "qwen3-tiny-untied" / "config.json").read_text()))
    weights = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert {name: w.shape for name, w in weights.items()} == expected_shapes(config)
    assert all(w.dtype == mx.bfloat16 for w in weights.values())
    assert mx.std(weights["lm_head.weight"].astype(mx.float32)).item() == pytest.approx(0.02, rel=0.02)
    assert mx.all(weights["model.norm.weight"] == 1).item()
    again = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert all(mx.array_equal(weights[name], again[name]).item() for name in weights)
    assert not mx.array_equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"]).item()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_stretched_positions_decode_as_they_forward(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("troupe.policy.qwen3.is_on_cpu", lambda: on_cpu)
    config = msgspec.structs.replace(SMALL, rope_scaling=YARN)
    weights = init_weights(config, mx.random.key(0))
    rows = [[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6]]
    later = [[11, 12, 13], [21, 22, 23]]
    prompts = PromptCache([7, 4])
    hidden_states(config, weights, mx.array([rows[0], [*rows[1], 0, 0, 0]]), cache=prompts)
    cache = DecodingCache(prompts, 1, 3)
    for t in range(3):
        step = hidden_states(config, weights, mx.array([[row[t]] for row in later]), cache=cache)
        cache.advance()
        for row in range(2):
            whole = hidden_states(config, weights, mx.array([[*rows[row], *later[row][: t + 1]]]))
            assert float(mx.abs(step[row, 0] - whole[0, -1]).max()) < 1e-4


def test_stretching_changes_the_network_and_both_kernels_agree_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, padding = mx.array([list(range(1, 21)), list(range(21, 41))]), mx.array([0, 3])
    weights = init_weights(SMALL, mx.random.key(0))
    stretched = msgspec.structs.replace(SMALL, rope_scaling=YARN)
    plain = hidden_states(SMALL, weights, ids, lengths_of_left_padding=padding)
    here = hidden_states(stretched, weights, ids, lengths_of_left_padding=padding)
    monkeypatch.setattr("troupe.policy.qwen3.is_on_cpu", lambda: False)
    fused = hidden_states(stretched, weights, ids, lengths_of_left_padding=padding)
    assert float(mx.abs(here - plain)[0].max()) > 1e-2
    assert float(mx.abs(here - fused)[0].max()) < 1e-4
    assert float(mx.abs(here - fused)[1, 3:].max()) < 1e-4


class FarAlong:
    """Whole rows whose first token stands at a position of its own, row by row."""

    def __init__(self, offset: int | mx.array) -> None:
        self.offset = offset

    def attend(self, layer: int, q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "mscale": 0.7, "mscale_all_dim": 0.3},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256, "truncate": False},
    {"rope_type": "yarn", "factor": 3.0},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_stretched_logits_are_those_of_transformers_at_any_position(rope: dict[str, Any]) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    settings = json.loads((SHIPPED / "qwen3-tiny-tied" / "config.json").read_text())
    settings |= {"rope_parameters": None, "rope_scaling": rope, "rope_theta": 1e6, "max_position_embeddings": 40960}
    config = Qwen3Config.from_dict(settings)
    settings.pop("model_type")
    their_config = transformers.Qwen3Config(**settings | {"rope_scaling": dict(rope)})
    their_config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(their_config).eval()
    state = {name: mx.array(w.tolist()) for name, w in model.state_dict().items()}
    weights = {name: state[name] * (1.0 if w == 1 else 5.0) for name, w in _ranks(config).items()}
    model.load_state_dict({name: torch.tensor(w.tolist()) for name, w in weights.items()}, strict=False)
    model.tie_weights()
    ids, starts = [list(range(40, 100)), list(range(300, 360))], [0, 100_000]
    positions = torch.tensor([[start + i for i in range(60)] for start in starts])
    with torch.no_grad():
        theirs = model(torch.tensor(ids), position_ids=positions).logits
    hidden = hidden_states(config, weights, mx.array(ids), cache=FarAlong(mx.array(starts, mx.int32)))
    ours = project(config, weights, hidden)
    assert float(mx.abs(ours).max()) > 1.0
    assert float(mx.abs(ours - mx.array(theirs.tolist())).max()) <= 1e-4


def _ranks(config: Qwen3Config) -> dict[str, int]:
    return {name: len(shape) for name, shape in expected_shapes(config).items()}
