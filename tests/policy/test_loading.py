"""Model folders: what is read, what is refused in which words, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from troupe.errors import InputError, ModelError
from troupe.policy.loading import (
    COMPANION_FILES,
    Policy,
    load_policy,
    random_policy,
    read_model_folder,
    save_model_folder,
)
from troupe.policy.qwen3 import Qwen3Config, expected_shapes

DATA = Path(__file__).parent.parent / "data" / "qwen3"
TIED, UNTIED = DATA / "qwen3-tiny-tied", DATA / "qwen3-tiny-untied"


def arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    mx.eval(loaded)
    return loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the untied folder to damage."""
    return Path(shutil.copytree(UNTIED, tmp_path / "model"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, changes: dict[str, mx.array], drop: tuple[str, ...] = ()) -> None:
    tensors = arrays(folder / "model.safetensors") | changes
    kept = {name: np.array(w) for name, w in tensors.items() if name not in drop}
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.array(w) for name, w in kept.items()})


def shard(folder: Path) -> None:
    """Split the weights into two shards and an index."""
    tensors = arrays(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def refusal(folder: Path, dtype: str | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        read_model_folder(folder, dtype)
    return str(caught.value)


def test_weights_are_those_stored() -> None:
    config, weights = read_model_folder(UNTIED)
    stored = arrays(UNTIED / "model.safetensors")
    assert weights.keys() == stored.keys() == expected_shapes(config).keys()
    assert all(mx.array_equal(weights[name], stored[name]).item() for name in stored)


def test_shards_are_the_same_model(folder: Path) -> None:
    _, whole = read_model_folder(folder)
    shard(folder)
    _, parts = read_model_folder(folder)
    assert list(parts) == list(whole)
    assert all(mx.array_equal(parts[name], whole[name]).item() for name in whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_as_asked(dtype: str) -> None:
    policy = load_policy(TIED, dtype)
    assert policy.dtype == dtype
    assert policy.model(mx.array([[1, 2]])).dtype == getattr(mx, dtype)


def test_on_a_cpu_half_precision_becomes_float32_and_elsewhere_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {name: w.astype(mx.bfloat16) for name, w in arrays(folder / "model.safetensors").items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    monkeypatch.setattr("troupe.policy.loading.is_on_cpu", lambda: True)
    assert load_policy(folder).dtype == "float32"
    monkeypatch.setattr("troupe.policy.loading.is_on_cpu", lambda: False)
    assert load_policy(folder).dtype == "bfloat16"


def test_harmless_extras_are_dropped(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TIED, tmp_path / "model"))
    edit_tensors(folder, {"lm_head.weight": mx.zeros((512, 64)), "model.rotary_emb.inv_freq": mx.zeros((16,))})
    config, weights = read_model_folder(folder)
    assert weights.keys() == expected_shapes(config).keys()


def test_every_bad_tensor_is_in_one_message(folder: Path) -> None:
    edit_tensors(
        folder,
        {
            "model.layers.1.self_attn.q_proj.weight": mx.zeros((64, 64)),
            "model.layers.9.self_attn.q_proj.weight": mx.zeros((128, 64)),
            "lm_head.weight": mx.zeros((512, 64), mx.int32),
        },
        drop=("model.norm.weight", "model.layers.2.mlp.up_proj.weight"),
    )
    message = refusal(folder)
    assert message.startswith(f"{folder}: 5 bad tensor(s)")
    assert "model.norm.weight: missing" in message
    assert "model.layers.2.mlp.up_proj.weight: missing" in message
    assert "model.layers.1.self_attn.q_proj.weight: shape [64, 64] in model.safetensors" in message
    assert "[128, 64]" in message
    assert "model.layers.9.self_attn.q_proj.weight: unexpected in model.safetensors" in message
    assert "lm_head.weight: dtype I32" in message


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    shard(folder)
    second = folder / "model-00002-of-00002.safetensors"
    mx.save_safetensors(str(second), arrays(second) | {"lm_head.weight": mx.zeros((512, 64))})
    assert "lm_head.weight: stored twice" in refusal(folder)


def test_a_missing_folder_config_or_weights_is_named(folder: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such model folder")
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder}: holds no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_malformed_json_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder / 'config.json'}: not a JSON object")


def test_an_unsupported_network_is_named_with_its_file(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    assert refusal(folder).startswith(f"{folder / 'config.json'}: model_type: 'llama'")


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{file}: truncated")
    assert "copy it again" in message


@pytest.mark.parametrize("header", [b"not json", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {"shape": 1}}'])
def test_a_header_that_is_none_is_refused(folder: Path, header: bytes) -> None:
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "no safetensors file" in refusal(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "a\\b", ""])
def test_index_paths_cannot_leave_the_folder(folder: Path, name: str) -> None:
    shard(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    assert f"weight_map: {name!r} leads out of the folder" in refusal(folder)


def test_a_bad_index_is_refused(folder: Path) -> None:
    shard(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.norm.weight": "gone.safetensors"})
    assert "the shard gone.safetensors is missing" in refusal(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map=["a"])
    assert "weight_map: missing, or not an object" in refusal(folder)


def test_an_unknown_dtype_is_refused() -> None:
    assert refusal(UNTIED, "int8") == "dtype: 'int8' is refused; it must be one of float32, bfloat16, float16"


def test_saved_folders_carry_the_companions_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    (folder / "merges.txt").write_bytes(b"#version: 0.2\r\n")
    policy = load_policy(folder)
    policy.save(tmp_path / "copy")
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "copy").iterdir()} == names
    for name in names & {"config.json", *COMPANION_FILES}:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    _, metadata = mx.load(str(tmp_path / "copy" / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"}
    again = load_policy(tmp_path / "copy")
    assert again.config == policy.config
    assert all(mx.array_equal(again.weights[name], policy.weights[name]).item() for name in policy.weights)


def test_saving_over_the_folder_it_came_from(folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    policy = load_policy(folder)
    policy.save(folder)
    assert (folder / "config.json").read_bytes() == before
    assert load_policy(folder).config == policy.config


def test_without_a_source_the_config_is_written(tmp_path: Path) -> None:
    policy = load_policy(UNTIED)
    save_model_folder(tmp_path / "made", policy.config, policy.weights)
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"config.json", "model.safetensors"}
    again = load_policy(tmp_path / "made")
    assert again.config == policy.config
    assert json.loads((tmp_path / "made" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_log_probs_are_those_of_trl(name: str) -> None:
    vectors = arrays(DATA / "qwen3_forward.safetensors")
    ids, seen, kept = (np.array(vectors[f"B/{key}"]) for key in ("input_ids", "attention_mask", "completion_mask"))
    prompts = [row[:7][mask[:7] == 1].tolist() for row, mask in zip(ids, seen, strict=True)]
    completions = [row[7:][mask == 1].tolist() for row, mask in zip(ids, kept, strict=True)]
    policy = load_policy(DATA / f"qwen3-tiny-{name}")
    ours = np.array(policy.compute_log_probs(prompts, completions))
    theirs = np.array(vectors[f"B/{name}/T1.0/per_token_logps"])[:, : ours.shape[1]]
    mask = kept[:, : ours.shape[1]]
    assert ours.dtype == np.float32
    assert np.abs((ours - theirs) * mask).max() < 1e-4
    assert np.all(ours[mask == 0] == 0)


def test_log_probs_in_small_portions_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(TIED)
    prompts, completions = mx.arange(12).reshape(4, 3), mx.arange(20).reshape(4, 5)
    whole = policy.compute_log_probs(prompts, completions)
    monkeypatch.setattr("troupe.policy.loading.LOGITS_BYTES", 1)
    assert float(mx.abs(policy.compute_log_probs(prompts, completions) - whole).max()) < 1e-5
    assert policy.compute_log_probs([[1], [2]], [[], []]).shape == (2, 0)


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1]], [[1], [2]], "1 prompts cannot go with 2 completions"),
        ([[1], []], [[1], [2]], r"prompt_ids\[1\]: is empty"),
        ([[1], [2]], [[1], [512]], r"completion_ids\[1\]: id 512 is not in \[0, 512\)"),
        ([[-1], [2]], [[1], [2]], r"prompt_ids\[0\]: id -1"),
    ],
)
def test_log_probs_refuse_what_has_none(prompts: list[list[int]], completions: list[list[int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_policy(TIED).compute_log_probs(prompts, completions)


def test_eos_ids_come_from_the_generation_config_first(folder: Path) -> None:
    assert load_policy(folder).eos_ids == {1}
    edit_json(folder / "generation_config.json", eos_token_id=[5, 6])
    assert load_policy(folder).eos_ids == {5, 6}
    edit_json(folder / "generation_config.json", eos_token_id="x")
    with pytest.raises(ModelError, match="eos_token_id: 'x' is refused"):
        _ = load_policy(folder).eos_ids
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=[7])
    assert load_policy(folder).eos_ids == {7}
    (folder / "generation_config.json").unlink()
    assert load_policy(folder).eos_ids == {7}


def test_a_random_policy_has_no_tokenizer() -> None:
    config = Qwen3Config.from_dict(json.loads((TIED / "config.json").read_text()))
    policy = random_policy(config, seed=3)
    same = random_policy(config, seed=3)
    assert mx.array_equal(policy.model(mx.array([[1, 2]])), same.model(mx.array([[1, 2]]))).item()
    assert policy.eos_ids == {1}
    with pytest.raises(ModelError, match="no folder"):
        _ = policy.tokenizer


def test_text_comes_out(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    assert policy.tokenizer is policy.tokenizer
    text = policy.generate_text("hello", max_new_tokens=6, seed=1)
    assert text == policy.generate_text("hello", max_new_tokens=6, seed=1)
    ids = policy.tokenizer.encode("hello")
    greedy = policy.generate_text("hello", max_new_tokens=5, temperature=0.0, top_p=1.0)
    for _ in range(5):
        ids.append(int(np.argmax(np.array(policy.model(mx.array([ids])))[0, -1])))
        if ids[-1] in policy.eos_ids:
            break
    assert greedy == policy.tokenizer.decode(ids[len(policy.tokenizer.encode("hello")) :])
    assert isinstance(policy.generate_text("hi", max_new_tokens=2, top_k=3), str)


def test_policy_can_be_made_of_parts() -> None:
    config, weights = read_model_folder(TIED)
    assert Policy(config, weights).path is None
