"""Model folders that were taken for something else: what ends a text, which head, which names, which files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import troupe
from tests.cases.cases import copy_case, expected_of
from tests.support.runs import call, done, lines
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.errors import ModelError
from troupe.policy import load_policy, read_model_folder
from troupe.run.evaluate import evaluate_folder

pytestmark = pytest.mark.anyio


def arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return {name: mx.array(np.array(array)) for name, array in loaded.items()}  # not of the file, which changes


def edit_arrays(folder: Path, change: Callable[[dict[str, mx.array]], dict[str, mx.array]]) -> None:
    """Store other tensors in a folder's one file of weights."""
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), change(arrays(file)))


def edit_json(file: Path, **changes: Any) -> None:
    known = json.loads(file.read_bytes()) if file.is_file() else {}
    kept = {key: value for key, value in (known | changes).items() if value is not ...}
    file.write_text(json.dumps(kept), encoding="utf-8")


def refusal(folder: Path, dtype: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder, dtype)
    return str(caught.value)


def last_logits(folder: Path, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(load_policy(folder, "float32").model(mx.array([ids]))[0, -1].astype(mx.float32))


# eos_base_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return copy_case("eos_base_folder", tmp_path)


def test_the_tokenizer_s_eos_token_ends_a_text_too(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    expected = expected_of("eos_base_folder")
    printed = json.loads(done(*expected["argv"][1:]))
    for key in ("completion", "completion_tokens", "finish_reason"):
        assert printed[key] == expected[key]
    policy = load_policy("model")
    chat = [{"role": "user", "content": "Where?"}]
    assert policy.generate_text(chat, 8, temperature=0.0) == expected["completion"]
    assert "".join(policy.stream_text(chat, 8, temperature=0.0)) == expected["completion"]


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "union"),
    [
        (256, 256, "<|im_end|>", {256, 258}),
        ([256, 257], 258, None, {256, 257, 258}),
        (None, [257], "<|im_end|>", {257, 258}),
        (..., None, "<|im_end|>", {258}),
        (256, -1, None, {256}),
        ([], None, None, set()),
    ],
)
def test_all_that_name_an_end_count(
    base: Path, generation: object, config: object, tokenizer: str | None, union: set[int]
) -> None:
    edit_json(base / "model" / "generation_config.json", eos_token_id=generation)
    edit_json(base / "model" / "config.json", eos_token_id=config)
    edit_json(base / "model" / "tokenizer_config.json", eos_token=tokenizer)
    assert load_policy(base / "model").eos_ids == union


async def test_held_out_answers_end_there_too(base: Path) -> None:
    evaluation = await evaluate_folder(base / "model", base / "chats.jsonl", max_completion_length=8)
    assert evaluation.completions == (expected_of("eos_base_folder")["completion"],)
    assert evaluation.accuracy == 1.0


def run_config(model: Path, folder: Path, prompts: Path, **generation: Any) -> troupe.RunConfig:
    settings = {
        "output": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {"path": str(prompts)},
        "generation": {"num_generations": 2, "max_completion_length": 8} | generation,
        "learner": {"lr": 1e-3, "batch_size": 1, "max_steps": 1},
        "checkpoint": {"every": 1},
        "metrics": {"sinks": ["jsonl"]},
        "schedule": {"generator": "thread"},
    }
    return troupe.load_config(None, [settings])


def any_reward(completions: list[str], **_: Any) -> list[float]:
    return [float(index) for index, _ in enumerate(completions)]


def test_completions_of_a_run_end_there_too(base: Path, tmp_path: Path) -> None:
    config = run_config(base / "model", tmp_path, base / "chats.jsonl", temperature=0.01)
    result = troupe.train(config, [any_reward])
    first = next(line for line in lines(result.folder) if line.get("step") == 1)
    length = expected_of("eos_base_folder")["completion_tokens"]
    assert first["completions/mean_length"] == length
    assert first["completions/clipped_ratio"] == 0.0
    state = load_checkpoint(list_checkpoints(Path(result.folder))[0]).state
    assert state.stop_ids == (256, 258)


# tied_flag_own_head


@pytest.fixture
def own_head(tmp_path: Path) -> Path:
    return copy_case("tied_flag_own_head", tmp_path) / "model"


