"""Folders of packed matrices: read as they are or expanded, refused where they are damaged, saved so that they load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support.devices import compute_on
from tests.support.packed import AFFINE, CONFIG, FLOAT_KINDS, KINDS, numbers_of, write_packed_model
from tests.test_oracles import oracle
from troupe.errors import ModelError
from troupe.policy import Policy, Weights, load_policy
from troupe.policy.folders import read_model_folder, save_model_folder
from troupe.policy.model_files import Companions
from troupe.policy.network.forward import hidden_states, project
from troupe.policy.network.quantization import Quantization, Quantized
from troupe.policy.network.tensors import expected_shapes, parameter_count

UP, DOWN, EMBED = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens"
UNTIED = msgspec.structs.replace(CONFIG, tie_word_embeddings=False)
MXFP4, NVFP4 = FLOAT_KINDS[0], FLOAT_KINDS[2]
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

Tensors = dict[str, mx.array]


def arrays(folder: Path) -> Tensors:
    loaded = mx.load(str(folder / "model.safetensors"))
    assert isinstance(loaded, dict)
    mx.eval(loaded)
    return loaded


def edit_json(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    known = json.loads(file.read_bytes()) | changes
    file.write_text(json.dumps({key: value for key, value in known.items() if value is not ...}), encoding="utf-8")


def store(folder: Path, tensors: Tensors) -> None:
    held = {name: mx.array(array) for name, array in tensors.items()}
    mx.eval(held)
    mx.save_safetensors(str(folder / "model.safetensors"), held)


def refusal(folder: Path, dtype: str | None = None, *, expand: bool = True) -> str:
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder, dtype, expand=expand)
    return str(caught.value)


def assert_equal(weights: Weights, expected: Weights) -> None:
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        assert weights[name].dtype == array.dtype, name
        assert mx.array_equal(weights[name], array).item(), name


def logits(folder: Path, *, expand: bool) -> mx.array:
    config, weights = read_model_folder(folder, expand=expand)
    return project(config, weights, hidden_states(config, weights, IDS))


# as it is, or expanded


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_packed_matrices_stay_as_they_are_stored(tmp_path: Path, kind: dict[str, Any]) -> None:
    stored = write_packed_model(tmp_path, kind)
    config, weights = read_model_folder(tmp_path, expand=False)
    assert config.quantization == Quantization(msgspec.convert(kind, Quantized))
    assert list(weights) == list(expected_shapes(config))
    assert_equal(weights, stored)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_expanded_ones_are_the_numbers_that_the_bits_stand_for(tmp_path: Path, kind: dict[str, Any]) -> None:
    stored = write_packed_model(tmp_path, kind)
    config, weights = read_model_folder(tmp_path, expand=True)
    assert config == CONFIG, "as of a folder that was never packed"
    assert {name: x.shape for name, x in weights.items()} == expected_shapes(CONFIG)
    assert {x.dtype for x in weights.values()} == {mx.float32}
    for module in (EMBED, UP, DOWN):
        ours = np.array(weights[f"{module}.weight"])
        np.testing.assert_allclose(ours, numbers_of(stored, module, kind), rtol=2e-7, atol=1e-7)
    assert mx.array_equal(weights["model.norm.weight"], stored["model.norm.weight"]).item()


@pytest.mark.parametrize("kind", [AFFINE, *FLOAT_KINDS], ids=str)
def test_both_ways_are_the_same_network(tmp_path: Path, kind: dict[str, Any]) -> None:
    write_packed_model(tmp_path, kind, config=UNTIED)
    a, b = logits(tmp_path, expand=True), logits(tmp_path, expand=False)
    assert float(mx.abs(a - b).max()) <= 1e-4 * float(mx.abs(a).max())


def test_they_are_expanded_on_a_cpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_packed_model(tmp_path, dtype="bfloat16")
    compute_on(monkeypatch, cpu=True)
    config, weights = read_model_folder(tmp_path)
    assert (config.quantization, weights[f"{UP}.weight"].dtype) == (None, mx.float32)
    compute_on(monkeypatch, cpu=False)
    config, weights = read_model_folder(tmp_path)
    assert (config.quantization is None, weights[f"{UP}.weight"].dtype) == (False, mx.uint32)
    assert load_policy(tmp_path).dtype == "bfloat16"


@pytest.mark.parametrize("kind", [AFFINE, NVFP4], ids=str)
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_float_tensors_beside_packed_ones_have_one_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any], asked: str | None
) -> None:
    compute_on(monkeypatch, cpu=False)
    stored = write_packed_model(tmp_path, kind)
    norms = {name: x.astype(mx.bfloat16) for name, x in stored.items() if "norm" in name}
    store(tmp_path, stored | norms)
    _, weights = read_model_folder(tmp_path, asked)
    held = getattr(mx, asked or "bfloat16")
    assert_equal(weights, {name: x.astype(held) if x.dtype == mx.float32 else x for name, x in stored.items()})


def test_an_embedding_that_is_not_packed_says_the_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_on(monkeypatch, cpu=False)
    stored = write_packed_model(tmp_path, AFFINE, {EMBED: False})
    store(tmp_path, stored | {f"{EMBED}.weight": stored[f"{EMBED}.weight"].astype(mx.float16)})
    assert load_policy(tmp_path).dtype == "float16"


@pytest.mark.parametrize("held", ["bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_what_is_expanded_is_rounded_once(tmp_path: Path, held: str, asked: str) -> None:
    stored = write_packed_model(tmp_path, dtype=held)
    _, weights = read_model_folder(tmp_path, asked, expand=True)
    expected = mx.array(numbers_of(stored, UP, AFFINE).astype(np.float32)).astype(getattr(mx, asked))
    ours, step = weights[f"{UP}.weight"], {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[asked]
    assert ours.dtype == expected.dtype
    wide = expected.astype(mx.float32)
    assert bool(mx.all(mx.abs(ours.astype(mx.float32) - wide) <= step * mx.abs(wide) + 1e-7).item())
    assert float(mx.mean(ours == expected)) > 0.99


def test_what_is_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path)
    _, weights = read_model_folder(tmp_path, expand=False)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 8)
        stream.write(bytes(file.stat().st_size // 2))
    assert_equal(weights, stored)


# which matrices


def test_matrices_are_packed_in_different_ways_or_not_at_all(tmp_path: Path) -> None:
    modules: dict[str, Any] = {UP: False, DOWN: {"group_size": 32, "bits": 6, "mode": "affine"}, "lm_head": MXFP4}
    stored = write_packed_model(tmp_path, AFFINE, modules, config=UNTIED)
    config, weights = read_model_folder(tmp_path, expand=False)
    assert config.quantization is not None
    assert config.quantization.modules == {
        UP: None,
        DOWN: Quantized(32, 6),
        "lm_head": Quantized(32, 4, "mxfp4"),
    }
    assert_equal(weights, stored)
    _, expanded = read_model_folder(tmp_path, expand=True)
    assert mx.array_equal(expanded[f"{UP}.weight"], stored[f"{UP}.weight"]).item()
    for module, kind in ((DOWN, modules[DOWN]), ("lm_head", MXFP4), (EMBED, AFFINE)):
        np.testing.assert_allclose(
            np.array(expanded[f"{module}.weight"]), numbers_of(stored, module, kind), rtol=2e-7, atol=1e-7
        )


def test_rows_that_no_group_divides_were_not_packed(tmp_path: Path) -> None:
    """mlx-lm leaves such matrices out and says nothing of it in config.json."""
    narrow = msgspec.structs.replace(UNTIED, hidden_size=96)
    stored = write_packed_model(tmp_path, config=narrow)
    assert f"{DOWN}.scales" in stored
    assert f"{UP}.scales" not in stored
    config, weights = read_model_folder(tmp_path, expand=False)
    assert config.quantization is not None
    assert config.quantization.of(UP) is config.quantization.of("lm_head") is None
    assert config.quantization.of(DOWN) == Quantized(64, 4)
    assert_equal(weights, stored)
    assert read_model_folder(tmp_path, expand=True)[0] == narrow


def test_names_may_have_parts_around_the_network(tmp_path: Path) -> None:
    modules: dict[str, Any] = {UP: {"group_size": 32, "bits": 8, "mode": "affine"}, DOWN: False}
    stored = write_packed_model(tmp_path, AFFINE, modules, config=UNTIED, prefix="language_model.")
    config, weights = read_model_folder(tmp_path, expand=False)
    assert config.quantization is not None
    assert config.quantization.modules == {UP: Quantized(32, 8), DOWN: None}
    assert_equal(weights, {name.removeprefix("language_model."): x for name, x in stored.items()})


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path / "one", config=UNTIED)
    config, weights = read_model_folder(tmp_path / "one", expand=False)
    save_model_folder(tmp_path / "many", config, weights, tmp_path / "one", 30_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_equal(read_model_folder(tmp_path / "many", expand=False)[1], stored)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {
        "total_parameters": parameter_count(UNTIED),
        "total_size": sum(x.nbytes for x in stored.values()),
    }


def with_head(folder: Path, change: Callable[[mx.array], mx.array]) -> Tensors:
    """A tied folder with a head of its own, made from the embedding's tensors."""
    stored = write_packed_model(folder)
    beside = {kind: stored[f"{EMBED}.{kind}"] for kind in ("weight", "scales", "biases")}
    head = {f"lm_head.{kind}": x if kind == "weight" else change(x) for kind, x in beside.items()}
    store(folder, stored | head)
    return stored | head


