"""Model folders: what is read, what is refused in which words, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.forward_vectors import SHIPPED
from tests.support.devices import compute_on
from tests.test_oracles import IDS, oracle
from troupe.errors import InputError, ModelError
from troupe.policy.folders import read_model_folder, save_model_folder
from troupe.policy.load import load_policy
from troupe.policy.model import random_policy
from troupe.policy.model_files import COMPANION_FILES
from troupe.policy.network.tensors import expected_shapes

TIED, UNTIED = SHIPPED / "qwen3-tiny-tied", SHIPPED / "qwen3-tiny-untied"


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
    compute_on(monkeypatch, cpu=True)
    assert load_policy(folder).dtype == "float32"
    compute_on(monkeypatch, cpu=False)
    assert load_policy(folder).dtype == "bfloat16"
    norms = {name: w.astype(mx.float32) for name, w in tensors.items() if w.ndim == 1}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | norms)
    weights = load_policy(folder).weights
    assert {w.dtype for w in weights.values()} == {mx.bfloat16}, "kernels want one type"


def test_harmless_extras_are_dropped(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TIED, tmp_path / "model"))
    embedding = arrays(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, {"lm_head.weight": embedding, "model.rotary_emb.inv_freq": mx.zeros((16,))})
    config, weights = read_model_folder(folder)
    assert config.tie_word_embeddings
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


def test_a_tensor_twice_in_one_header_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    stored = file.read_bytes()
    size = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + size])
    again = json.dumps({"model.norm.weight": header["model.norm.weight"]})
    twice = (json.dumps(header)[:-1] + "," + again[1:]).encode()
    file.write_bytes(len(twice).to_bytes(8, "little") + twice + stored[8 + size :])
    assert "model.norm.weight: stored twice in model.safetensors" in refusal(folder)


def test_a_missing_folder_config_or_weights_is_named(folder: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith(f"{tmp_path / 'nowhere'}: no such model folder")
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder}: holds no config.json")


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_folder_around_a_model_or_an_adapter_says_which_to_give(tmp_path: Path, name: str) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / name).write_text("{}")
    assert refusal(tmp_path).endswith(f"so it is no model folder; give {tmp_path / 'final'}")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_malformed_json_is_named(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(folder).startswith(f"{folder / 'config.json'}: not a JSON object")


def test_an_unsupported_network_is_named_with_its_file(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="llama")
    assert refusal(folder).startswith(f"{folder / 'config.json'}: model_type: 'llama'")


@pytest.mark.parametrize("kept", [0, -1])
def test_truncated_weights_are_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(folder)
    assert message.startswith(f"{file}: truncated")
    assert "copy it again" in message


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


def test_rank_files_travel_too(folder: Path, tmp_path: Path) -> None:
    (folder / "qwen.tiktoken").write_bytes(b"IQ== 0\n")
    load_policy(folder).save(tmp_path / "copy")
    assert (tmp_path / "copy" / "qwen.tiktoken").read_bytes() == b"IQ== 0\n"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_saved_config_names_the_type_of_the_weights_beside_it(folder: Path, tmp_path: Path, key: str) -> None:
    settings = json.loads((folder / "config.json").read_bytes())
    settings.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(settings | {key: "bfloat16"}), encoding="utf-8")
    for dtype in ("bfloat16", "float32"):
        load_policy(folder, dtype).save(tmp_path / dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_bytes()) == settings | {key: dtype}
    assert (tmp_path / "bfloat16" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


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


def test_shards_hold_as_much_as_they_may_and_the_index_tells_where(tmp_path: Path) -> None:
    config, weights = read_model_folder(UNTIED)
    limit = 200_000
    save_model_folder(tmp_path, config, weights, UNTIED, limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert [shard.name for shard in shards] == [
        f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    held = [{name: w.nbytes for name, w in arrays(shard).items()} for shard in shards]
    sizes = [sum(shard.values()) for shard in held]
    assert max(sizes) <= limit
    assert all(left + min(right.values()) > 100_000 for left, right in zip(sizes, held[1:], strict=False))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file.name for file, names in zip(shards, held, strict=True) for name in names}
    assert list(index["weight_map"]) == sorted(weights)
    assert index["metadata"] == {"total_parameters": 262_976, "total_size": 4 * 262_976}
    _, again = read_model_folder(tmp_path)
    assert list(again) == list(weights)
    assert all(mx.array_equal(again[name], weights[name]).item() for name in weights)


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path: Path) -> None:
    config, weights = read_model_folder(TIED)
    save_model_folder(tmp_path, config, weights, TIED, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(weights)
    assert read_model_folder(tmp_path)[1].keys() == weights.keys()


@pytest.mark.parametrize("limit", [None, 4 * 262_976])
def test_what_fits_is_one_file(tmp_path: Path, limit: int | None) -> None:
    config, weights = read_model_folder(UNTIED)
    save_model_folder(tmp_path, config, weights, None, limit)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_older_weights_do_not_stay_beside_newer_ones(tmp_path: Path) -> None:
    config, weights = read_model_folder(TIED)
    zeros = {name: mx.zeros_like(w) for name, w in weights.items()}
    for limit in (300_000, None, 500_000):
        (tmp_path / "behind-00000001.safetensors").write_bytes(b"not ours")
        save_model_folder(tmp_path, config, zeros, TIED, limit)
        save_model_folder(tmp_path, config, weights, TIED, None if limit else 300_000)
        _, read = read_model_folder(tmp_path)
        assert all(mx.array_equal(read[name], weights[name]).item() for name in weights)
        named = {"model.safetensors"} if limit else set()
        if not limit:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            named = {*index["weight_map"].values(), "model.safetensors.index.json"}
        assert {file.name for file in tmp_path.glob("model*")} == named
        assert (tmp_path / "behind-00000001.safetensors").is_file()


def test_a_limit_that_is_none_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    config, weights = read_model_folder(TIED)
    with pytest.raises(InputError, match="max_shard_bytes: 0 is refused"):
        save_model_folder(tmp_path / "new", config, weights, TIED, 0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", "float16"])
def test_any_stored_type_runs_in_any_asked_for(tmp_path: Path, stored: str, asked: str | None) -> None:
    load_policy(TIED, stored).save(tmp_path)
    policy = load_policy(tmp_path, asked)
    assert policy.dtype == asked or (asked is None and policy.dtype == "float32")
    exact = load_policy(TIED).weights["model.layers.0.mlp.up_proj.weight"]
    expected = exact.astype(getattr(mx, stored)).astype(getattr(mx, policy.dtype))
    assert mx.array_equal(policy.weights["model.layers.0.mlp.up_proj.weight"], expected).item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rope", [{}, {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": True}}], ids=str)
@pytest.mark.parametrize("has_source", [True, False])
def test_transformers_and_mlx_lm_load_shards(
    tiny_model: Path, tmp_path: Path, rope: dict[str, Any], has_source: bool
) -> None:
    torch, transformers, mlx_lm_utils = oracle("torch"), oracle("transformers"), oracle("mlx_lm.utils")
    source = Path(shutil.copytree(tiny_model, tmp_path / "source"))
    if rope:
        rope["rope_scaling"]["original_max_position_embeddings"] = 16
    edit_json(source / "config.json", **rope)
    policy = load_policy(source)
    out = tmp_path / "out"
    save_model_folder(out, policy.config, policy.weights, source if has_source else None, 20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    ours = policy.model(mx.array(IDS))
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits
    assert float(mx.abs(ours - mx.array(theirs.tolist())).max()) <= 1e-4
    theirs = mlx_lm_utils.load_model(out)[0](mx.array(IDS))
    assert float(mx.abs(ours - theirs).max()) <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_shards_of_transformers_are_read(tmp_path: Path) -> None:
    torch, transformers = oracle("torch"), oracle("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(UNTIED, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    config, weights = read_model_folder(tmp_path, "bfloat16")
    stored = random_policy(config).weights.keys()
    expected = load_policy(UNTIED, "bfloat16").weights
    assert weights.keys() == stored == expected.keys()
    assert all(mx.array_equal(weights[name], expected[name]).item() for name in weights)