def test_a_head_of_its_own_is_kept(own_head: Path, tmp_path: Path) -> None:
    expected = expected_of("tied_flag_own_head")["transformers"]
    logits = last_logits(own_head, expected["ids"])
    assert logits.argmax() == expected["last_argmax"]
    assert np.abs(logits[:5] - expected["last_logits_first_5"]).max() < 1e-4
    policy = load_policy(own_head)
    assert not policy.config.tie_word_embeddings
    assert "tie_word_embeddings: true, but the lm_head.weight beside it" in policy.notices[0]
    policy.save(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").notices == []
    assert json.loads((tmp_path / "saved" / "config.json").read_bytes())["tie_word_embeddings"] is False
    again = last_logits(tmp_path / "saved", expected["ids"])
    assert np.array_equal(again, logits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_head_that_is_the_embedding_stays_tied(own_head: Path, tmp_path: Path, dtype: mx.Dtype) -> None:
    """Also where the one is stored in a type of fewer bits, if that holds it."""
    tensors = arrays(own_head / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].astype(mx.bfloat16)
    tensors |= {"model.embed_tokens.weight": embedding.astype(mx.float32), "lm_head.weight": embedding.astype(dtype)}
    mx.save_safetensors(str(own_head / "model.safetensors"), tensors)
    policy = load_policy(own_head, "bfloat16")
    assert policy.config.tie_word_embeddings
    assert "lm_head.weight" not in policy.weights
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_bytes() == (own_head / "config.json").read_bytes()


def test_a_head_of_another_shape_or_type_is_refused_also_beside_the_flag(own_head: Path) -> None:
    edit_arrays(own_head, lambda tensors: tensors | {"lm_head.weight": mx.zeros((5, 32))})
    assert "lm_head.weight: shape [5, 32] in model.safetensors" in refusal(own_head)
    edit_arrays(own_head, lambda tensors: tensors | {"lm_head.weight": mx.zeros((272, 32), mx.int8)})
    assert "lm_head.weight: dtype I8" in refusal(own_head)


def test_without_head_and_flag_the_flag_is_named(own_head: Path) -> None:
    edit_arrays(own_head, lambda tensors: {name: array for name, array in tensors.items() if name != "lm_head.weight"})
    edit_json(own_head / "config.json", tie_word_embeddings=...)
    message = refusal(own_head)
    assert "config.json does not say tie_word_embeddings: true" in message
    assert "lm_head.weight: missing" in message


# nan_weights


@pytest.fixture
def not_finite(tmp_path: Path) -> Path:
    return copy_case("nan_weights", tmp_path)


@pytest.mark.parametrize("command", ["generate", "eval", "train"])
def test_weights_that_are_not_finite_are_refused_by_name(
    not_finite: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(not_finite)
    arguments = {
        "generate": ["generate", "-m", "model", "-p", "a"],
        "eval": ["eval", "-m", "model", "-d", "chats.jsonl"],
        "train": ["train", "-m", "model", "-d", "chats.jsonl", "-o", "out", "--set", "learner.batch_size=1"],
    }
    result = call(*arguments[command])
    assert (result.exit_code, result.stdout) == (2, "")
    for name in expected_of("nan_weights")["message_names"]:
        assert name in result.stderr
    assert not (not_finite / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_one_number_in_any_tensor_is_found(base: Path, dtype: str, bad: float, name: str) -> None:
    file = base / "model" / "model.safetensors"
    tensors = {key: array.astype(getattr(mx, dtype)) for key, array in arrays(file).items()}
    flat = np.array(tensors[name].astype(mx.float32)).ravel()
    flat[-1] = bad
    tensors[name] = mx.array(flat.reshape(tensors[name].shape)).astype(getattr(mx, dtype))
    mx.save_safetensors(str(file), tensors)
    assert f"\n  {name}: not finite (in model.safetensors)" in refusal(base / "model", dtype)


def test_a_nan_with_its_sign_set_is_found(base: Path) -> None:
    negative = mx.view(mx.array([0xFFC00000] * 32, mx.uint32), mx.float32)
    edit_arrays(base / "model", lambda tensors: tensors | {"model.norm.weight": negative})
    assert "model.norm.weight: not finite" in refusal(base / "model")


def test_what_a_type_has_no_room_for_is_told_with_the_type(base: Path) -> None:
    edit_arrays(base / "model", lambda tensors: tensors | {"model.norm.weight": mx.full((32,), 7e4)})
    message = refusal(base / "model", "float16")
    assert "model.norm.weight: not finite in float16, which has no room for its numbers" in message
    assert "another type" in message
    read_model_folder(base / "model", "bfloat16")


def test_many_tensors_make_a_short_message(not_finite: Path) -> None:
    edit_arrays(not_finite / "model", lambda tensors: {name: array * math.nan for name, array in tensors.items()})
    message = refusal(not_finite / "model")
    assert "in 24 tensor(s)" in message
    assert len(message.splitlines()) <= 10


# flat_names


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return copy_case("flat_names", tmp_path) / "model"


EXPECTED_FLAT: dict[str, Any] = {
    "ids": [257, 72, 105, 258, 10],
    "last_argmax": 45,
    "last_logits_first_5": [-0.18812, 2.39281, 0.21189, -1.07516, 0.475],
}


@pytest.mark.parametrize(
    ("before", "within"),
    [
        ("", ""),
        ("model.", ""),
        ("_orig_mod.", ""),
        ("_orig_mod.model.", ""),
        ("model._orig_mod.", ""),
        ("module.model.", ""),
        ("base_model.model.model.", ""),
        ("model.language_model.", ""),
        ("language_model.model.", ""),
        ("module._orig_mod.base_model.model.model.", ""),
        ("model.", "_orig_mod."),
        ("_fsdp_wrapped_module.model.", "_fsdp_wrapped_module."),
    ],
)
def test_prefixes_of_other_tools_are_understood(flat: Path, before: str, within: str) -> None:
    edit_arrays(flat, lambda tensors: {before + k.replace("mlp.", f"{within}mlp."): v for k, v in tensors.items()})
    logits = last_logits(flat, EXPECTED_FLAT["ids"])
    assert logits.argmax() == EXPECTED_FLAT["last_argmax"]
    assert np.abs(logits[:5] - EXPECTED_FLAT["last_logits_first_5"]).max() < 1e-4


@pytest.mark.parametrize("before", ["", "language_model.", "base_model.model.", "_orig_mod."])
def test_a_head_is_found_behind_its_prefix(own_head: Path, before: str) -> None:
    edit_arrays(own_head, lambda tensors: {before + name: array for name, array in tensors.items()})
    expected = expected_of("tied_flag_own_head")["transformers"]
    assert last_logits(own_head, expected["ids"]).argmax() == expected["last_argmax"]


def test_flat_names_of_a_base_model_s_class_load_and_are_saved_under_ours(flat: Path, tmp_path: Path) -> None:
    edit_json(flat / "config.json", architectures=["Qwen3Model"])
    policy = load_policy(flat)
    policy.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_bytes())["architectures"] == ["Qwen3ForCausalLM"]
    assert "model.layers.0.mlp.up_proj.weight" in arrays(tmp_path / "saved" / "model.safetensors")


def test_the_same_tensor_under_two_names_is_refused(flat: Path) -> None:
    edit_arrays(flat, lambda tensors: tensors | {"_orig_mod.norm.weight": tensors["norm.weight"]})
    message = refusal(flat)
    assert "model.norm.weight: stored twice, as " in message
    assert "_orig_mod.norm.weight" in message


def renamed(tensors: dict[str, mx.array], old: str, new: str) -> dict[str, mx.array]:
    return {name.replace(old, new): array for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda t: {"transformer.h." + name: array for name, array in t.items()}, "begin with 'transformer.h.'"),
        (
            lambda t: t | {"layers.0.mlp.up_proj.lora_A.default.weight": mx.zeros((4, 32))},
            "adapters beside the weights",
        ),
        (lambda t: renamed(t, "mlp.up_proj.weight", "mlp.up_proj.base_layer.weight"), "adapters beside the weights"),
        (lambda t: renamed(t, "_proj.weight", "_proj.qweight"), "its weights are quantized"),
        (lambda t: t | {"layers.0.mlp.up_proj.scales": mx.zeros((4, 32))}, "its weights are quantized"),
        (lambda t: t | {"layers.0.self_attn.q_proj.bias": mx.zeros((32,))}, "its projections have biases"),
        (lambda t: {k: v for k, v in t.items() if "_norm.weight" not in k}, "no norms of queries and keys"),
        (lambda t: t | {"layers.0.mlp.experts.0.up_proj.weight": mx.zeros((4, 32))}, "a mixture of experts"),
        (lambda t: t | {"layers.7.mlp.up_proj.weight": mx.zeros((4, 32))}, "holds layers up to 7"),
        (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, "no layer from 1 on"),
    ],
)
def test_what_is_not_understood_is_told_by_its_cause_and_shortly(flat: Path, change: Any, cause: str) -> None:
    edit_arrays(flat, change)
    message = refusal(flat)
    assert cause in message
    assert len(message.splitlines()) <= 10


# shards_without_index


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return copy_case("shards_without_index", tmp_path) / "model"


def test_shards_load_without_their_index(shards: Path) -> None:
    _, weights = read_model_folder(shards)
    stored = {name: array for file in shards.glob("*.safetensors") for name, array in arrays(file).items()}
    assert all(mx.array_equal(weights[name], stored[name]).item() for name in stored)
    assert call("generate", "-m", shards, "-p", "a", "--max-new-tokens", "1").exit_code == 0


def test_a_shard_that_is_missing_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    message = refusal(shards)
    assert "model-00002-of-00002.safetensors is missing" in message
    assert "model.safetensors.index.json" in message
    (shards / "model-00003-of-00003.safetensors").write_bytes(b"")
    assert "shards of several models" in refusal(shards)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("weights.00.safetensors",), "safetensors under other names (weights.00.safetensors)"),
        (("consolidated.safetensors",), "rename to model.safetensors"),
        (("weights.00.safetensors", "weights.01.safetensors"), "rename to model-00001-of-0000N.safetensors and so on"),
        (("pytorch_model.bin",), "pytorch_model.bin, a pickle, which is not read"),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "a pickle, which is not read"),
        (("consolidated.00.pth",), "a pickle"),
        (("qwen3-q4_k_m.gguf",), "llama.cpp's format"),
        (("weights.npz",), "an old MLX program"),
        (("tf_model.h5",), "TensorFlow's format"),
        (("flax_model.msgpack",), "Flax's format"),
        (("model.onnx",), "a graph"),
        ((), "copy the model's weights beside config.json"),
    ],
)
def test_other_files_are_told_for_what_they_are(shards: Path, names: tuple[str, ...], words: str) -> None:
    for file in shards.glob("*.safetensors"):
        file.unlink()
    for name in names:
        (shards / name).write_bytes(b"x")
    message = refusal(shards)
    assert message.startswith(f"{shards}: holds neither model.safetensors nor model.safetensors.index.json")
    assert words in message
    assert expected_of("shards_without_index")["must_not_say"] not in message


