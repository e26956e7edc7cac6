"""Folders whose matrices mlx-lm has packed into few bits: what is read, expanded, refused and written."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.forward_vectors import SHIPPED
from tests.support.devices import compute_on
from troupe.errors import ModelError
from troupe.policy.folders import read_model_folder, save_model_folder
from troupe.policy.model_files import Companions
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.policy.network.tensors import expected_shapes, weights_dtype

TIED, UNTIED = SHIPPED / "qwen3-tiny-tied", SHIPPED / "qwen3-tiny-untied"
UP, EMBEDDING, NORM = "model.layers.0.mlp.up_proj", "model.embed_tokens", "model.norm.weight"
Q4 = Quantized(64, 4)
KINDS = [
    *(Quantized(group, bits) for group in (32, 64) for bits in (2, 3, 4, 5, 6, 8)),
    Quantized(32, 4, "mxfp4"),
    Quantized(32, 8, "mxfp8"),
    Quantized(16, 4, "nvfp4"),
]


def pack_folder(
    source: Path,
    folder: Path,
    kind: Quantized,
    modules: Mapping[str, Quantized | None] | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """Write a copy of a model folder with its matrices packed, its other numbers in a type; return it. `modules`: those
    that are packed otherwise, or (None) not."""
    modules = modules or {}
    shutil.copytree(source, folder)
    loaded = mx.load(str(source / "model.safetensors"))
    assert isinstance(loaded, dict)
    packed: dict[str, mx.array] = {}
    for name, tensor in loaded.items():
        module, x = name.removesuffix(".weight"), tensor.astype(dtype)
        own = modules.get(module, kind)
        if x.ndim == 1 or own is None:
            packed[name] = x
            continue
        parts = mx.quantize(x, group_size=own.group_size, bits=own.bits, mode=own.mode)
        packed |= {f"{module}.{part}": y for part, y in zip(("weight", "scales", "biases"), parts, strict=False)}
    mx.eval(packed)
    mx.save_safetensors(str(folder / "model.safetensors"), packed, metadata={"format": "mlx"})
    table: dict[str, Any] = _table(kind) | {name: own is not None and _table(own) for name, own in modules.items()}
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings |= {"quantization": table, "quantization_config": table}
    (folder / "config.json").write_text(json.dumps(settings, indent=4), encoding="utf-8")
    return folder


def _table(kind: Quantized) -> dict[str, Any]:
    return {"group_size": kind.group_size, "bits": kind.bits, "mode": kind.mode}


def arrays(folder: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    return {name: mx.array(x) for name, x in loaded.items()}


def edit_tensors(folder: Path, changes: dict[str, mx.array], drop: tuple[str, ...] = ()) -> None:
    kept = {name: x for name, x in (arrays(folder) | changes).items() if name not in drop}
    mx.eval(kept)
    mx.save_safetensors(str(folder / "model.safetensors"), kept)


def edit_config(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def refusal(folder: Path, dtype: str | None = None, **how: bool) -> str:
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder, dtype, **how)
    return str(caught.value)


def unpacked(weight: mx.array, bits: int) -> np.ndarray:
    """The integers of a packed matrix, read bit by bit from the lowest on."""
    words = np.array(weight).astype("<u4")
    flat = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return np.asarray((flat.reshape(len(flat), -1, bits) * 2 ** np.arange(bits)).sum(-1))


def in_mxfp(codes: np.ndarray, bits: int) -> np.ndarray:
    """What the codes of E2M1 (4 bits) or E4M3 (8 bits) stand for."""
    mantissa, bias = (1, 1) if bits == 4 else (3, 7)
    sign = np.where(codes >> (bits - 1), -1.0, 1.0)
    exponent = (codes >> mantissa) & (2 ** (bits - 1 - mantissa) - 1)
    fraction = (codes & (2**mantissa - 1)) / 2**mantissa
    size = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - float(bias)))
    return np.asarray(sign * size)


def by_hand(weights: dict[str, mx.array], module: str, kind: Quantized) -> np.ndarray:
    """A matrix from its packed tensors, in float64, after the formats' own definitions."""
    codes = unpacked(weights[f"{module}.weight"], kind.bits)
    scales = np.array(weights[f"{module}.scales"].astype(mx.float32) if kind.mode == "affine" else 0, dtype=float)
    if kind.mode == "affine":
        biases = np.array(weights[f"{module}.biases"].astype(mx.float32), dtype=float)
        return np.asarray(codes * scales.repeat(kind.group_size, 1) + biases.repeat(kind.group_size, 1))
    stored = np.array(weights[f"{module}.scales"]).astype(int)
    scales = in_mxfp(stored, 8) if kind.mode == "nvfp4" else 2.0 ** (stored - 127.0)
    return np.asarray(in_mxfp(codes, kind.bits) * scales.repeat(kind.group_size, 1))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("source", [TIED, UNTIED], ids=lambda folder: folder.name)
