"""What a run takes from its model's folder it takes once: a folder that changes or goes spoils nothing. And what older
runs took from it otherwise stays as it was for them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.cases.cases import copy_case
from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.straight import run_straight
from troupe.actors.generator.process import _tokenizer
from troupe.actors.generator.wire import Setup, decode_in_process
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.checkpoint.files import sum_file
from troupe.errors import RunError
from troupe.policy import GenerationConfig, Policy, load_policy
from troupe.policy.decode import loop as decoding
from troupe.policy.load import begin_policy
from troupe.run import inputs
from troupe.run.prepare import prepare
from troupe.runtime.frames import encode


def files_of(folder: Path) -> dict[str, bytes]:
    """What lies beside the weights, without what only a checkpoint has."""
    ours = {"MANIFEST.json", "made.json", "state.json"}
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".json" and f.name not in ours}


@pytest.mark.slow
@pytest.mark.parametrize("becomes", ["nothing", "another"])
@pytest.mark.parametrize("generator", ["thread", "process"])
def test_a_model_folder_that_changes_or_goes_spoils_no_checkpoint(
    tmp_path: Path, tiny_model: Path, becomes: str, generator: str
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    before = files_of(model)
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps([{"prompt": "abc", "answer": "d"}]))

    def spoiling(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if becomes == "nothing":
            shutil.rmtree(model, ignore_errors=True)
        else:
            for name in before:
                (model / name).write_text("{}")
        return weigh_ids(completion_ids)

    config = tiny_config(
        model,
        tmp_path / "spoiled",
        checkpoint__every=1,
        learner__max_steps=2,
        data__eval_path=str(held_out),
        schedule__generator=generator,
        schedule__max_staleness=1,
    )
    result = troupe.train(config, [spoiling])
    assert result.complete
    run = Path(result.folder)
    assert len(list_checkpoints(run)) == 2
    for folder in (*list_checkpoints(run), run / "final"):
        assert files_of(folder) == before
    assert load_policy(run / "final").tokenizer.encode("abc") == load_policy(tiny_model).tokenizer.encode("abc")


def test_a_generator_s_process_that_is_made_anew_needs_no_folder(tmp_path: Path, tiny_model: Path) -> None:
    policy = load_policy(tiny_model)
    setup = Setup(
        name="generator",
        policy=policy.config,
        generation=GenerationConfig(),
        stop_ids=(),
        tokenizer=str(tmp_path / "gone"),
        tokenizer_files=policy.companions.files,
        seed=1,
        max_staleness=0,
        most_at_once=None,
        live=1,
        on_cpu=True,
    )
    told = decode_in_process(encode(setup))
    assert isinstance(told, Setup)
    assert _tokenizer(told).encode("abc") == policy.tokenizer.encode("abc")


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["thread", "process"])
def test_a_head_of_its_own_goes_through_a_run(tmp_path: Path, generator: str) -> None:
    model = copy_case("tied_flag_own_head", tmp_path) / "model"
    config = tiny_config(
        model, tmp_path, checkpoint__every=1, learner__max_steps=2, schedule__generator=generator, learner__lr=1e-3
    )
    assert any("lm_head.weight" in notice for notice in prepare(config, [weigh_ids]).notices)
    result = troupe.train(config, [weigh_ids])
    assert result.complete
    run = Path(result.folder)
    expected = run_straight(config, weigh_ids).weights
    assert not mx.array_equal(expected["lm_head.weight"], load_policy(model).weights["lm_head.weight"]).item()
    for folder in (list_checkpoints(run)[0], run / "final"):
        policy = load_policy(folder)
        assert not policy.config.tie_word_embeddings
        assert same_bits(policy.weights, expected)
    shutil.rmtree(list_checkpoints(run)[0])
    again = troupe.train(config, [weigh_ids], resume=True)
    assert again.complete
    assert same_bits(load_policy(run / "final").weights, expected)


def without_what_older_troupes_did_not_write(run: Path) -> None:
    """Make the checkpoints of a run as an older Troupe had written them."""
    for folder in list_checkpoints(run):
        state = json.loads((folder / "state.json").read_bytes())
        del state["stop_ids"]
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "MANIFEST.json").read_bytes())
        entry = sum_file(folder / "state.json")
        manifest["state.json"] = {"bytes": entry.bytes, "sha256": entry.sha256}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))


def test_a_run_of_an_older_troupe_goes_on_with_the_ids_and_the_head_that_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the ids of one file, and the embedding for the head wherever config.json says so."""
    model = copy_case("tied_flag_own_head", tmp_path) / "model"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, *range(40)]}))
    config = tiny_config(model, tmp_path, checkpoint__every=1, learner__lr=1e-3)

    def as_of_old(*arguments: Any) -> tuple[Policy, str]:
        policy, fingerprint = begin_policy(*arguments)
        tied = msgspec.structs.replace(policy.config, tie_word_embeddings=True)
        weights = {name: array for name, array in policy.weights.items() if name != "lm_head.weight"}
        return policy.having(weights, config=tied, eos_ids=policy.eos_ids_by_one_file), fingerprint

    with monkeypatch.context() as old:
        old.setattr(inputs, "begin_policy", as_of_old)
        run = Path(troupe.train(config, [weigh_ids]).folder)
    expected = load_checkpoint(list_checkpoints(run)[0])
    assert expected.config is not None
    assert expected.config.tie_word_embeddings
    for folder in list_checkpoints(run)[:2]:
        shutil.rmtree(folder)
    without_what_older_troupes_did_not_write(run)
    assert load_checkpoint(list_checkpoints(run)[0]).state.stop_ids is None
    again = troupe.train(config, [weigh_ids], resume=True)
    assert again.complete
    found = load_checkpoint(list_checkpoints(run)[0])
    assert found.state.version == expected.state.version == 4
    assert same_bits(found.weights, expected.weights)
    assert found.state.num_tokens == expected.state.num_tokens
    assert set(found.state.stop_ids or ()) == {256, *range(40)}
    assert load_policy(model).eos_ids > set(found.state.stop_ids or ())


def test_logits_that_are_not_finite_end_a_run_and_its_last_checkpoint_stays(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_model, tmp_path, checkpoint__every=1)
    plain = decoding.Wave._prefill
    rounds: list[None] = []
    run = tmp_path / "run"

    def overflows(wave: decoding.Wave) -> mx.array:
        rounds.append(None)
        hidden = plain(wave)
        if len(rounds) <= 2:
            return hidden
        until_s = time.monotonic() + 30.0
        while not list_checkpoints(run) and time.monotonic() < until_s:  # the fault may end the writing of one
            time.sleep(0.01)
        return hidden * float("inf")

    with monkeypatch.context() as spoiled:
        spoiled.setattr(decoding.Wave, "_prefill", overflows)
        with pytest.raises(RunError, match=r"logits for token 0 .* not finite"):
            troupe.train(config, [weigh_ids])
    assert len(rounds) == 3, "no new generator is made for what none can mend"
    assert load_checkpoint(list_checkpoints(run)[0]).state.version in (1, 2)
    assert not (run / "final").exists()
    assert troupe.train(config, [weigh_ids], resume=True).complete
    expected = run_straight(config, weigh_ids).weights
    assert same_bits(load_checkpoint(list_checkpoints(run)[0]).weights, expected)