def test_what_stands_for_a_file_is_told(shards: Path) -> None:
    for file in shards.glob("*.safetensors"):
        file.unlink()
    (shards / "model.safetensors").symlink_to(shards / "gone")
    assert "links that lead nowhere (model.safetensors)" in refusal(shards)
    (shards / "model.safetensors").unlink()
    (shards / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "a pointer of Git LFS" in refusal(shards)


def test_what_is_no_model_folder_is_told(shards: Path, tmp_path: Path) -> None:
    file = shards / "model-00001-of-00002.safetensors"
    assert refusal(file) == f"{file}: is a file; give the model folder that it lies in"
    assert refusal(shards.parent) == f"{shards.parent}: holds no config.json, so it is no model folder; give {shards}"
    (shards / "config.json").unlink()
    assert refusal(shards).endswith(
        "holds no config.json, so it is no model folder; copy config.json beside the weights"
    )
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").endswith("holds no config.json, so it is no model folder")


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff\xfe", b"{" + b'"a":{' * 100_000, b""], ids=["deep", "no text", "open", "empty"]
)
def test_a_config_that_is_none_is_told(shards: Path, content: bytes) -> None:
    (shards / "config.json").write_bytes(content)
    assert refusal(shards).startswith(f"{shards / 'config.json'}: not a JSON object")


@pytest.mark.parametrize(
    "settings",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
    ],
    ids=str,
)
def test_quantized_folders_are_told_for_what_they_are(shards: Path, settings: dict[str, Any]) -> None:
    edit_json(shards / "config.json", **settings)
    (key,) = settings
    kind = settings[key]["quant_method"]
    assert refusal(shards).startswith(f"{shards / 'config.json'}: {key}: weights packed by {kind!r} are not supported")
    assert refusal(shards).endswith("quantize it with mlx_lm.convert -q where it must be small")