@pytest.mark.parametrize("expand", [False, True])
def test_a_packed_head_that_is_the_embedding_is_dropped(tmp_path: Path, expand: bool) -> None:
    with_head(tmp_path, lambda x: x)
    config, weights = read_model_folder(tmp_path, expand=expand)
    assert config.tie_word_embeddings
    assert not [name for name in weights if name.startswith("lm_head")]
    assert weights.keys() == expected_shapes(config).keys()


@pytest.mark.parametrize("expand", [False, True])
def test_a_packed_head_of_its_own_is_kept(tmp_path: Path, expand: bool) -> None:
    stored = with_head(tmp_path, lambda x: 2.0 * x)
    config, weights = read_model_folder(tmp_path, expand=expand)
    assert not config.tie_word_embeddings
    if expand:
        doubled = 2.0 * numbers_of(stored, EMBED, AFFINE)
        np.testing.assert_allclose(np.array(weights["lm_head.weight"]), doubled, rtol=2e-7, atol=1e-7)
    else:
        assert_equal(weights, stored)


def test_a_float_head_beside_a_packed_embedding_is_kept(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path)
    head = mx.random.normal((CONFIG.vocab_size, CONFIG.hidden_size))
    store(tmp_path, stored | {"lm_head.weight": head})
    config, weights = read_model_folder(tmp_path, expand=False)
    assert not config.tie_word_embeddings
    assert_equal(weights, stored | {"lm_head.weight": head})


