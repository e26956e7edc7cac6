"""The table of families: what config.json may say of each, what is refused, what is written."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.support.families import family_configs
from tests.test_oracles import oracle
from troupe.errors import ModelError
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.families import FAMILIES, FULL, LINEAR, SLIDING
from troupe.policy.network.rotary import LinearScaling, Llama3Scaling, Rope, inverse_frequencies
from troupe.policy.network.tensors import expected_shapes

SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read(model_type: Any, **changes: Any) -> NetworkConfig:
    given = {"num_key_value_heads": 4} | SIZES | changes | ({"model_type": model_type} if model_type else {})
    return NetworkConfig.from_dict({key: value for key, value in given.items() if value is not ...})


def refusal(model_type: Any, **changes: Any) -> str:
    with pytest.raises(ModelError) as caught:
        read(model_type, **changes)
    return str(caught.value)


@pytest.mark.parametrize("config", family_configs().values(), ids=family_configs())
def test_what_is_written_is_read_as_the_same_network_also_by_another_process(config: NetworkConfig) -> None:
    assert NetworkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert msgspec.json.decode(msgspec.json.encode(config), type=NetworkConfig) == config
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=NetworkConfig) == config


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("qwen3_vl", "qwen3"), ("llama4", "llama"), ("gemma3n_text", "gemma3_text"), ("mixtral", "mistral")],
)
def test_a_family_that_is_not_known_is_told_with_those_that_are_and_the_nearest(given: str, nearest: str) -> None:
    message = refusal(given)
    assert message.startswith(f"model_type: {given!r} is not supported")
    assert all(repr(name) in message for name in FAMILIES)
    assert message.endswith(f"the nearest is {nearest!r}")


@pytest.mark.parametrize(("given", "remedy"), [("gemma3", "save_pretrained")])
def test_what_many_have_is_refused_with_what_to_do(given: str, remedy: str) -> None:
    message = refusal(given, text_config={})
    assert message.startswith(f"model_type: {given!r} is not supported: ")
    assert remedy in message


@pytest.mark.parametrize("given", [None, 3, ["llama"], "", "l" * 1000])
def test_no_name_at_all_is_refused(given: Any) -> None:
    assert refusal(given).startswith("model_type: ")


@pytest.mark.parametrize(
    ("model_type", "changes", "key"),
    [
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ("qwen2", {"layer_types": [SLIDING] * 6}, "layer_types"),
        ("qwen2", {"rope_scaling": LLAMA3}, "rope_scaling.rope_type"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"architectures": ["MistralForCausalLM"]}, "model_type"),
        ("llama", {"layer_types": [SLIDING] * 6}, "layer_types"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_scaling.rope_type"),
        ("llama", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "rope_scaling.high_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 0.0}}, "rope_scaling.low_freq_factor"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": None}}, "rope_scaling.low_freq_factor"),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}},
            "rope_scaling.original",
        ),
        ("llama", {"rope_scaling": LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ("llama", {"hidden_size": 60}, "head_dim"),
        ("llama", {"rope_parameters": {FULL: {"rope_theta": 1e4}}}, f"rope_parameters.{FULL}"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window"),
        ("mistral", {"layer_types": [FULL] * 6}, "layer_types"),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
        ("qwen3_5_text", {"layer_types": [SLIDING] * 6}, "layer_types"),
        ("qwen3_5_text", {"layer_types": [LINEAR] * 6}, "layer_types"),
        ("qwen3_5_text", {"layer_types": [LINEAR] * 5}, "layer_types"),
        ("qwen3_5_text", {"full_attention_interval": 0}, "full_attention_interval"),
        ("qwen3_5_text", {"linear_num_value_heads": 3, "linear_num_key_heads": 2}, "linear_num_value_heads"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
        ("qwen3_5_text", {"linear_conv_kernel_dim": 99}, "linear_conv_kernel_dim"),
        ("qwen3_5_text", {"linear_key_head_dim": 0}, "linear_key_head_dim"),
        ("qwen3_5_text", {"partial_rotary_factor": 0.001}, "partial_rotary_factor"),
        ("qwen3_5_text", {"rope_parameters": {"partial_rotary_factor": 2.0}}, "partial_rotary_factor"),
        ("qwen3_5_text", {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.rope_type"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("qwen3", {"layer_types": [LINEAR] * 6}, "layer_types"),
        ("qwen3_5", {}, "text_config"),
        ("qwen3_5", {"text_config": {"model_type": "qwen3"}}, "text_config.model_type"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window"),
        ("gemma3_text", {"sliding_window": True}, "sliding_window"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("gemma3_text", {"sliding_window_pattern": "6"}, "sliding_window_pattern"),
        ("gemma3_text", {"layer_types": [SLIDING] * 5}, "layer_types"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 6}, "layer_types"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma3_text", {"rope_local_base_freq": None}, "rope_local_base_freq"),
        ("gemma3_text", {"rope_local_base_freq": -1.0}, "local_rope_theta"),
        (
            "gemma3_text",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            f"rope_parameters.{SLIDING}",
        ),
        ("gemma3_text", {"rope_parameters": {SLIDING: {}, FULL: {"base": 3}}}, f"rope_parameters.{FULL}.base"),
        ("gemma3_text", {"rope_parameters": {FULL: {}, "rope_theta": 1e4}}, "rope_parameters.rope_theta"),
        ("gemma3_text", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling.rope_type"),
    ],
)
def test_what_is_not_here_is_refused_by_its_key(model_type: str, changes: dict[str, Any], key: str) -> None:
    assert refusal(model_type, **changes).startswith(key)


def test_what_a_family_has_that_config_json_does_not_say() -> None:
    llama = read("llama", num_key_value_heads=...)
    assert (llama.num_key_value_heads, llama.head_dim, llama.max_position_embeddings) == (8, 8, 2048)
    mistral = read("mistral", num_key_value_heads=...)
    assert [mistral.layer(i).window for i in range(6)] == [4096] * 6
    assert read("mistral", sliding_window=None).layer_types == ()
    gemma = read("gemma3_text")
    assert [gemma.layer(i).window for i in range(6)] == [4096] * 5 + [None]
    assert (gemma.layer(0).rope, gemma.layer(5).rope) == (Rope(1e4), Rope(1e6))
    assert (gemma.tie_word_embeddings, gemma.head_dim, gemma.attention_scale) == (True, 256, 1 / 16)
    hybrid = read("qwen3_5_text", num_key_value_heads=...)
    assert hybrid.layer_types == (LINEAR, LINEAR, LINEAR, FULL, LINEAR, LINEAR)
    assert [hybrid.place(i) for i in range(6)] == [0, 1, 2, 0, 3, 4]
    assert (hybrid.num_key_value_heads, hybrid.head_dim, hybrid.rotary_dim) == (4, 256, 64)
    assert hybrid.delta == (16, 32, 128, 128, 4)
    assert read("qwen3", linear_key_head_dim=4).linear_key_head_dim is None, "another family's key"
    assert read("qwen2", query_pre_attn_scalar=24).query_pre_attn_scalar is None, "another family's key"


def test_rope_of_either_age_and_kind_of_layers() -> None:
    scaled = read("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=5e5)
    assert scaled.layer(5).rope == Rope(5e5, LinearScaling(factor=8.0))
    assert scaled.layer(0).rope == Rope(1e4), "layers with a window are not stretched"
    nested = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}, SLIDING: {"rope_theta": 1e4}}
    assert read("gemma3_text", rope_parameters=nested) == scaled
    llama = read("llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    assert llama == read("llama", rope_scaling=LLAMA3, rope_theta=5e5)
    assert isinstance(llama.rope_scaling, Llama3Scaling)
    assert llama.max_position_embeddings == 2048, "which says it itself"


def test_the_text_part_of_a_network_for_images_and_text() -> None:
    text = {"model_type": "qwen3_5_text", "num_key_value_heads": 4, "tie_word_embeddings": False} | SIZES
    whole = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": text}
    assert NetworkConfig.from_dict(whole) == read("qwen3_5_text")
    assert NetworkConfig.from_dict(whole | {"tie_word_embeddings": True}) == read(
        "qwen3_5_text", tie_word_embeddings=True
    )


def test_tensors_of_each_family() -> None:
    names = {name: set(expected_shapes(config)) for name, config in family_configs().items()}
    layer = "model.layers.0."
    assert {n for n in names["qwen2"] if n.startswith(layer + "self_attn") and n.endswith("bias")} == {
        f"{layer}self_attn.{part}_proj.bias" for part in "qkv"
    }
    assert f"{layer}self_attn.o_proj.bias" in names["llama-biased"]
    assert not [n for n in names["llama"] if n.endswith(".bias") or "q_norm" in n]
    assert names["llama"] - {"lm_head.weight"} < names["gemma3"]
    assert f"{layer}pre_feedforward_layernorm.weight" in names["gemma3"]


def test_llama_3_keeps_fast_pairs_and_divides_slow_ones() -> None:
    scaling = Llama3Scaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    plain, ours = inverse_frequencies(64, 5e5), inverse_frequencies(64, 5e5, scaling)
    # pairs that turn four times and once in 8,192 positions: 32 ln(8192 / 2πn) / ln 5e5 = 14.1 and 17.5
    assert ours[:15] == plain[:15]
    assert ours[18:] == tuple(frequency / 32 for frequency in plain[18:])
    assert all(b / 32 < a < b for a, b in zip(ours[15:18], plain[15:18], strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("theta", [5e2, 1e4, 5e5])
@pytest.mark.parametrize("table", [LLAMA3, LLAMA3 | {"factor": 32.0}, {"rope_type": "linear", "factor": 3.0}])
def test_frequencies_are_those_of_transformers(theta: float, table: dict[str, Any]) -> None:
    oracle("torch")
    transformers = oracle("transformers")
    rope = oracle("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    theirs = rope(transformers.LlamaConfig(head_dim=64, rope_parameters=table | {"rope_theta": theta}))
    config = read("llama", head_dim=64, rope_parameters=table | {"rope_theta": theta})
    assert list(inverse_frequencies(64, *config.layer(0).rope)) == theirs.inv_freq.tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_what_transformers_takes_where_config_json_is_silent(model_type: str) -> None:
    transformers = oracle("transformers")
    sizes = SIZES | {"num_attention_heads": 32, "hidden_size": 256}
    theirs = transformers.AutoConfig.for_model(model_type, **sizes).to_dict()
    ours = read(model_type, **sizes | {"num_key_value_heads": 32 if model_type == "qwen3" else ...})
    for key in ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, key) == theirs[key], key
    assert ours.head_dim == theirs.get("head_dim", 8)
    assert ours.sliding_window == (theirs["sliding_window"] if FAMILIES[model_type].windows != "none" else None)
    assert list(ours.layer_types or [FULL] * 6) == theirs.get("layer_types", list(ours.layer_types or [FULL] * 6))
    rope = theirs["rope_parameters"]
    assert ours.layer(5).rope.theta == rope.get(FULL, rope)["rope_theta"]
    assert ours.layer(0).rope.theta == rope.get(SLIDING, rope)["rope_theta"] or model_type == "mistral"