# adapter_folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return copy_case("adapter_folder", tmp_path) / "model"


@pytest.mark.parametrize("case", ["adapter_folder", "rope_per_layer_type"])
def test_what_is_not_understood_is_refused_by_its_name(tmp_path: Path, case: str) -> None:
    result = call("generate", "-m", copy_case(case, tmp_path) / "model", "-p", "a")
    assert (result.exit_code, result.stdout) == (2, "")
    for name in expected_of(case)["message_names"]:
        assert name in result.stderr


@pytest.mark.parametrize("key", ["base_model_name_or_path", "model"])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin", None])
@pytest.mark.parametrize("has_config", [False, True])
def test_its_base_is_named_where_it_says_so(
    adapter: Path, shards: Path, key: str, weights: str | None, has_config: bool
) -> None:
    (adapter / "adapters.safetensors").unlink()
    if weights is not None:
        (adapter / weights).write_bytes(b"x")
    if has_config:
        (adapter / "config.json").write_bytes((shards / "config.json").read_bytes())
    edit_json(adapter / "adapter_config.json", **{key: "Qwen/Qwen3-0.6B"})
    message = refusal(adapter)
    assert f"holds an adapter ({weights or 'adapter_config.json'})" in message
    assert "fuse or merge first" in message
    assert "Qwen/Qwen3-0.6B" in message