# damaged


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


def changed(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def with_one(value: float, at: tuple[int, int] = (1, 1)) -> Callable[[mx.array], mx.array]:
    def change(x: mx.array) -> mx.array:
        x = mx.array(x)
        x[at] = value
        return x

    return change


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        (AFFINE, changed(f"{UP}.scales", lambda x: x[:, :1]), f"{UP}.scales: shape [256, 1] in model.safetensors, con"),
        (AFFINE, changed(f"{UP}.biases", lambda x: x[:1]), f"{UP}.biases: shape [1, 2] in model.safetensors, config"),
        (AFFINE, changed(f"{UP}.weight", lambda x: x[:, :-1]), f"{UP}.weight: shape [256, 15] in model.safetensors"),
        (AFFINE, changed(f"{UP}.weight", lambda x: x.view(mx.int32)), f"{UP}.weight: dtype I32 in model.safetensors"),
        (AFFINE, changed(f"{UP}.scales", lambda x: x.astype(mx.uint8)), f"{UP}.scales: dtype U8 in model.safetensors"),
        (MXFP4, changed(f"{UP}.scales", lambda x: x.astype(mx.float32)), f"{UP}.scales: dtype F32 in model.safe"),
        (AFFINE, changed("model.norm.weight", lambda x: x.astype(mx.uint32)), "model.norm.weight: dtype U32 in model"),
        (AFFINE, without(f"{UP}.biases"), f"{UP}.biases: missing"),
        (AFFINE, without(f"{UP}.scales"), f"{UP}.scales: missing"),
        (AFFINE, without(f"{UP}.weight"), f"{UP}.weight: missing"),
        (AFFINE, without("model.norm.weight"), "model.norm.weight: missing"),
        (MXFP4, lambda t: t | {f"{UP}.biases": t[f"{UP}.scales"]}, f"{UP}.biases: unexpected in model.safetensors"),
        (AFFINE, lambda t: t | {"model.norm.scales": mx.ones((1,))}, "model.norm.scales: unexpected in model.safet"),
        (AFFINE, changed(f"{UP}.scales", with_one(float("nan"))), f"{UP}.scales: not finite (in model.safetensors)"),
        (AFFINE, changed(f"{DOWN}.biases", with_one(-float("inf"))), f"{DOWN}.biases: not finite (in model.safetens"),
        (MXFP4, changed(f"{UP}.scales", with_one(0xFF)), f"{UP}.scales: not finite (in model.safetensors)"),
        (NVFP4, changed(f"{UP}.scales", with_one(0x7F)), f"{UP}.scales: not finite (in model.safetensors)"),
        (NVFP4, changed(f"{UP}.scales", with_one(0xFF)), f"{UP}.scales: not finite (in model.safetensors)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("expand", [False, True])
def test_a_damaged_tensor_is_named(
    tmp_path: Path, kind: dict[str, Any], change: Callable[[Tensors], Tensors], fault: str, expand: bool
) -> None:
    store(tmp_path, change(write_packed_model(tmp_path, kind)))
    message = refusal(tmp_path, expand=expand)
    assert message.startswith(f"{tmp_path}: ")
    assert f"\n  {fault}" in message


def test_scales_with_a_sign_are_numbers(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path, NVFP4)
    store(tmp_path, changed(f"{UP}.scales", with_one(0xFE))(stored))
    _, weights = read_model_folder(tmp_path, expand=True)
    assert bool(mx.all(mx.isfinite(weights[f"{UP}.weight"])).item())


def test_scales_that_a_type_has_no_room_for(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path)
    store(tmp_path, changed(f"{UP}.scales", with_one(30_000.0))(stored))
    message = refusal(tmp_path, "float16")
    assert message.startswith(f"{tmp_path}: {UP}.weight: its packed numbers are not finite in float16")
    assert "(model.dtype, --dtype)" in message
    assert bool(mx.all(mx.isfinite(read_model_folder(tmp_path, expand=True)[1][f"{UP}.weight"])).item())
    store(tmp_path, changed(f"{UP}.scales", with_one(1e30))(stored))
    reason = f"{UP}.scales: not finite in float16, which has no room for its numbers (in model.safetensors)"
    assert reason in refusal(tmp_path, "float16", expand=False)


def test_what_config_json_does_not_say_is_told(tmp_path: Path) -> None:
    write_packed_model(tmp_path)
    edit_json(tmp_path, quantization=..., quantization_config=...)
    message = refusal(tmp_path)
    assert "config.json's quantization does not say so; copy the config.json that came with them" in message
    edit_json(tmp_path, quantization=AFFINE | {UP: False})
    message = refusal(tmp_path)
    assert f"its weights are quantized ({UP}.biases, {UP}.scales), and config.json's quantization says other" in message
    edit_json(tmp_path, quantization=AFFINE | {"bits": 8})
    assert f"{UP}.weight: shape [256, 16] in model.safetensors, config.json asks for [256, 32]" in refusal(tmp_path)


def test_groups_that_do_not_divide_a_packed_row(tmp_path: Path) -> None:
    write_packed_model(tmp_path)
    edit_json(tmp_path, hidden_size=96)
    start = f"{tmp_path / 'config.json'}: quantization: {EMBED} has rows of 96 numbers, which groups of 64"
    assert refusal(tmp_path).startswith(start)


def test_what_is_not_packed_at_all_must_not_say_so(tmp_path: Path) -> None:
    write_packed_model(tmp_path)
    store(tmp_path, dict(read_model_folder(tmp_path, expand=True)[1]))
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'config.json'}: quantization: no tensor is quantized as it says; remove")
    edit_json(tmp_path, quantization=..., quantization_config=...)
    assert read_model_folder(tmp_path)[0] == CONFIG


@pytest.mark.parametrize("kind", ["qweight", "qzeros", "weight_scale_inv", "weight_packed", "SCB", "quant_state.x"])
def test_other_formats_are_told_with_the_way_out(tmp_path: Path, kind: str) -> None:
    stored = write_packed_model(tmp_path)
    store(tmp_path, stored | {f"{UP}.{kind}": mx.zeros((4,), mx.int32)})
    message = refusal(tmp_path)
    assert f"its weights are quantized ({UP}.{kind}) in a format that is not read" in message
    assert "mlx_lm.convert -q" in message


# saved


def test_packed_weights_are_saved_as_they_came(tmp_path: Path) -> None:
    stored = write_packed_model(tmp_path / "in", AFFINE, {UP: False})
    config, weights = read_model_folder(tmp_path / "in", expand=False)
    save_model_folder(tmp_path / "out", config, weights, tmp_path / "in")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "in" / "config.json").read_bytes()
    again, read = read_model_folder(tmp_path / "out", expand=False)
    assert again == config
    assert_equal(read, stored)


