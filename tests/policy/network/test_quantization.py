"""What config.json says of packed matrices, and which tensors those are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.support.packed import AFFINE, CONFIG, FLOAT_KINDS, KINDS, write_packed_model
from troupe.errors import ModelError
from troupe.policy import NetworkConfig
from troupe.policy.network.quantization import Quantization, Quantized, packed_shapes, read_quantization
from troupe.policy.network.tensors import dtype_in, expected_shapes, network_bytes, parameter_count

VECTORS = Path(__file__).parents[2] / "data" / "adapters" / "quantized"
Q4, Q8 = Quantized(64, 4), Quantized(32, 8)
UP = "model.layers.0.mlp.up_proj"


def read(**settings: Any) -> Quantization | None:
    return read_quantization(settings)


def packing_of(table: dict[str, Any]) -> Quantized:
    return msgspec.convert(table, Quantized)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_is_read_and_written(kind: dict[str, Any]) -> None:
    quantization = read(quantization=kind)
    assert quantization == Quantization(packing_of(kind))
    config = msgspec.structs.replace(CONFIG, quantization=quantization)
    written = config.to_dict()
    assert written["quantization"] == written["quantization_config"] == kind
    assert NetworkConfig.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize("keys", [["quantization"], ["quantization_config"], ["quantization", "quantization_config"]])
def test_either_key_says_it(keys: list[str]) -> None:
    assert read(**{key: {"group_size": 64, "bits": 4} for key in keys}) == Quantization(Q4)


@pytest.mark.parametrize("nothing", [{}, {"quantization": None}, {"quantization_config": {}}, {"quantization": False}])
def test_without_them_nothing_is_packed(nothing: dict[str, Any]) -> None:
    assert read_quantization(nothing) is None
    assert "quantization" not in CONFIG.to_dict()


def test_modules_differ_where_they_are_named() -> None:
    quantization = read(
        quantization=AFFINE
        | {"lm_head": {"group_size": 32, "bits": 8}, "model.embed_tokens": False, "a": None, "b": True, UP: AFFINE}
    )
    assert quantization == Quantization(Q4, {"lm_head": Q8, "model.embed_tokens": None, "a": None})
    assert quantization.of("lm_head") == Q8
    assert quantization.of("model.embed_tokens") is None
    assert quantization.of(UP) == quantization.of("b") == Q4
    config = msgspec.structs.replace(CONFIG, quantization=quantization)
    assert NetworkConfig.from_dict(config.to_dict()) == config


def test_a_module_of_another_mode() -> None:
    table = FLOAT_KINDS[0] | {UP: {"group_size": 32, "bits": 8}}
    assert read(quantization=table) == Quantization(Quantized(32, 4, "mxfp4"), {UP: Q8}), "affine, where none is named"


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"quantization": 4}, "quantization: 4 is refused"),
        ({"quantization": [64, 4]}, "quantization: [64, 4] is refused"),
        ({"quantization": {"bits": 4}}, "quantization.group_size: None is refused"),
        ({"quantization": AFFINE | {"bits": None}}, "quantization.bits: None is refused"),
        ({"quantization": AFFINE | {"bits": "4"}}, "quantization.bits: '4' is refused"),
        ({"quantization": AFFINE | {"bits": 4.0}}, "quantization.bits: 4.0 is refused"),
        ({"quantization": AFFINE | {"bits": True}}, "quantization.bits: True is refused"),
        ({"quantization": AFFINE | {"bits": 7}}, "quantization.bits: 7 is not supported; it must be one of 2, 3, 4, 5"),
        ({"quantization": AFFINE | {"bits": -4}}, "quantization.bits: -4 is not supported"),
        ({"quantization": AFFINE | {"group_size": 0}}, "quantization.group_size: 0 is not supported"),
        ({"quantization": AFFINE | {"group_size": 16}}, "quantization.group_size: 16 is not supported"),
        ({"quantization": AFFINE | {"mode": "nf4"}}, "quantization.mode: 'nf4' is not supported"),
        ({"quantization": AFFINE | {"mode": ["affine"]}}, "quantization.mode: ['affine'] is not supported"),
        ({"quantization": FLOAT_KINDS[0] | {"bits": 8}}, "quantization: mxfp4 has groups of 32 numbers of 4 bits"),
        ({"quantization": FLOAT_KINDS[2] | {"group_size": 32}}, "quantization: nvfp4 has groups of 16 numbers"),
        ({"quantization": AFFINE | {UP: 4}}, f"quantization.{UP}: 4 is refused"),
        ({"quantization": AFFINE | {UP: {"bits": 4}}}, f"quantization.{UP}.group_size: None is refused"),
        ({"quantization": AFFINE | {UP: AFFINE | {"bits": 9}}}, f"quantization.{UP}.bits: 9 is not supported"),
        ({"quantization": AFFINE | {UP: AFFINE | {"quantize_input": True}}}, f"quantization.{UP}.quantize_input: True"),
        ({"quantization_config": {"quant_method": "awq"} | AFFINE}, "quantization_config: weights packed by 'awq'"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config: weights packed by 'comp"),
        ({"compression_config": "x"}, "compression_config: weights packed by 'x'"),
        ({"quantization": AFFINE, "quantize_activations": True}, "quantize_activations: true is not supported"),
        ({"quantization": AFFINE, "quantization_config": AFFINE | {"bits": 8}}, "quantization_config: says something"),
    ],
    ids=str,
)
def test_what_is_not_here_is_refused_by_its_key(settings: dict[str, Any], start: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_quantization(settings)
    assert str(caught.value).startswith(start)


def test_a_module_s_key_beside_the_three_may_say_no() -> None:
    assert read(quantization=AFFINE | {UP: AFFINE | {"quantize_input": False}}) == Quantization(Q4)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shapes_are_those_that_mlx_makes(kind: dict[str, Any]) -> None:
    made = mx.quantize(mx.random.normal((6, 256)), **kind)
    shapes = packed_shapes("m", (6, 256), packing_of(kind))
    names = ["m.weight", "m.scales", "m.biases"][: len(made)]
    assert shapes == dict(zip(names, [part.shape for part in made], strict=True))


@pytest.mark.parametrize("columns", [32, 96, 100])
def test_rows_that_no_group_divides_are_refused(columns: int) -> None:
    with pytest.raises(ModelError, match=rf"^quantization: {UP} has rows of {columns} numbers, which groups of 64"):
        packed_shapes(UP, (8, columns), Q4)


@pytest.mark.parametrize("kind", [KINDS[0], AFFINE, *FLOAT_KINDS], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_names_shapes_types_and_bytes_are_those_of_a_folder(
    tmp_path: Path, kind: dict[str, Any], dtype: str, is_tied: bool
) -> None:
    plain = msgspec.structs.replace(CONFIG, tie_word_embeddings=is_tied)
    modules: dict[str, Any] = {UP: False, "model.embed_tokens": KINDS[-4]}
    stored = write_packed_model(tmp_path, kind, modules, config=plain, dtype=dtype)
    config = NetworkConfig.from_dict(json.loads((tmp_path / "config.json").read_bytes()))
    assert expected_shapes(config) == {name: x.shape for name, x in stored.items()}
    of = {name: dtype_in(config, name, getattr(mx, dtype)) for name in stored}
    assert of == {name: x.dtype for name, x in stored.items()}
    assert network_bytes(config, getattr(mx, dtype)) == sum(x.nbytes for x in stored.values())
    assert parameter_count(config) == parameter_count(plain)


@pytest.mark.parametrize("name", sorted(folder.name for folder in VECTORS.iterdir()))
def test_what_mlx_lm_wrote_names_the_tensors_beside_it(name: str) -> None:
    config = NetworkConfig.from_dict(json.loads((VECTORS / name / "config.json").read_bytes()))
    stored = mx.load(str(VECTORS / name / "model.safetensors"))
    assert isinstance(stored, dict)
    assert expected_shapes(config) == {name: x.shape for name, x in stored.items()}
    assert NetworkConfig.from_dict(config.to_dict()) == config