def test_whether_an_adapter_beside_a_whole_model_is_in_it_nobody_can_know(adapter: Path, flat: Path) -> None:
    (flat / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    read_model_folder(flat)
    (flat / "adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes())
    message = refusal(flat)
    assert "a whole model and an adapter (adapters.safetensors)" in message
    assert "fuse or merge first" in message


# rope_per_layer_type


@pytest.fixture
def rope(tmp_path: Path) -> Path:
    return copy_case("rope_per_layer_type", tmp_path) / "model"


YARN = {"factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "rope_parameters.sliding_attention"),
        ({"rope_parameters": {"rope_theta": 1e6, "full_attention": {}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"full_attention": YARN | {"rope_type": "yarn"}}}, "rope_scaling.full_attention"),
        ({"rope_parameters": [{"rope_theta": 1e6}]}, "rope_parameters"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": False}, "rope_scaling"),
        ({"rope_parameters": {"theta": 1e6}}, "rope_parameters.theta"),
        ({"rope_parameters": {"rope_theta": 1e6, "mrope_section": [8, 4, 4]}}, "rope_parameters.mrope_section"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": [1e6]}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": True}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": -1e6}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": None, "rope_theta": "1e6"}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e6}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": ["yarn"], "rope_theta": 1e6}}, "rope_parameters.rope_type"),
        ({"rope_scaling": YARN}, "rope_scaling.rope_type"),
        ({"rope_scaling": YARN | {"rope_type": "default", "type": "yarn"}}, "rope_scaling.rope_type"),
        ({"rope_scaling": YARN | {"rope_type": "yarn", "factor": 1e300}}, "rope_scaling.factor"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        ({"rope_parameters": None, "partial_rotary_factor": 0.25}, "partial_rotary"),
        ({"layer_types": 3}, "layer_types"),
        ({"layer_types": [["full_attention"], []]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({"sliding_window": ..., "use_sliding_window": True}, "use_sliding_window"),
        ({"is_causal": False}, "is_causal"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"hidden_size": 10**15}, "hidden_size"),
        ({"head_dim": 2**40}, "head_dim"),
        ({"max_position_embeddings": 10**18}, "max_position_embeddings"),
        ({"intermediate_size": 10**40}, "intermediate_size"),
    ],
)
def test_what_would_be_another_network_is_refused_by_its_key(rope: Path, changes: dict[str, Any], key: str) -> None:
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    edit_json(rope / "config.json", **base)
    read_model_folder(rope)
    edit_json(rope / "config.json", **base | changes)
    assert refusal(rope).startswith(f"{rope / 'config.json'}: {key}")


@pytest.mark.parametrize(
    ("key", "value"), [("vocab_size", 2**31 - 1), ("head_dim", 2**30), ("num_hidden_layers", 4096)]
)
def test_the_largest_sizes_are_refused_by_shapes_without_a_tensor_of_them(rope: Path, key: str, value: int) -> None:
    edit_json(rope / "config.json", rope_parameters=None, **{key: value})
    assert "bad tensor(s) for its config.json" in refusal(rope)


def test_theta_that_nothing_names_is_that_of_transformers(rope: Path) -> None:
    """Whose older versions leave out of a config.json what is as in theirs."""
    edit_json(rope / "config.json", rope_parameters=..., rope_theta=...)
    policy = load_policy(rope)
    assert policy.config.rope_theta == 10000.0
    assert [notice for notice in policy.notices if "names no rope_theta, so it is 10000, as in" in notice]
    edit_json(rope / "config.json", rope_theta=5e5)
    assert not load_policy(rope).notices


@pytest.mark.parametrize("changes", [{"rope_theta": None}, {"rope_parameters": {"rope_theta": None}}])
def test_a_theta_that_is_null_is_refused(rope: Path, changes: dict[str, Any]) -> None:
    edit_json(rope / "config.json", **({"rope_parameters": ..., "rope_theta": ...} | changes))
    with pytest.raises(ModelError, match="rope_theta: null is refused"):
        read_model_folder(rope)