def test_every_kind_is_expanded_to_what_its_format_says(tmp_path: Path, source: Path, kind: Quantized) -> None:
    folder = pack_folder(source, tmp_path / "q", kind)
    stored = arrays(folder)
    config, weights = read_model_folder(folder, "float32", expand=True)
    assert config == read_model_folder(source)[0]
    assert {name: w.shape for name, w in weights.items()} == expected_shapes(config)
    assert {w.dtype for w in weights.values()} == {mx.float32}
    for name in (name for name, w in weights.items() if w.ndim == 2):
        expected = by_hand(stored, name.removesuffix(".weight"), kind)
        np.testing.assert_allclose(np.array(weights[name]), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_stays_packed_bit_for_bit(tmp_path: Path, kind: Quantized) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", kind, dtype=mx.bfloat16)
    stored = arrays(folder)
    config, weights = read_model_folder(folder, "bfloat16", expand=False)
    assert config.quantization == Quantization(kind)
    assert weights.keys() == stored.keys() == expected_shapes(config).keys()
    assert all(w.dtype == stored[name].dtype for name, w in weights.items())
    assert all(mx.array_equal(w, stored[name]).item() for name, w in weights.items())


def test_where_nothing_is_said_a_cpu_expands_and_a_gpu_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pack_folder(TIED, tmp_path / "q", Q4, dtype=mx.bfloat16)
    compute_on(monkeypatch, cpu=True)
    config, weights = read_model_folder(folder)
    assert config.quantization is None
    assert {w.dtype for w in weights.values()} == {mx.float32}
    compute_on(monkeypatch, cpu=False)
    config, weights = read_model_folder(folder)
    assert config.quantization == Quantization(Q4)
    assert {w.dtype for w in weights.values()} == {mx.bfloat16, mx.uint32}
    assert weights_dtype(weights) == mx.bfloat16, "where the embedding is packed, the norm tells"
    config, weights = read_model_folder(folder, "float32")
    assert {w.dtype for w in weights.values()} == {mx.float32, mx.uint32}


def test_expanding_from_16_bits_rounds_nothing(tmp_path: Path) -> None:
    folder = pack_folder(TIED, tmp_path / "q", Q4, dtype=mx.bfloat16)
    stored = arrays(folder)
    _, weights = read_model_folder(folder, "float32", expand=True)
    expected = by_hand(stored, UP, Q4)
    ours = np.array(weights[f"{UP}.weight"])
    assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()
    coarse = np.array(mx.array(expected.astype(np.float32)).astype(mx.bfloat16).astype(mx.float32))
    assert np.abs(coarse - expected).max() > 1e-4 * np.abs(expected).max(), "or this would show nothing"


def test_modules_may_differ_or_be_left_as_they_are(tmp_path: Path) -> None:
    other, mx8 = Quantized(32, 6), Quantized(32, 8, "mxfp8")
    modules = {UP: other, EMBEDDING: mx8, "lm_head": None, "model.layers.1.mlp.down_proj": None}
    folder = pack_folder(UNTIED, tmp_path / "q", Q4, modules)
    config, weights = read_model_folder(folder, "float32", expand=False)
    assert config.quantization == Quantization(Q4, modules)
    kinds = {name: config.quantization.of(name) for name in (UP, "lm_head", EMBEDDING, "model.layers.1.mlp.up_proj")}
    assert list(kinds.values()) == [other, None, mx8, Q4]
    assert weights["lm_head.weight"].dtype == mx.float32
    assert "lm_head.scales" not in weights
    assert weights[f"{UP}.weight"].shape[1] == 6 * weights[f"{UP}.scales"].shape[1]
    _, dense = read_model_folder(folder, "float32", expand=True)
    np.testing.assert_allclose(np.array(dense[f"{UP}.weight"]), by_hand(arrays(folder), UP, other), rtol=0, atol=1e-6)
    assert mx.array_equal(dense["lm_head.weight"], arrays(UNTIED)["lm_head.weight"]).item()


def test_a_matrix_that_lies_there_in_float_numbers_is_taken_as_mlx_lm_takes_it(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4, {"lm_head": None})
    edit_config(folder, quantization={"group_size": 64, "bits": 4}, quantization_config=...)
    config, weights = read_model_folder(folder, expand=False)
    assert config.quantization == Quantization(Q4, {"lm_head": None})
    assert "lm_head.scales" not in weights


@pytest.mark.parametrize(
    ("modules", "expected"),
    [({"model.layers.0.mlp.up_proj": True}, {}), ({"model.layers.0.mlp.up_proj": False}, {UP: None})],
)
def test_a_module_may_say_yes_or_no(tmp_path: Path, modules: dict[str, bool], expected: dict[str, None]) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4, expected)
    edit_config(folder, quantization={"group_size": 64, "bits": 4, **modules}, quantization_config=...)
    config, _ = read_model_folder(folder, expand=False)
    assert config.quantization == Quantization(Q4, expected)


