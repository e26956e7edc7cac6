"""Adapter folders: PEFT's and mlx-lm's read, one written for both, damage and foreign arithmetic refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.policy.adapter.folders import (
    ADAPTERS,
    BASE,
    NETWORK,
    OF_MLX,
    OF_PEFT,
    SETTINGS,
    VECTORS,
    copied,
    edit_settings,
    edit_tensors,
    files_of,
    random_weights,
    resolved,
)
from troupe.errors import ModelError
from troupe.policy.adapter.files import (
    adapter_files,
    base_named_in,
    is_adapter_folder,
    read_adapter,
    save_adapter,
)
from troupe.policy.adapter.modules import Adapted, Adapter, adapter_shapes

Change = Callable[[dict[str, Any]], object]
Q = "model.layers.0.self_attn.q_proj"
PEFT_A, PEFT_B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(folder, NETWORK)
    return str(caught.value)


def assert_equal(weights: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert list(weights) == list(expected)
    for name, array in weights.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, expected[name]).item(), name


def setting(key: str, value: Any) -> Change:
    return lambda settings: settings.__setitem__(key, value)


def parameter(key: str, value: Any) -> Change:
    """Of mlx-lm's `lora_parameters`."""
    return lambda settings: settings["lora_parameters"].__setitem__(key, value)


# reading


def test_peft_s_folders_say_which_modules_ranks_and_scales() -> None:
    stored = read_adapter(VECTORS / "peft" / "patterns", NETWORK)
    assert (stored.adapter.kind, stored.base_fingerprint) == ("lora", None)
    modules = stored.adapter.modules
    assert modules["model.layers.1.self_attn.q_proj"] == Adapted(rank=2, scale=4.0)
    assert modules["model.layers.0.mlp.down_proj"] == Adapted(rank=8, scale=0.5)
    assert modules["model.layers.2.self_attn.v_proj"] == Adapted(rank=4, scale=2.0)
    assert list(stored.weights) == list(adapter_shapes(NETWORK, stored.adapter))
    assert read_adapter(VECTORS / "peft" / "rslora", NETWORK).adapter.modules[Q] == Adapted(rank=4, scale=3.0)
    last = read_adapter(VECTORS / "peft" / "last-layers", NETWORK).adapter.modules
    assert {module.split(".")[2] for module in last} == {"1", "2"}
    assert read_adapter(VECTORS / "peft" / "dora", NETWORK).adapter.kind == "dora"


