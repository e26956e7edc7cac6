"""A run of an adapter that is cut goes on to the same bits, beside the base that it began with and no other."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

import troupe
from tests.support.adapters import (
    DORA,
    LORA,
    adapter_config,
    cut_back,
    kill_generators,
    newest,
    train_adapter,
)
from tests.support.fakes import (
    RAGGED,
    delayed,
    often_equal,
    same_bits,
    tiny_config,
    weigh_ids,
    write_ragged_model,
)
from tests.support.runs import STORED, column, completions, policy_of, train
from tests.support.tiny import write_tiny_model
from troupe import Supervisor
from troupe.checkpoint import list_checkpoints
from troupe.errors import CheckpointError, ModelError
from troupe.run.prepare import prepare

SLOW = pytest.mark.slow
PROCESSES: dict[str, Any] = {"schedule__generator": "process", "schedule__generator_processes": 2}
EVERYTHING: dict[str, Any] = DORA | {
    "adapter__dropout": 0.2,
    "learner__dynamic_sampling": True,
    "learner__num_iterations": 2,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_mixup_alpha": 1.0,
    "learner__ref_model_sync_steps": 3,
    "learner__warmup_steps": 3,
}
EACH: dict[str, Any] = {"checkpoint__every": 1, "learner__max_steps": 5}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "staleness"),
    [
        pytest.param(LORA, 0, id="lora", marks=SLOW),
        pytest.param(LORA | {"model__dtype": "bfloat16"}, 1, id="16 bits", marks=SLOW),
        pytest.param(EVERYTHING, 2, id="everything"),
        pytest.param(EVERYTHING | PROCESSES, 1, id="everything, processes", marks=SLOW),
    ],
)
def test_a_run_goes_on_from_any_checkpoint_to_the_same_bits(
    tmp_path: Path, ragged_model: Path, settings: dict[str, Any], staleness: int
) -> None:
    reward = often_equal if "learner__dynamic_sampling" in settings else weigh_ids
    settings = settings | EACH | {"schedule__max_staleness": staleness}
    whole = train_adapter(ragged_model, tmp_path, delayed(1, reward=reward), **settings)
    assert len(list_checkpoints(Path(whole.folder))) == 5
    for version in range(1, 5) if staleness < 2 else (2, 3):
        folder = cut_back(whole.folder, version, tmp_path / str(version))
        again = train_adapter(ragged_model, folder, delayed(version, reward=reward), resume=True, **settings)
        assert again.complete
        assert same_bits(newest(again.folder).weights, newest(whole.folder).weights)
        assert same_bits(newest(again.folder).optimizer_state, newest(whole.folder).optimizer_state)
        assert same_bits(policy_of(again.folder), policy_of(whole.folder))
        assert completions(again.folder) == [c for c in completions(whole.folder) if c.step > version]


@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "network"])
def test_a_run_that_was_killed_before_its_last_folder_writes_the_same_files(
    tmp_path: Path, ragged_model: Path, adapter: bool
) -> None:
    settings = LORA if adapter else {"learner__lr": 1e-3}
    start = train_adapter if adapter else train
    whole = Path(start(ragged_model, tmp_path, **settings).folder)
    config = (
        adapter_config(ragged_model, tmp_path, **settings)
        if adapter
        else tiny_config(ragged_model, tmp_path, **STORED | settings)
    )
    written = {file.name: file.read_bytes() for file in (whole / "final").iterdir()}
    shutil.rmtree(whole / "final")
    troupe.train(config, (weigh_ids,), resume=True)
    assert {file.name: file.read_bytes() for file in (whole / "final").iterdir()} == written


@pytest.mark.anyio
@pytest.mark.parametrize("ending", ["stop", pytest.param("drain", marks=SLOW)])
async def test_a_run_that_was_ended_amid_its_steps_goes_on_as_if_it_had_not_been(
    tmp_path: Path, ragged_model: Path, ending: str
) -> None:
    whole = await anyio.to_thread.run_sync(lambda: train_adapter(ragged_model, tmp_path / "whole"))
    config = adapter_config(ragged_model, tmp_path / "cut")
    async with Supervisor(config, [weigh_ids]) as run:
        async for update in run.updates():
            if update.step == 2:
                getattr(run, ending)()
    assert 2 <= run.result.steps < 4
    async with Supervisor(config, [weigh_ids], resume=True) as again:
        await again.wait()
    assert again.result.complete
    assert same_bits(policy_of(run.folder), policy_of(whole.folder))
    assert completions(run.folder) == completions(whole.folder)
    assert column(run.folder, "loss") == column(whole.folder, "loss")


@pytest.mark.parametrize("on_stale", [pytest.param("requeue", marks=SLOW), pytest.param("correct", marks=SLOW)])
def test_a_free_run_goes_on_with_every_place(tmp_path: Path, ragged_model: Path, on_stale: str) -> None:
    settings = EACH | {"schedule__mode": "free", "schedule__max_staleness": 1, "schedule__on_stale": on_stale}
    whole = train_adapter(ragged_model, tmp_path, delayed(1, most_s=0.02), **settings)
    folder = cut_back(whole.folder, 2, tmp_path / "cut")
    again = train_adapter(ragged_model, folder, delayed(2, most_s=0.02), resume=True, **settings)
    assert again.complete
    before = [c for c in completions(whole.folder) if c.step <= 2]
    places = {(c.slot_step, c.place) for c in [*before, *completions(again.folder)]}
    assert places == {(step, place) for step in range(5) for place in range(2)}


def test_what_a_run_trains_can_never_change(tmp_path: Path, ragged_model: Path) -> None:
    train_adapter(ragged_model, tmp_path)
    for others, said in (
        ({"adapter__rank": 5}, r"adapter.rank: 4 → 5 \(never: a run goes on with the adapter that it began with\)"),
        ({"adapter__kind": "dora"}, r"adapter.kind: 'lora' → 'dora' \(never"),
        ({"adapter__target_modules": ["q_proj"]}, r"adapter.target_modules: 'all-linear' → \['q_proj'\] \(never"),
        ({"adapter__alpha": 1.0}, r"adapter.alpha: \(none\) → 1.0 \(never"),
    ):
        with pytest.raises(CheckpointError, match=said):
            train_adapter(ragged_model, tmp_path, resume=True, **LORA | others)
    with pytest.raises(CheckpointError, match=r"adapter.kind: 'lora' → \(none\) \(never"):
        train_adapter(ragged_model, tmp_path, resume=True, adapter__kind=None)


def test_a_run_of_the_whole_network_cannot_become_one_of_an_adapter(tmp_path: Path, ragged_model: Path) -> None:
    train_adapter(ragged_model, tmp_path, adapter__kind=None)
    with pytest.raises(CheckpointError, match=r"adapter.kind: \(none\) → 'lora' \(never"):
        train_adapter(ragged_model, tmp_path, resume=True)


def test_a_base_may_have_moved_and_is_named_where_it_is_now(tmp_path: Path, ragged_model: Path) -> None:
    model = Path(shutil.copytree(ragged_model, tmp_path / "model"))
    whole = train_adapter(model, tmp_path, **EACH)
    folder = cut_back(whole.folder, 2, tmp_path / "cut")
    moved = model.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"{model}: no such model folder"):
        train_adapter(model, folder, resume=True, **EACH)
    again = train_adapter(moved, folder, resume=True, **EACH)
    assert same_bits(policy_of(again.folder), newest(whole.folder).weights)
    settings = json.loads((Path(again.folder) / "final" / "adapter_config.json").read_bytes())
    assert settings["base_model_name_or_path"] == str(moved)


def test_another_base_is_refused_and_the_run_stays_as_it_is(tmp_path: Path) -> None:
    model = write_ragged_model(tmp_path / "model")
    run = Path(train_adapter(model, tmp_path, **EACH).folder)
    folder = cut_back(run, 2, tmp_path / "cut")
    write_tiny_model(model, RAGGED, seed=1)
    with pytest.raises(CheckpointError, match=rf"the run began with another base than the one now in {model}"):
        train_adapter(model, folder, resume=True, **EACH)
    write_ragged_model(model)
    assert train_adapter(model, folder, resume=True, **EACH).complete
    assert same_bits(policy_of(folder / "run"), policy_of(run))


@pytest.mark.parametrize("becomes", [pytest.param("another", marks=SLOW), "nothing"])
def test_a_base_that_changes_amid_a_run_in_one_process_spoils_nothing(tmp_path: Path, becomes: str) -> None:
    """It was read once; what is evaluated at the end, too, is what was learned."""
    model = write_ragged_model(tmp_path / "model")
    settings = EACH | {"data__eval_path": str(tmp_path / "prompts.json")}
    adapter_config(model, tmp_path)  # the prompts
    whole = train_adapter(model, tmp_path, **settings)

    def spoiling(completion_ids: list[list[int]], **_: Any) -> list[float]:
        spoil(model, becomes)
        return weigh_ids(completion_ids)

    spoiling.__name__ = weigh_ids.__name__
    result = train_adapter(model, tmp_path / "spoiled", spoiling, **settings)
    assert same_bits(newest(result.folder).weights, newest(whole.folder).weights)
    assert result.rewards_before == whole.rewards_before
    assert result.rewards_after == whole.rewards_after
    assert completions(result.folder) == completions(whole.folder)


def spoil(model: Path, becomes: str) -> None:
    if becomes == "nothing":
        shutil.rmtree(model, ignore_errors=True)
    else:
        write_tiny_model(model, RAGGED, seed=1)


@SLOW
@pytest.mark.parametrize("becomes", ["another", "nothing"])
def test_a_process_of_the_generator_takes_no_other_base_than_the_one_that_the_run_began_with(
    tmp_path: Path, becomes: str
) -> None:
    model = write_ragged_model(tmp_path / "model")
    settings = EACH | {"schedule__generator": "process"}
    whole = train_adapter(model, tmp_path / "whole", **settings)
    once, killed = threading.Lock(), list[int]()

    def deadly(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        with once:
            if trainer_state.global_step == 2 and not killed:
                spoil(model, becomes)
                killed.append(kill_generators())
        return weigh_ids(completion_ids)

    deadly.__name__ = weigh_ids.__name__
    with pytest.raises(ModelError, match=rf"{model}: the base was changed since the run began, .* restore it and resu"):
        train_adapter(model, tmp_path, deadly, **settings)
    assert killed == [1]
    assert not (tmp_path / "run" / "final").exists()
    write_ragged_model(model)
    again = train_adapter(model, tmp_path, resume=True, **settings)
    assert again.complete
    assert same_bits(policy_of(again.folder), policy_of(whole.folder))
    assert completions(again.folder) == completions(whole.folder)


def test_held_out_rows_are_answered_in_a_resume_as_they_were_by_the_adapter_that_the_run_began_with(
    tmp_path: Path, ragged_model: Path
) -> None:
    begun = Path(train_adapter(ragged_model, tmp_path / "begun").folder) / "final"
    adapter_config(ragged_model, tmp_path)
    settings = EACH | {"data__eval_path": str(tmp_path / "prompts.json"), "adapter__resume_from": str(begun)}
    whole = train_adapter(ragged_model, tmp_path, **settings)
    folder = cut_back(whole.folder, 3, tmp_path / "cut")
    again = train_adapter(ragged_model, folder, resume=True, **settings)
    assert whole.rewards_before != whole.rewards_after
    assert again.rewards_before == whole.rewards_before
    assert again.rewards_after == whole.rewards_after


def test_every_checkpoint_of_an_adapter_is_verified_and_a_damaged_one_passed_over(
    tmp_path: Path, ragged_model: Path
) -> None:
    run = Path(train_adapter(ragged_model, tmp_path, **EACH).folder)
    final = policy_of(run)
    damaged = {5: "adapter_model.safetensors", 4: "adapters.safetensors", 3: "adapter_config.json"}
    for version, name in damaged.items():
        file = run / "checkpoints" / f"step-{version:08d}" / name
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    config = adapter_config(ragged_model, tmp_path, **EACH)
    prepared = prepare(config, [weigh_ids], resume=True)
    assert prepared.start.first_step == 2
    for name in damaged.values():
        assert any(f"{name}: size or sha256 differs" in notice for notice in prepared.notices), name
    assert troupe.train(config, [weigh_ids], resume=True).complete
    assert same_bits(policy_of(run), final)
