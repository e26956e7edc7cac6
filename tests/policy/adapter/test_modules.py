"""Which modules get an adapter of which rank and scale, as PEFT would choose; what its weights begin as."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.policy.adapter.folders import NETWORK, resolved
from troupe.errors import ConfigError
from troupe.policy.adapter.modules import (
    Adapted,
    adapter_parameter_count,
    adapter_shapes,
    describe_adapter,
    init_adapter,
)
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import linear_shapes


def refusal(**table: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(**table)
    return str(caught.value)


def test_all_linear_is_all_seven_of_each_layer_with_twice_the_rank_as_alpha() -> None:
    adapter = resolved()
    assert list(adapter.modules) == list(linear_shapes(NETWORK))
    assert len(adapter.modules) == 7 * 3
    assert set(adapter.modules.values()) == {Adapted(rank=16, scale=2.0)}
    assert set(resolved(rank=4).modules.values()) == {Adapted(rank=4, scale=2.0)}


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        (["mlp.up_proj"], ["up_proj"]),
        (r".*\.self_attn\.[qk]_proj", ["q_proj", "k_proj"]),
        (r"model\.layers\.\d+\.mlp\.(up|down)_proj", ["up_proj", "down_proj"]),
        (r"(?!lm_head).*(up|down)_proj", ["up_proj", "down_proj"]),
        (".*", [name.rpartition(".")[2] for name in list(linear_shapes(NETWORK))[:7]]),
    ],
)
def test_names_and_expressions_choose_modules(target: Any, leaves: list[str]) -> None:
    chosen = [name.rpartition(".")[2] for name in resolved(target_modules=target).modules]
    assert chosen == 3 * leaves


def test_a_whole_name_is_one_module() -> None:
    assert list(resolved(target_modules=["model.layers.1.mlp.up_proj"]).modules) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("layers", "meant"), [(None, {0, 1, 2}), (3, {0, 1, 2}), (1, {2}), ([0, 2], {0, 2}), ([2, 2], {2})]
)
def test_layers_are_the_last_or_those_named(layers: Any, meant: set[int]) -> None:
    adapter = resolved(layers=layers)
    assert {int(name.split(".")[2]) for name in adapter.modules} == meant
    assert len(adapter.modules) == 7 * len(meant)


def test_patterns_are_those_of_peft() -> None:
    adapter = resolved(
        rank=4,
        alpha=8.0,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 8, "q_proj": 6},
        alpha_pattern={"down_proj": 4.0},
    )
    assert adapter.modules["model.layers.1.self_attn.q_proj"] == Adapted(rank=2, scale=4.0), "the first one counts"
    assert adapter.modules["model.layers.0.self_attn.q_proj"] == Adapted(rank=6, scale=8 / 6)
    assert adapter.modules["model.layers.0.mlp.down_proj"] == Adapted(rank=8, scale=0.5)
    assert adapter.modules["model.layers.0.self_attn.v_proj"] == Adapted(rank=4, scale=2.0)


def test_rslora_divides_by_the_root() -> None:
    adapter = resolved(rank=8, alpha=6.0, use_rslora=True)
    assert adapter.modules["model.layers.0.mlp.up_proj"].scale == 6.0 / math.sqrt(8)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"target_modules": ["q_porj"]}, "adapter.target_modules: no module is called 'q_porj'; did you mean q_proj"),
        ({"target_modules": ["wte"]}, "no module is called 'wte'; there are q_proj, k_proj, v_proj, o_proj, gate_proj"),
        ({"target_modules": ["proj"]}, "no module is called 'proj'"),
        ({"target_modules": ["q_proj", ""]}, "no module is called ''"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            "adapter.target_modules: 'lm_head' names lm_head, which cannot have an adapter here: embedding and head "
            "are computed without one, together with the softmax; leave it out, or name some of q_proj, k_proj, v_proj",
        ),
        ({"target_modules": ["model.embed_tokens"]}, "'model.embed_tokens' names embed_tokens, which cannot have"),
        ({"target_modules": "lm_head"}, "'lm_head' names lm_head, which cannot have an adapter here"),
        ({"target_modules": r".*(q_proj|lm_head)"}, "'.*(q_proj|lm_head)' names lm_head, which cannot have an adapter"),
        ({"target_modules": "q_proj"}, "the expression 'q_proj' matches the whole name of no module, such as model."),
        ({"target_modules": ["layers.0.mlp.up_proj"], "layers": 1}, "adapter.layers leaves none of the modules that"),
        ({"layers": 4}, "adapter.layers is 4, but the network has 3 layers; give at most 3"),
        ({"layers": [0, 3]}, "adapter.layers names layer 3, but the last of the network is 2"),
        ({"rank_pattern": {"proj": 3}}, "adapter.rank_pattern: 'proj' matches none of the modules with an adapter"),
        (
            {"alpha_pattern": {"up_proj": 3.0}, "target_modules": ["q_proj"]},
            "adapter.alpha_pattern: 'up_proj' matches none of the modules with an adapter, such as model.layers.0.self",
        ),
    ],
)
def test_what_meets_nothing_is_refused(table: dict[str, Any], words: str) -> None:
    assert words in refusal(**table)


def test_shapes_and_their_count() -> None:
    adapter = resolved(kind="dora", rank=4, target_modules=["k_proj"], layers=1)
    stem = "model.layers.2.self_attn.k_proj"
    assert list(adapter_shapes(NETWORK, adapter).items()) == [
        (f"{stem}.lora_A.weight", (4, 64)),
        (f"{stem}.lora_B.weight", (32, 4)),
        (f"{stem}.lora_magnitude_vector.weight", (32,)),
    ]
    assert adapter_parameter_count(NETWORK, adapter) == 4 * 64 + 32 * 4 + 32


def test_weights_begin_as_those_of_peft() -> None:
    wide = msgspec.structs.replace(NETWORK, hidden_size=4096)
    adapter = resolved(wide, rank=32, target_modules=["q_proj"])
    stem = "model.layers.0.self_attn.q_proj"
    A = init_adapter(wide, adapter, "default", 7)[f"{stem}.lora_A.weight"]
    bound = 1 / math.sqrt(4096)
    assert A.dtype == mx.float32
    assert 0.999 * bound < mx.max(mx.abs(A)).item() <= bound  # type: ignore[operator]
    assert mx.std(A).item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    A = init_adapter(wide, adapter, "gaussian", 7)[f"{stem}.lora_A.weight"]
    assert mx.std(A).item() == pytest.approx(1 / 32, rel=0.01), "PEFT's standard deviation is 1/rank"
    assert mx.mean(A).item() == pytest.approx(0, abs=1e-3)
    assert not mx.any(init_adapter(wide, adapter, "default", 7)[f"{stem}.lora_B.weight"]).item()


def test_a_module_is_drawn_from_the_seed_and_its_name_alone() -> None:
    few = init_adapter(NETWORK, resolved(target_modules=["v_proj"]), "default", 5)
    many = init_adapter(NETWORK, resolved(), "default", 5)
    other = init_adapter(NETWORK, resolved(), "default", 2**63 - 1)
    names = [name for name in few if "lora_A" in name]
    assert all(mx.array_equal(few[name], many[name]).item() for name in names)
    assert not any(mx.array_equal(other[name], many[name]).item() for name in names)
    drawn = [many[name] for name in many if "lora_A" in name and many[name].shape == (16, 64)]
    assert not any(mx.array_equal(a, b).item() for i, a in enumerate(drawn) for b in drawn[:i])


def test_a_magnitude_begins_as_the_length_of_its_row() -> None:
    adapter = resolved(kind="dora", target_modules=["o_proj"])
    norms = {module: mx.arange(64).astype(mx.float32) for module in adapter.modules}
    weights = init_adapter(NETWORK, adapter, "default", 5, norms)
    assert list(weights) == list(adapter_shapes(NETWORK, adapter))
    assert weights["model.layers.1.self_attn.o_proj.lora_magnitude_vector.weight"].tolist() == list(range(64))


def test_one_line_for_people_has_the_scale_as_a_number() -> None:
    large = NetworkConfig.preset("Qwen3-4B")
    assert describe_adapter(large, resolved(large)) == (
        "LoRA of rank 16, scale 2, on 252 of 252 matrices: 33,030,144 trained numbers, 0.82% of the network's"
    )
    dora = resolved(kind="dora", rank=4, alpha=6.0, use_rslora=True, target_modules=["q_proj"], dropout=0.1)
    assert describe_adapter(NETWORK, dora).startswith("DoRA of rank 4, scale 3, on 3 of 21 matrices: 1,728 trained")
    assert describe_adapter(NETWORK, dora).endswith("dropout 0.1")
    mixed = resolved(rank=4, rank_pattern={"down_proj": 8}, alpha_pattern={"q_proj": 1.0})
    assert describe_adapter(NETWORK, mixed).startswith("LoRA of rank 4 to 8, scale 0.25 to 2, on 21 of 21 matrices: ")
