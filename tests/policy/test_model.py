"""The policy in memory: ids, log-probs and text against vectors and its own other paths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.policy.forward_vectors import ABOUT, MODELS, SHIPPED, model_folder, tensors
from tests.policy.test_folders import edit_json
from tests.policy.test_hub import put_model
from troupe.errors import InputError, ModelError
from troupe.policy.folders import read_model_folder
from troupe.policy.load import load_policy
from troupe.policy.model import Policy, random_policy
from troupe.policy.network.architecture import NetworkConfig

TIED, UNTIED = SHIPPED / "qwen3-tiny-tied", SHIPPED / "qwen3-tiny-untied"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the untied folder to change."""
    return Path(shutil.copytree(UNTIED, tmp_path / "model"))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seen_by", ["the batch", "one row at a time"])
def test_log_probs_are_those_of_trl(name: str, seen_by: str) -> None:
    vectors = tensors()
    ids, seen, kept = (np.array(vectors[f"B/{key}"]) for key in ("input_ids", "attention_mask", "completion_mask"))
    width = ABOUT["prompt_width"]
    prompts = [row[:width][mask[:width] == 1].tolist() for row, mask in zip(ids, seen, strict=True)]
    completions = [row[width:][mask == 1].tolist() for row, mask in zip(ids, kept, strict=True)]
    policy = load_policy(model_folder(name), "float32")
    if seen_by == "one row at a time":
        pairs = zip(prompts, completions, strict=True)
        parts = [np.array(policy.compute_log_probs([prompt], [completion]))[0] for prompt, completion in pairs]
        ours = np.zeros((len(parts), max(map(len, parts))), np.float32)
        for row, part in enumerate(parts):
            ours[row, : len(part)] = part
    else:
        ours = np.array(policy.compute_log_probs(prompts, completions))
    theirs = np.array(vectors[f"B/{name}/T1.0/per_token_logps"])[:, : ours.shape[1]]
    mask = kept[:, : ours.shape[1]]
    assert ours.dtype == np.float32
    assert np.abs((ours - theirs) * mask).max() < 1e-4
    assert np.all(ours[mask == 0] == 0)


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_log_probs_in_small_portions_are_the_same(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(TIED)
    prompts, completions = mx.arange(12).reshape(4, 3), mx.arange(20).reshape(4, 5)
    whole = policy.compute_log_probs(prompts, completions)
    monkeypatch.setattr("troupe.policy.model.ROWS_AT_ONCE", rows_at_once)
    assert float(mx.abs(policy.compute_log_probs(prompts, completions) - whole).max()) < 1e-5
    assert policy.compute_log_probs([[1], [2]], [[], []]).shape == (2, 0)
    ragged = policy.compute_log_probs([[1], [2, 3]], [[], [4, 5]])  # alone, a row may have no tokens at all
    assert ragged[0].tolist() == [0.0, 0.0]
    assert float(mx.abs(ragged[1] - policy.compute_log_probs([[2, 3]], [[4, 5]])[0]).max()) < 1e-5


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


def test_eos_ids_are_those_of_all_files_together(folder: Path) -> None:
    assert load_policy(folder).eos_ids == {1}
    edit_json(folder / "generation_config.json", eos_token_id=[5, 6])
    assert load_policy(folder).eos_ids == {1, 5, 6}
    assert load_policy(folder).eos_ids_by_one_file == {5, 6}
    edit_json(folder / "generation_config.json", eos_token_id="x")
    with pytest.raises(ModelError, match="eos_token_id: 'x' is refused"):
        _ = load_policy(folder).eos_ids
    edit_json(folder / "generation_config.json", eos_token_id=None)
    edit_json(folder / "config.json", eos_token_id=[7])
    assert load_policy(folder).eos_ids == load_policy(folder).eos_ids_by_one_file == {7}
    (folder / "generation_config.json").unlink()
    assert load_policy(folder).eos_ids == {7}


def test_what_lay_beside_the_weights_is_kept_whatever_becomes_of_the_folder(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    policy = load_policy(model)
    kept = {file.name: file.read_bytes() for file in model.iterdir() if file.suffix == ".json"}
    shutil.rmtree(model)
    other = policy.having(policy.weights)
    other.save(tmp_path / "saved")
    assert {f.name: f.read_bytes() for f in (tmp_path / "saved").iterdir() if f.suffix == ".json"} == kept
    assert other.eos_ids == policy.eos_ids


def test_links_are_followed_and_none_is_made_or_written_through(tiny_model: Path, tmp_path: Path) -> None:
    """As a hub's cache has them: names that lead to files elsewhere."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    blob = tmp_path / "blob"
    (model / "tokenizer.json").rename(blob)
    (model / "tokenizer.json").symlink_to(blob)
    (model / "chat_template.jinja").symlink_to(tmp_path)  # no file: not a companion
    (model / "notes.txt").symlink_to(blob)
    content = blob.read_bytes()
    policy = load_policy(model)
    saved = tmp_path / "saved"
    saved.mkdir()
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (saved / "tokenizer_config.json").symlink_to(mine)
    policy.save(saved)
    assert not any(file.is_symlink() for file in saved.iterdir())
    assert (saved / "tokenizer.json").read_bytes() == content
    assert mine.read_text() == "mine"
    assert not {"chat_template.jinja", "notes.txt"} & {file.name for file in saved.iterdir()}


def test_a_random_policy_has_no_tokenizer() -> None:
    config = NetworkConfig.from_dict(json.loads((TIED / "config.json").read_text()))
    policy = random_policy(config, seed=3)
    same = random_policy(config, seed=3)
    assert mx.array_equal(policy.model(mx.array([[1, 2]])), same.model(mx.array([[1, 2]]))).item()
    assert policy.eos_ids == {1}
    with pytest.raises(ModelError, match="no folder"):
        _ = policy.tokenizer


def test_a_hub_id_is_looked_for_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = put_model(tmp_path, "Some/Tiny")
    policy, stored = load_policy("Some/Tiny"), load_policy(TIED)
    assert policy.path == snapshot
    assert all(mx.array_equal(policy.weights[name], stored.weights[name]).item() for name in stored.weights)
    with pytest.raises(ModelError, match=r"^Some/Other: no such folder here"):
        load_policy("Some/Other")


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


def test_batches_and_streams_are_the_same_texts(tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    prompts = ["hello", "a", "12+34="]
    texts = policy.generate_texts(prompts, max_new_tokens=9, temperature=1.0, top_p=1.0, seed=3)
    assert len(set(texts)) == 3
    assert texts[0] == policy.generate_text("hello", 9, 1.0, 1.0, seed=3)
    pieces = list(policy.stream_text("hello", 9, 1.0, 1.0, seed=3))
    assert "".join(pieces) == texts[0]
    assert len(pieces) > 1
    assert all(pieces)
    assert policy.generate_texts([]) == []
    with pytest.raises(ValueError, match="temperature"):
        policy.generate_text("a", temperature=-1.0)


def test_a_large_policy_is_saved_in_shards(tiny_model: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_model)
    policy.save(tmp_path / "whole")
    policy.save(tmp_path / "parts", max_shard_bytes=20_000)
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    again = load_policy(tmp_path / "parts")
    assert policy.generate_text("hi", seed=1) == again.generate_text("hi", seed=1)


def test_rows_are_filled_with_an_id_that_the_embedding_holds(tiny_model: Path, tmp_path: Path) -> None:
    assert load_policy(tiny_model).pad_id == 257
    shutil.copytree(tiny_model, tmp_path / "m")
    named = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>"}  # new, so they are 258, 259 and 260
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(named))
    policy = load_policy(tmp_path / "m")
    assert (policy.tokenizer.pad_token_id, policy.config.vocab_size, policy.pad_id) == (260, 260, 0)