@pytest.mark.parametrize("source", ["none", "unpacked"])
def test_a_config_that_is_made_for_packed_weights_says_how(tmp_path: Path, source: str) -> None:
    stored = write_packed_model(tmp_path / "in", AFFINE, {UP: False, DOWN: MXFP4})
    config, weights = read_model_folder(tmp_path / "in", expand=False)
    companions = Companions()
    if source == "unpacked":
        companions = Companions({"config.json": json.dumps(CONFIG.to_dict()).encode()})
    save_model_folder(tmp_path / "out", config, weights, companions)
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert written["quantization"] == written["quantization_config"] == AFFINE | {UP: False, DOWN: MXFP4}
    again, read = read_model_folder(tmp_path / "out", expand=False)
    assert again == config
    assert_equal(read, stored)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expanded_weights_are_saved_as_an_unquantized_model(tmp_path: Path, dtype: str) -> None:
    write_packed_model(tmp_path / "in", config=UNTIED)
    edit_json(tmp_path / "in", dtype="float16", extra=1)
    config, weights = read_model_folder(tmp_path / "in", dtype, expand=True)
    Policy(config, weights, tmp_path / "in").save(tmp_path / "out")
    before, after = (json.loads((tmp_path / name / "config.json").read_bytes()) for name in ("in", "out"))
    del before["quantization"], before["quantization_config"]
    assert after == before | {"dtype": dtype}
    again, read = read_model_folder(tmp_path / "out", dtype)
    assert again == config == UNTIED
    assert_equal(read, weights)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [AFFINE, {"group_size": 128, "bits": 3, "mode": "affine"}, MXFP4, NVFP4], ids=str)
