"""What a config.json may say: where keys stand, what is refused, what is written, the published sizes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.policy.forward_vectors import SHIPPED
from troupe.errors import ModelError
from troupe.policy.network.architecture import PRESETS, NetworkConfig
from troupe.policy.network.rotary import YarnScaling

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def settings() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((SHIPPED / "qwen3-tiny-tied" / "config.json").read_text())
    return parsed


def test_config_survives_a_round_trip() -> None:
    config = NetworkConfig.from_dict(settings())
    assert config.rope_theta == 1_000_000.0
    assert config.eos_token_id == (1,)
    assert NetworkConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("nested", "top", "theta"), [(None, 5e5, 5e5), (3e5, None, 3e5), (3e5, 5e5, 3e5)])
def test_rope_theta_is_found_in_either_place(nested: float | None, top: float | None, theta: float) -> None:
    changed = settings() | {"rope_theta": top, "rope_parameters": {"rope_type": "default", "rope_theta": nested}}
    assert NetworkConfig.from_dict(changed).rope_theta == theta


def test_eos_may_be_a_list_or_absent() -> None:
    assert NetworkConfig.from_dict(settings() | {"eos_token_id": [3, 4]}).eos_token_id == (3, 4)
    assert NetworkConfig.from_dict(settings() | {"eos_token_id": None}).eos_token_id == ()


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "architectures"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization": {"bits": 4}}, "quantization.group_size"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "rope_parameters.rope_type"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.factor"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "rope_scaling.factor"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "rope_scaling.attention_factor"),
        ({"rope_scaling": YARN | {"beta_fast": 0.5}}, "rope_scaling.beta_fast"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": -1}}, "rope_scaling.original_max"),
        ({"rope_scaling": YARN | {"rope_theta": 0.5}}, "rope_theta"),
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
        NetworkConfig.from_dict(settings() | change)
    assert str(caught.value).startswith(key + (":" if "_max" not in key else "_position_embeddings:"))


@pytest.mark.parametrize("theta", [{"rope_theta": 1e6}, {}])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_yarn_is_found_in_either_place(place: str, theta: dict[str, float]) -> None:
    changed = settings() | {"rope_parameters": None, "rope_theta": 1e6 if not theta else None} | {place: YARN | theta}
    config = NetworkConfig.from_dict(changed | {"max_position_embeddings": 40960})
    assert config.rope_scaling == YarnScaling(factor=4.0, original_max_position_embeddings=32768)
    assert config.rope_theta == 1e6
    assert config.max_position_embeddings == 131072, "a stretched network has the room it was stretched to"


def test_rope_scaling_counts_before_rope_parameters_as_elsewhere() -> None:
    changed = settings() | {"rope_scaling": {"type": "yarn", "factor": 2}}
    assert changed["rope_parameters"]["rope_type"] == "default"
    config = NetworkConfig.from_dict(changed)
    assert config.rope_scaling == YarnScaling(factor=2.0, original_max_position_embeddings=256)
    assert (config.rope_theta, config.max_position_embeddings) == (1e6, 512)


def test_yarn_survives_a_round_trip() -> None:
    given = YARN | {"attention_factor": 1.2, "beta_fast": 16, "truncate": False}
    config = NetworkConfig.from_dict(settings() | {"rope_parameters": given | {"rope_theta": 1e6}})
    written = config.to_dict()
    assert written["rope_scaling"] == given | {"beta_fast": 16.0, "beta_slow": 1.0}
    assert written["rope_parameters"] == written["rope_scaling"] | {"rope_theta": 1e6}
    assert NetworkConfig.from_dict(written) == config
    plain = msgspec.structs.replace(config, rope_scaling=None).to_dict()
    assert (plain["rope_scaling"], plain["rope_parameters"]) == (None, {"rope_type": "default", "rope_theta": 1e6})


def test_presets_are_found_by_name() -> None:
    small = NetworkConfig.preset("Qwen3-0.6B")
    assert small is PRESETS["Qwen3-0.6B"] is NetworkConfig.preset("Qwen/qwen3-0.6b")
    assert (small.hidden_size, small.num_hidden_layers, small.head_dim, small.tie_word_embeddings) == (
        1024,
        28,
        128,
        True,
    )
    assert not PRESETS["Qwen3-8B"].tie_word_embeddings
    for name, config in PRESETS.items():
        if name.startswith("Qwen3-"):
            assert (config.rope_theta, config.vocab_size, config.max_position_embeddings) == (1e6, 151936, 40960)
        assert NetworkConfig.from_dict(config.to_dict()) == config, name
        assert NetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config, name
    with pytest.raises(ModelError, match=r"preset: 'Qwen3-9B' is not known; it must be one of Qwen3-0.6B, "):
        NetworkConfig.preset("Qwen3-9B")
