"""The network against transformers' logits, hand-worked sizes and its own other paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.errors import ModelError
from troupe.policy.qwen3 import (
    Qwen3Config,
    expected_shapes,
    fuse_projections,
    hidden_states,
    init_weights,
    parameter_count,
    project,
)

DATA = Path(__file__).parent.parent / "data" / "qwen3"
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


def settings(name: str = "tied") -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((DATA / f"qwen3-tiny-{name}" / "config.json").read_text())
    return parsed


def load(name: str) -> tuple[Qwen3Config, dict[str, mx.array], dict[str, mx.array]]:
    weights = mx.load(str(DATA / f"qwen3-tiny-{name}" / "model.safetensors"))
    vectors = mx.load(str(DATA / "qwen3_forward.safetensors"))
    assert isinstance(weights, dict)
    assert isinstance(vectors, dict)
    return Qwen3Config.from_dict(settings(name)), weights, vectors


@pytest.mark.parametrize("name", ["tied", "untied"])
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


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_a_padded_row_equals_the_row_alone(name: str) -> None:
    config, weights, vectors = load(name)
    ids = vectors["A/input_ids"]
    padded = hidden_states(config, weights, ids, lengths_of_left_padding=mx.array([0, 2, 5]))
    alone = hidden_states(config, weights, ids[2:, 5:])
    assert float(mx.abs(padded[2:, 5:] - alone).max()) < 1e-4
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


def test_parameter_count_is_that_of_transformers() -> None:
    recorded = json.loads((DATA / "qwen3_forward.json").read_text())["models"]
    for name in ("tied", "untied"):
        assert parameter_count(Qwen3Config.from_dict(settings(name))) == recorded[name]["num_parameters"]


def test_initial_weights_have_the_shapes_and_spread_they_should() -> None:
    config = Qwen3Config.from_dict(settings("untied"))
    weights = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert {name: w.shape for name, w in weights.items()} == expected_shapes(config)
    assert all(w.dtype == mx.bfloat16 for w in weights.values())
    assert mx.std(weights["lm_head.weight"].astype(mx.float32)).item() == pytest.approx(0.02, rel=0.02)
    assert mx.all(weights["model.norm.weight"] == 1).item()
    again = init_weights(config, mx.random.key(0), mx.bfloat16)
    assert all(mx.array_equal(weights[name], again[name]).item() for name in weights)
    assert not mx.array_equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"]).item()


def test_config_survives_a_round_trip() -> None:
    config = Qwen3Config.from_dict(settings())
    assert config.rope_theta == 1_000_000.0
    assert config.eos_token_id == (1,)
    assert Qwen3Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("nested", "top", "theta"), [(None, 5e5, 5e5), (3e5, None, 3e5), (3e5, 5e5, 3e5), (None, None, 1e4)]
)
def test_rope_theta_is_found_in_either_place(nested: float | None, top: float | None, theta: float) -> None:
    changed = settings() | {"rope_theta": top, "rope_parameters": {"rope_type": "default", "rope_theta": nested}}
    assert Qwen3Config.from_dict(changed).rope_theta == theta


def test_eos_may_be_a_list_or_absent() -> None:
    assert Qwen3Config.from_dict(settings() | {"eos_token_id": [3, 4]}).eos_token_id == (3, 4)
    assert Qwen3Config.from_dict(settings() | {"eos_token_id": None}).eos_token_id == ()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization": {"bits": 4}}, "quantization"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_attention_heads"),
        ({"head_dim": 31}, "head_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_theta": -1.0, "rope_parameters": None}, "rope_theta"),
    ],
)
def test_what_is_not_supported_is_refused_by_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError) as caught:
        Qwen3Config.from_dict(settings() | change)
    assert str(caught.value).startswith(key + ":")