def test_either_key_tells_and_two_that_differ_are_refused(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    table = {"group_size": 64, "bits": 4}
    edit_config(folder, quantization=..., quantization_config=table)
    assert read_model_folder(folder, expand=False)[0].quantization == Quantization(Q4)
    edit_config(folder, quantization=table | {"bits": 8})
    assert refusal(folder).startswith(f"{folder / 'config.json'}: quantization")


def test_shards_and_prefixes_of_other_tools_are_the_same_model(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    _, whole = read_model_folder(folder, expand=False)
    tensors = {f"language_model.{name}": x for name, x in arrays(folder).items()}
    (folder / "model.safetensors").unlink()
    for number in (0, 1):
        file = folder / f"model-0000{number + 1}-of-00002.safetensors"
        mx.save_safetensors(str(file), {name: tensors[name] for name in sorted(tensors)[number::2]})
    _, parts = read_model_folder(folder, expand=False)
    assert parts.keys() == whole.keys()
    assert all(mx.array_equal(parts[name], whole[name]).item() for name in whole)


Damage = Callable[[dict[str, mx.array]], dict[str, mx.array]]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: {f"{UP}.scales": t[f"{UP}.scales"][:, :0]}, f"{UP}.scales: shape"),
        (lambda t: {f"{UP}.scales": t[f"{UP}.scales"][:-1]}, f"{UP}.scales: shape"),
        (lambda t: {f"{UP}.weight": t[f"{UP}.weight"][:, :-1]}, f"{UP}.weight: shape"),
        (lambda t: {f"{UP}.weight": t[f"{UP}.weight"].view(mx.int32)}, f"{UP}.weight: dtype I32"),
        (lambda t: {f"{UP}.weight": t[f"{UP}.weight"].view(mx.float32)}, f"{UP}.weight: dtype F32"),
        (lambda t: {f"{UP}.scales": t[f"{UP}.scales"].astype(mx.uint8)}, f"{UP}.scales: dtype U8"),
        (lambda t: {f"{UP}.biases": t[f"{UP}.biases"].astype(mx.int32)}, f"{UP}.biases: dtype I32"),
        (lambda t: {f"{UP}.scales": t[f"{UP}.scales"] * float("nan")}, f"{UP}.scales: not finite"),
        (lambda t: {f"{UP}.biases": t[f"{UP}.biases"] + float("inf")}, f"{UP}.biases: not finite"),
        (lambda t: {NORM: t[NORM] * float("nan")}, f"{NORM}: not finite"),
        (lambda t: {"model.layers.9.mlp.up_proj.scales": t[f"{UP}.scales"]}, "model.layers.9.mlp.up_proj.scales: unex"),
        (lambda _: {f"{NORM.removesuffix('weight')}scales": mx.zeros((4,))}, "model.norm.scales: unexpected"),
    ],
)
@pytest.mark.parametrize("expand", [True, False])
def test_a_damaged_tensor_is_named_with_its_file(tmp_path: Path, change: Damage, fault: str, expand: bool) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    edit_tensors(folder, change(arrays(folder)))
    message = refusal(folder, expand=expand)
    assert message.startswith(f"{folder}: ")
    assert fault in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("name", [f"{UP}.scales", f"{UP}.biases", f"{UP}.weight", f"{EMBEDDING}.scales", NORM])
def test_a_tensor_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    edit_tensors(folder, {}, drop=(name,))
    assert f"{name}: missing" in refusal(folder)