@pytest.mark.parametrize("hidden", [128, 96])
def test_mlx_lm_packs_what_we_read_and_loads_what_we_save(tmp_path: Path, kind: dict[str, Any], hidden: int) -> None:
    utils = oracle("mlx_lm.utils")
    plain = msgspec.structs.replace(UNTIED, hidden_size=hidden)
    write_packed_model(tmp_path / "plain", {**AFFINE, "group_size": 999}, config=plain)  # which divides nothing
    edit_json(tmp_path / "plain", quantization=..., quantization_config=...)
    model, settings = utils.load_model(tmp_path / "plain")
    model, settings = utils.quantize_model(model, settings, **kind)
    utils.save_model(tmp_path / "packed", model)
    utils.save_config(settings, tmp_path / "packed" / "config.json")
    theirs = model(IDS).astype(mx.float32)
    for expand in (False, True):
        ours = logits(tmp_path / "packed", expand=expand)
        assert float(mx.abs(ours - theirs).max()) <= 1e-4 * float(mx.abs(theirs).max())
        config, weights = read_model_folder(tmp_path / "packed", expand=expand)
        save_model_folder(tmp_path / f"saved-{expand}", config, weights)
        loaded, _ = utils.load_model(tmp_path / f"saved-{expand}")
        assert float(mx.abs(loaded(IDS) - theirs).max()) <= 1e-4 * float(mx.abs(theirs).max())