def test_mlx_lm_s_scale_is_the_whole_factor_and_its_matrices_are_turned() -> None:
    stored = read_adapter(VECTORS / "mlx" / "default", NETWORK)
    assert set(stored.adapter.modules.values()) == {Adapted(rank=8, scale=20.0)}
    assert len(stored.adapter.modules) == 7 * 2, "all linear layers of the last num_layers"
    theirs = mx.load(str(VECTORS / "mlx" / "default" / OF_MLX))
    assert isinstance(theirs, dict)
    stem = "model.layers.1.mlp.down_proj"
    assert mx.array_equal(stored.weights[f"{stem}.lora_A.weight"], theirs[f"{stem}.lora_a"].T).item()
    dora = read_adapter(VECTORS / "mlx" / "dora", NETWORK)
    assert dora.weights["model.layers.2.mlp.down_proj.lora_magnitude_vector.weight"].shape == (64,)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    ],
)
def test_tensors_may_have_other_prefixes_and_peft_s_name_of_an_adapter(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    folder = copied("peft/qv", tmp_path)
    plain = read_adapter(folder, NETWORK)

    def change(tensors: dict[str, mx.array]) -> None:
        renamed = {rename(name): array for name, array in tensors.items()}
        assert renamed.keys() != tensors.keys()
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(folder, change)
    assert_equal(read_adapter(folder, NETWORK).weights, plain.weights)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_16_bits_become_float32(dtype: mx.Dtype, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    plain = read_adapter(folder, NETWORK).weights
    edit_tensors(folder, lambda t: t.update({name: array.astype(dtype) for name, array in t.items()}))
    rounded = {name: array.astype(dtype).astype(mx.float32) for name, array in plain.items()}
    assert_equal(read_adapter(folder, NETWORK).weights, rounded)


def test_the_base_may_be_named_from_the_adapter_s_folder_or_be_a_hub_s(tmp_path: Path) -> None:
    assert Path(base_named_in(VECTORS / "peft" / "qv") or "").samefile(BASE)
    assert Path(base_named_in(VECTORS / "mlx" / "default") or "").samefile(BASE)
    folder = copied("peft/qv", tmp_path)
    edit_settings(folder, setting("base_model_name_or_path", "Qwen/Qwen3-0.6B"))
    assert base_named_in(folder) == "Qwen/Qwen3-0.6B"
    edit_settings(folder, setting("base_model_name_or_path", "m" * 5000))
    assert base_named_in(folder) == "m" * 5000, "no folder's name can be so long"
    edit_settings(folder, setting("base_model_name_or_path", None))
    assert base_named_in(folder) is None


# writing


def written(name: str, folder: Path) -> tuple[Adapter, dict[str, mx.array]]:
    adapter = ADAPTERS[name]
    weights = random_weights(adapter)
    save_adapter(folder, files_of(adapter, weights))
    return adapter, weights


def assert_close_modules(ours: Adapter, expected: Adapter) -> None:
    """Alpha / rank need not give the last bit of a scale back."""
    assert list(ours.modules) == list(expected.modules)
    for module, adapted in ours.modules.items():
        assert adapted.rank == expected.modules[module].rank
        assert adapted.scale == pytest.approx(expected.modules[module].scale, rel=1e-15)
    assert (ours.kind, ours.dropout) == (expected.kind, expected.dropout)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_read_again_from_peft_s_file(name: str, tmp_path: Path) -> None:
    adapter, weights = written(name, tmp_path)
    stored = read_adapter(tmp_path, NETWORK)
    assert_close_modules(stored.adapter, adapter)
    assert_equal(stored.weights, weights)
    assert (stored.base_name, stored.base_fingerprint) == (str(BASE), "f" * 64)


@pytest.mark.parametrize("name", ADAPTERS)
def test_mlx_lm_s_file_alone_is_the_same_function(name: str, tmp_path: Path) -> None:
    """It has one rank and one scale, so that the factors may be others; their product is not."""
    adapter, weights = written(name, tmp_path)
    (tmp_path / OF_PEFT).unlink()
    stored = read_adapter(tmp_path, NETWORK)
    assert list(stored.adapter.modules) == list(adapter.modules)
    assert len(set(stored.adapter.modules.values())) == 1
    assert (stored.adapter.kind, stored.adapter.dropout) == (adapter.kind, adapter.dropout)
    assert stored.base_fingerprint == "f" * 64
    for module in adapter.modules:
        ours = product(module, stored.adapter, stored.weights)
        assert mx.allclose(ours, product(module, adapter, weights), rtol=1e-5, atol=1e-5).item()
        magnitude = f"{module}.lora_magnitude_vector.weight"
        assert mx.array_equal(stored.weights.get(magnitude, mx.zeros(1)), weights.get(magnitude, mx.zeros(1))).item()


def product(module: str, adapter: Adapter, weights: dict[str, mx.array]) -> mx.array:
    scale = adapter.modules[module].scale
    return scale * weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]


def test_equal_adapters_make_equal_files(tmp_path: Path) -> None:
    written("patterns", tmp_path / "a")
    written("patterns", tmp_path / "b")
    for name in (SETTINGS, OF_PEFT, OF_MLX):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_alpha_is_the_number_that_was_asked_for(tmp_path: Path) -> None:
    for rank, alpha in [(49, 1.0), (16, 32.0), (6, 4.0), (3, 0.1)]:
        adapter = resolved(rank=rank, alpha=alpha, target_modules=["q_proj"])
        settings = json.loads(files_of(adapter, random_weights(adapter)).settings)
        assert settings["lora_alpha"] == alpha
        assert isinstance(settings["lora_alpha"], int) == (alpha == int(alpha)), "PEFT declares an integer"


def test_a_base_whose_name_is_no_text_does_not_keep_an_adapter_from_being_written() -> None:
    adapter = ADAPTERS["last"]
    odd = adapter_files(NETWORK, adapter, random_weights(adapter), base_name="m\udce4", base_fingerprint="f")
    assert msgspec.json.decode(odd.settings)["base_model_name_or_path"] == "m\\udce4"


def test_the_settings_of_the_tool_that_wrote_last_say_whose_tensors_count(tmp_path: Path) -> None:
    adapter, weights = written("all", tmp_path)
    for_mlx = {name: 2.0 * array for name, array in weights.items()}
    save_adapter(tmp_path / "other", files_of(adapter, for_mlx))
    (tmp_path / OF_MLX).write_bytes((tmp_path / "other" / OF_MLX).read_bytes())
    assert_equal(read_adapter(tmp_path, NETWORK).weights, weights)
    edit_settings(tmp_path, lambda settings: [settings.pop(key) for key in ("peft_type", "r", "lora_alpha")])
    assert_equal(read_adapter(tmp_path, NETWORK).weights, for_mlx)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    read_adapter(VECTORS / "peft" / "qv", NETWORK, BASE, "0" * 64)  # PEFT does not say
    adapter = ADAPTERS["last"]
    save_adapter(tmp_path, files_of(adapter, random_weights(adapter)))
    read_adapter(tmp_path, NETWORK, BASE, "f" * 64)
    larger = msgspec.structs.replace(NETWORK, hidden_size=128)  # which would make a fault of every tensor
    for network in (NETWORK, larger):
        with pytest.raises(ModelError) as caught:
            read_adapter(tmp_path, network, Path("other"), "0" * 64)
        assert str(caught.value).startswith(
            f"{tmp_path}: this adapter was trained over another base ({BASE}) than other: their fingerprints are "
            "ffffffffffff… and 000000000000…; give the base"
        )


# what is none


def test_what_an_adapter_folder_is(tmp_path: Path) -> None:
    assert is_adapter_folder(VECTORS / "peft" / "qv")
    assert is_adapter_folder(VECTORS / "mlx" / "default")
    assert not is_adapter_folder(BASE)
    assert not is_adapter_folder(tmp_path)
    folder = copied("peft/qv", tmp_path)
    (folder / "config.json").write_bytes((BASE / "config.json").read_bytes())
    assert is_adapter_folder(folder), "some trainers leave the base's config.json beside an adapter"
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert not is_adapter_folder(folder), "the weights of a model are there, too"
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / OF_PEFT).rename(folder / "adapter_model.bin")
    (folder / SETTINGS).unlink()
    assert is_adapter_folder(folder), "which is then told why it cannot be read"


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.npz"])
def test_folders_without_tensors_say_what_there_is(name: str, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such adapter folder; give one that holds")
    assert refusal(tmp_path) == f"{tmp_path}: holds no {SETTINGS}, so it is no adapter folder"
    folder = copied("peft/qv", tmp_path)
    (folder / OF_PEFT).rename(folder / name)
    lacking = f"{folder}: holds neither {OF_PEFT} nor {OF_MLX}"
    assert refusal(folder) == f"{lacking}, but {name}, which is not read; save it anew as safetensors"
    (folder / name).unlink()
    assert refusal(folder) == lacking


@pytest.mark.parametrize("content", [b"{", b"[]", b'"\xff"'])
def test_settings_that_are_no_json_object_are_refused(content: bytes, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    (folder / SETTINGS).write_bytes(content)
    assert refusal(folder).startswith(f"{folder / SETTINGS}: not a JSON object")


# arithmetic that is not here


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("velora_config", {"num_groups": 2}),
        ("monteclora_config", {"n": 2}),
    ],
)
def test_settings_of_peft_that_mean_other_arithmetic_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    edit_settings(folder, setting(key, value))
    message = refusal(folder)
    assert message == f"{folder / SETTINGS}: {key}: {value!r} is not supported; merge this adapter with PEFT first"


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_adapters_whose_beginning_altered_the_base_are_refused(init: str, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    edit_settings(folder, setting("init_lora_weights", init))
    assert f"init_lora_weights: {init!r} has altered the base; convert" in refusal(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_beginnings_are_harmless(init: Any, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    edit_settings(folder, setting("init_lora_weights", init))
    assert_equal(read_adapter(folder, NETWORK).weights, read_adapter(VECTORS / "peft" / "qv", NETWORK).weights)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("peft_type", "LOHA", "peft_type: 'LOHA' is not supported; it must be 'LORA'"),
        ("r", "4", "r: 4 is refused; it must be a finite number"),
        ("r", True, "r: True is refused"),
        ("r", 10**400, "r: 1000000000"),
        ("r", 2.5, f"the rank of {Q} is 2.5; it must be a whole number from 1"),
        ("r", 0, f"the rank of {Q} is 0; it must be a whole number from 1"),
        ("lora_alpha", [8], "lora_alpha: [8] is refused"),
        ("lora_alpha", 0, f"lora_alpha of {Q} is 0, so that its adapter does nothing"),
        ("rank_pattern", ["q_proj"], "rank_pattern: ['q_proj'] is refused; it must be a table of numbers"),
        ("rank_pattern", {"(": 4}, "rank_pattern: '(' is no regular expression"),
        ("alpha_pattern", {"(?i)q_proj": 4}, "is no regular expression"),
        ("alpha_pattern", {"q_proj": None}, "q_proj: missing; it must be a finite number"),
        ("target_modules", "(", "target_modules: '(' is no regular expression"),
        ("target_modules", {"q_proj": 1}, "target_modules: {'q_proj': 1} is refused; it must be a text or a list"),
        ("lora_dropout", 1.0, "lora_dropout: 1.0 is refused; it must be at least 0 and below 1"),
        ("exclude_modules", ["q_proj", 7], "exclude_modules: ['q_proj', 7] is refused"),
        ("layers_to_transform", "1", "layers_to_transform: '1' is refused; it must be a list of numbers of layers"),
    ],
)
def test_values_of_peft_that_cannot_be_are_refused(key: str, value: Any, words: str, tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    edit_settings(folder, setting(key, value))
    message = refusal(folder)
    assert message.startswith(str(folder / SETTINGS))
    assert words in message


def without_scale(settings: dict[str, Any]) -> None:
    settings["lora_parameters"]["alpha"] = 16
    del settings["lora_parameters"]["scale"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, "lora_parameters.scale: missing, and alpha 16 does not say it: mlx-lm multiplies by scale"),
        (setting("fine_tune_type", "full"), "fine_tune_type: 'full': these are weights of the network itself"),
        (setting("fine_tune_type", "loha"), "fine_tune_type: 'loha' is not supported; it must be 'lora' or 'dora'"),
        (setting("fine_tune_type", ["lora"]), "fine_tune_type: ['lora'] is not supported"),
        (setting("lora_parameters", None), "lora_parameters: missing; it must say rank and scale"),
        (parameter("scale", None), "lora_parameters.scale: missing; it must be a finite number"),
        (parameter("rank", None), "lora_parameters.rank: missing; it must be a finite number"),
        (parameter("scale", 0.0), "lora_parameters.scale: 0, so that the adapter does nothing"),
        (parameter("rank", 2.5), "lora_parameters.rank: 2.5 is refused; it must be a whole number from 1"),
        (parameter("keys", "self_attn.q_proj"), "lora_parameters.keys: 'self_attn.q_proj' is refused; it must be a li"),
        (parameter("dropout", -0.1), "dropout: -0.1 is refused; it must be at least 0 and below 1"),
        (parameter("keys", [1]), "keys: [1] is refused"),
        (setting("num_layers", 1.5), "num_layers: 1.5 is refused; it must be a whole number"),
        (setting("num_layers", "all"), "num_layers: all is refused; it must be a finite number"),
    ],
)
def test_values_of_mlx_lm_that_cannot_be_are_refused(change: Change, words: str, tmp_path: Path) -> None:
    folder = copied("mlx/all-layers", tmp_path)
    edit_settings(folder, change)
    message = refusal(folder)
    assert message.startswith(str(folder / SETTINGS))
    assert words in message