@pytest.mark.parametrize(
    ("kind", "nan"), [(Quantized(32, 4, "mxfp4"), 0xFF), (Quantized(32, 8, "mxfp8"), 0xFF), (KINDS[-1], 0x7F)], ids=str
)
@pytest.mark.parametrize("expand", [True, False])
def test_a_scale_of_8_bits_that_is_no_number_is_named(tmp_path: Path, kind: Quantized, nan: int, expand: bool) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", kind)
    scales = np.array(arrays(folder)[f"{UP}.scales"])
    scales[0, 0] = nan
    edit_tensors(folder, {f"{UP}.scales": mx.array(scales)})
    assert f"{UP}.scales: not finite" in refusal(folder, expand=expand)


def test_packed_tensors_of_which_the_config_does_not_tell_are_told_for_that(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    edit_config(folder, quantization=..., quantization_config=...)
    message = refusal(folder)
    assert "config.json's quantization" in message
    assert "does not say so" in message
    assert "cannot be trained" not in message


def test_a_config_that_tells_of_what_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(UNTIED, tmp_path / "q"))
    edit_config(folder, quantization={"group_size": 64, "bits": 4})
    assert "quantization" in refusal(folder)


def test_a_group_that_no_row_holds_is_refused_by_its_key(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4)
    edit_config(folder, quantization={"group_size": 128, "bits": 4}, quantization_config=...)
    message = refusal(folder)
    assert message.startswith(f"{folder / 'config.json'}: quantization: ")
    assert "128" in message


@pytest.mark.parametrize("limit", [None, 30_000])
def test_packed_folders_are_written_and_read_again(tmp_path: Path, limit: int | None) -> None:
    modules = {"lm_head": None, UP: Quantized(32, 8, "mxfp8")}
    folder = pack_folder(UNTIED, tmp_path / "q", Q4, modules)
    config, weights = read_model_folder(folder, "float32", expand=False)
    for source in (folder, None):
        out = tmp_path / f"out-{source is None}"
        save_model_folder(out, config, weights, source, limit)
        again, read = read_model_folder(out, "float32", expand=False)
        assert again == config
        assert all(mx.array_equal(read[name], weights[name]).item() for name in weights)
        settings = json.loads((out / "config.json").read_text())
        assert settings["quantization"] == settings["quantization_config"]
    assert (tmp_path / "out-False" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_what_was_expanded_is_written_without_a_word_of_quantization(tmp_path: Path) -> None:
    folder = pack_folder(UNTIED, tmp_path / "q", Q4, dtype=mx.bfloat16)
    config, weights = read_model_folder(folder, "float32", expand=True)
    for source in (folder, Companions.of(folder), None):
        save_model_folder(tmp_path / "out", config, weights, source)
        settings = json.loads((tmp_path / "out" / "config.json").read_text())
        assert not {"quantization", "quantization_config"} & settings.keys()
        again, read = read_model_folder(tmp_path / "out", "float32")
        assert again == config
        assert all(mx.array_equal(read[name], weights[name]).item() for name in weights)


@pytest.mark.parametrize("quantization", [Quantization(Q4), Quantization(Q4, {UP: None, EMBEDDING: KINDS[-1]})])
def test_the_config_survives_a_round_trip(quantization: Quantization) -> None:
    settings = json.loads((UNTIED / "config.json").read_text())
    settings["quantization"] = {"group_size": 64, "bits": 4}
    for name, kind in quantization.modules.items():
        settings["quantization"][name] = (
            kind and {"group_size": kind.group_size, "bits": kind.bits, "mode": kind.mode}
        ) or False
    config = NetworkConfig.from_dict(settings)
    assert config.quantization == quantization
    assert NetworkConfig.from_dict(config.to_dict()) == config


def test_a_tied_head_of_its_own_that_is_packed_like_the_embedding_is_dropped(tmp_path: Path) -> None:
    folder = pack_folder(TIED, tmp_path / "q", Q4)
    same = {f"lm_head.{k}": arrays(folder)[f"{EMBEDDING}.{k}"] for k in ("weight", "scales", "biases")}
    edit_tensors(folder, same)
    config, weights = read_model_folder(folder, "float32", expand=False)
    assert config.tie_word_embeddings
    assert weights.keys() == expected_shapes(config).keys()
    edit_tensors(folder, {"lm_head.scales": same["lm_head.scales"] * 2})
    config, weights = read_model_folder(folder, "float32", expand=False)
    assert not config.tie_word_embeddings
    assert {"lm_head.weight", "lm_head.scales", "lm_head.biases"} <= weights.keys()