# tensors


def zero(*shape: int) -> mx.array:
    return mx.zeros(shape)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(PEFT_B), f"1 bad tensor(s) for this base:\n  {PEFT_B}: missing"),
        (lambda t: t.update({PEFT_A: zero(5, 64)}), f"{PEFT_A}: shape [5, 64], this base and {SETTINGS} ask for [4,"),
        (lambda t: t.update({PEFT_A: zero(4, 64, 1)}), f"{PEFT_A}: shape [4, 64, 1], this base"),
        (
            lambda t: t.update({PEFT_A.replace("layers.0", "layers.3"): zero(4, 64)}),
            "layers.3.self_attn.q_proj.lora_A.weight: left over: adapter_config.json names no such part",
        ),
        (
            lambda t: t.update({PEFT_A.replace("q_proj", "k_proj"): zero(4, 64)}),
            "k_proj.lora_A.weight: left over: adapter_config.json names no such part",
        ),
        (lambda t: t.update({PEFT_A.replace(".lora_A.weight", ".lora_magnitude_vector"): zero(64)}), "vector: left o"),
        (lambda t: t.update({PEFT_B.replace(".weight", ".bias"): zero(64)}), "lora_B.bias: left over"),
        (lambda t: t.update({"base_model.model.lm_head.weight": zero(512, 64)}), "lm_head.weight: left over"),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": zero(4, 64)}),
            "lm_head.lora_A.weight: an adapter of embedding or head is not supported; merge it into its base first",
        ),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": zero(4, 512)}),
            "model.embed_tokens.lora_embedding_A: an adapter of embedding or head is not supported",
        ),
        (lambda t: t.update({PEFT_A.removeprefix("base_model.model."): zero(4, 64)}), "stored twice"),
        (lambda t: t.clear(), "bad tensor(s) for this base"),
        (lambda t: t.update({PEFT_A: mx.zeros((4, 64), mx.int32)}), f"{PEFT_A}: dtype I32; only F32, BF16, F16"),
        (lambda t: t.update({PEFT_A: t[PEFT_A] * mx.array(mx.nan)}), "NaN or infinity in model.layers.0.self_attn.q"),
        (lambda t: t.update({PEFT_A: t[PEFT_A] + mx.array(mx.inf)}), "NaN or infinity in model.layers.0.self_attn.q"),
    ],
)
def test_tensors_of_peft_that_do_not_fit_are_named(
    change: Callable[[dict[str, mx.array]], object], words: str, tmp_path: Path
) -> None:
    folder = copied("peft/qv", tmp_path)
    edit_tensors(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder / OF_PEFT}: ")
    assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{Q}.lora_b"), f"1 bad tensor(s) for this base:\n  {Q}.lora_b: missing"),
        (lambda t: [t.pop(f"{Q}.lora_{kind}") for kind in "ab"], f"2 bad tensor(s) for this base:\n  {Q}.lora_a: miss"),
        (lambda t: t.update({f"{Q}.lora_a": zero(64, 5)}), f"{Q}.lora_a: shape [64, 5], this base and {SETTINGS} as"),
        (lambda t: t.update({f"{Q.replace('q_', 'k_')}.lora_a": zero(64, 4)}), "k_proj.lora_a: left over"),
        (lambda t: t.update({f"{Q}.m": zero(64)}), f"{Q}.m: left over"),
        (lambda t: t.update({"lm_head.lora_a": zero(64, 4)}), "lm_head.lora_a: an adapter of embedding or head is not"),
        (lambda t: t.update({f"{Q}.weight": zero(64, 64)}), f"{Q}.weight: left over"),
    ],
)
def test_tensors_of_mlx_lm_that_do_not_fit_are_named(
    change: Callable[[dict[str, mx.array]], object], words: str, tmp_path: Path
) -> None:
    folder = copied("mlx/all-layers", tmp_path)
    edit_tensors(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder / OF_MLX}: ")
    assert words in message


def test_targets_of_peft_are_told_by_its_own_rules(tmp_path: Path) -> None:
    """What PEFT would not look for, it would pass over: such tensors are refused."""
    folder = copied("peft/qv", tmp_path)
    whole = read_adapter(folder, NETWORK)
    for same in [r".*\.self_attn\.(q|v)_proj", [*whole.adapter.modules], None]:
        edit_settings(folder, setting("target_modules", same))
        assert read_adapter(folder, NETWORK).adapter == whole.adapter
    edit_settings(folder, setting("target_modules", "all-linear"))
    assert f": {2 * 5 * 3} bad tensor(s) for this base:" in refusal(folder)
    edit_settings(folder, setting("exclude_modules", r".*\.(k_proj|o_proj)|.*\.mlp\..*"))
    assert read_adapter(folder, NETWORK).adapter == whole.adapter
    edit_settings(folder, setting("exclude_modules", ["layers.0.self_attn.q_proj", "k_proj", "o_proj"]))
    assert f"{PEFT_A}: left over" in refusal(folder)
    edit_settings(folder, lambda s: s.update(exclude_modules=None, target_modules=["q_proj", "v_proj"]))
    edit_settings(folder, setting("layers_to_transform", 0))
    assert "layers.1.self_attn.q_proj.lora_A.weight: left over" in refusal(folder)


@pytest.mark.parametrize("name", ["peft/qv", "mlx/default"])
def test_a_file_that_is_cut_off_or_a_pointer_is_told(name: str, tmp_path: Path) -> None:
    folder = copied(name, tmp_path)
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert refusal(folder).startswith(f"{file}: truncated, damaged or no safetensors file")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a pointer of Git LFS" in refusal(folder)


def test_types_that_mlx_cannot_load_are_told_before_it_tries(tmp_path: Path) -> None:
    folder = copied("peft/qv", tmp_path)
    header = json.dumps({PEFT_A: {"dtype": "F8_E5M2", "shape": [4, 64], "data_offsets": [0, 256]}}).encode()
    (folder / OF_PEFT).write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    assert refusal(folder) == f"{folder / OF_PEFT}: {PEFT_A}: dtype F8_E5M2; only F32, BF16, F16 are read"
