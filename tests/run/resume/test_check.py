"""Whether a run may go on as it is asked to, and whether what was changed while it ran is changed again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from tests.support.fakes import same_bits, tiny_config, weigh_ids, write_prompts, write_ragged_model
from tests.support.runs import write_jsonl
from tests.support.straight import run_straight
from tests.support.tiny import CONFIG, write_tiny_model
from troupe import RunConfig, Supervisor, load_config
from troupe.checkpoint import (
    MANIFEST,
    RewardState,
    RunState,
    list_checkpoints,
    load_checkpoint,
    read_made,
    save_checkpoint,
)
from troupe.checkpoint.files import sum_file
from troupe.errors import CheckpointError, ConfigError, RewardError, RunError
from troupe.messages import Unfinished, Update
from troupe.policy import Weights
from troupe.records.layout import CHANGES, RUN_TOML
from troupe.records.standing import Change
from troupe.rewards import RewardManager, load_reward
from troupe.run.config import config_table, write_config
from troupe.run.folder import is_as_written
from troupe.run.placement import Machine
from troupe.run.prepare import Prepared, prepare
from troupe.run.resume.changes import ChangesLog
from troupe.run.resume.check import OPEN, Resumption, stored_config
from troupe.run.supervisor import train
from troupe.runtime.machine import arithmetic

pytestmark = pytest.mark.anyio

STEPS = 7


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


def changed(config: RunConfig, **settings: Any) -> RunConfig:
    """The config with other values, as `section__key`; without one where it is None."""
    table = config_table(config)
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        where = table.setdefault(section, {}) if section else table
        where[key] = value
        if value is None:
            del where[key]
    return load_config(None, [table])


# What is asked for against what the run was made with


@pytest.fixture
def stored(tmp_path: Path, ragged_model: Path) -> RunConfig:
    """The config in the folder `run`, in which no step was made."""
    config = prepare(tiny_config(ragged_model, tmp_path, generation__max_completion_length=500), [weigh_ids]).config
    assert config.generation.max_completion_length < 500
    (tmp_path / "run").mkdir()
    write_config(config, tmp_path / "run" / RUN_TOML)
    return config


def resume(config: RunConfig, *allowed: str) -> Resumption:
    """What `prepare` makes of it."""
    folder = Path(config.output or "")
    resumption = Resumption.of(folder, config, allowed)
    assert resumption is not None
    return resumption.compared(prepare(resumption.asked, [weigh_ids]).config if folder is None else resumption.asked)


def test_the_config_that_was_stored_is_no_difference(stored: RunConfig) -> None:
    assert resume(stored).differences == ()


def test_the_config_that_was_asked_for_is_no_difference(tmp_path: Path, ragged_model: Path, stored: RunConfig) -> None:
    """Although much of it was left open, and one value was more than the model allows."""
    asked = tiny_config(ragged_model, tmp_path, generation__max_completion_length=500)
    assert asked != stored
    prepared = prepare(asked, [weigh_ids], resume=True)
    assert prepared.config == stored
    assert not [notice for notice in prepared.notices if "as allowed" in notice]


def test_open_values_are_those_that_preparing_fills_in(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("troupe.run.memory.device_limit_gb", lambda: 0.05)
    model = tmp_path / "dated"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    asked = changed(
        tiny_config(model, tmp_path), schedule__generator=None, learner__lr=None, warm_start__path=str(rows)
    )
    resolved = prepare(asked).config
    for key, is_open in OPEN.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(asked, section), name) == is_open, key
        assert getattr(getattr(resolved, section), name) != is_open, key
    table, now = config_table(asked), config_table(resolved)
    filled = {
        f"{s}.{k}" for s in now if isinstance(now[s], dict) for k in now[s] if table.get(s, {}).get(k) != now[s][k]
    }
    assert filled == OPEN.keys()


def test_a_run_of_a_troupe_without_streams_goes_on_without(
    tmp_path: Path, ragged_model: Path, stored: RunConfig
) -> None:
    """On streams, matrix products are those of one thread of OpenBLAS, which rounds otherwise than two."""
    asked = tiny_config(ragged_model, tmp_path, generation__max_completion_length=500, schedule__blas_threads=2)
    old = changed(stored, learner__gradient_accumulation_steps=2, schedule__learner_streams=None)
    write_config(changed(old, schedule__blas_threads=2), tmp_path / "run" / RUN_TOML)
    machine = Machine(on_cpu=True, cores=2, worthwhile=1)
    assert prepare(asked, [weigh_ids], resume=True, machine=machine).config.schedule.learner_streams == 1


@pytest.mark.parametrize(
    ("was", "asked", "placed"),
    [
        pytest.param(("process", 3), {"generator": "thread"}, ("thread", 1, 3), id="processes, then a thread"),
        pytest.param(("process", 3), {"generator_processes": 2}, ("process", 2, 3), id="fewer processes"),
        pytest.param(("process", 2), {}, ("process", 2, 2), id="the same"),
        pytest.param(("thread", 1), {"generator": "process"}, ("process", 1, 1), id="a thread, then a process"),
        pytest.param(("thread", 1), {"generator_processes": 2}, ("process", 2, 1), id="a thread, then two processes"),
    ],
)
def test_who_decodes_may_change_where_parts_and_threads_stay(
    tmp_path: Path,
    ragged_model: Path,
    stored: RunConfig,
    was: tuple[str, int],
    asked: dict[str, Any],
    placed: tuple[str, int, int],
) -> None:
    """In a run of a Troupe that knew no parts, on a machine with other cores."""
    settings: dict[str, Any] = {"generation__max_completion_length": 500, "learner__batch_size": 3}
    made = {"schedule__generator": was[0], "schedule__generator_processes": was[1], "schedule__blas_threads": 2}
    write_config(changed(stored, learner__batch_size=3, schedule__parts=None, **made), tmp_path / "run" / RUN_TOML)
    assert "\nparts" not in (tmp_path / "run" / RUN_TOML).read_text()
    given = {"generator": "auto"} | asked
    config = tiny_config(ragged_model, tmp_path, **settings, **{f"schedule__{key}": v for key, v in given.items()})
    machine = Machine(on_cpu=True, cores=7, worthwhile=1)
    schedule = prepare(config, [weigh_ids], resume=True, machine=machine).config.schedule
    assert (schedule.generator, schedule.generator_processes, schedule.parts) == placed
    assert schedule.blas_threads == 2
    other = changed(config, schedule__parts=placed[2] % 3 + 1)
    with pytest.raises(CheckpointError, match=r"schedule\.parts"):
        prepare(other, [weigh_ids], resume=True, machine=machine)


def test_what_is_left_open_stays_as_it_was_chosen(tmp_path: Path, ragged_model: Path, stored: RunConfig) -> None:
    config = changed(
        stored,
        learner__gradient_accumulation_steps=3,
        learner__gradient_checkpointing=True,
        generation__memory_limit_gb=0.5,
        schedule__blas_threads=1,
        checkpoint__overlap=False,
    )
    write_config(config, tmp_path / "run" / RUN_TOML)
    asked = tiny_config(ragged_model, tmp_path, generation__max_completion_length=500)
    assert prepare(asked, [weigh_ids], resume=True).config == config


def test_every_difference_is_named_with_what_allows_it(tmp_path: Path, stored: RunConfig) -> None:
    asked = changed(stored, learner__lr=0.5, learner__max_steps=9, generation__top_p=0.5, metrics__sinks=[], seed=4)
    with pytest.raises(CheckpointError) as refused:
        resume(asked, "generation.top_p")
    assert str(refused.value) == (
        f"{tmp_path / 'run'}: the run in this folder was made with other settings than are asked for now:\n"
        "  seed: 0 → 4 (never: all that is drawn follows from it)\n"
        "  learner.lr: 0.01 → 0.5\n"
        "  learner.max_steps: 4 → 9\n"
        "leave them out to go on as before, allow what is meant by --allow-change learner.lr --allow-change "
        "learner.max_steps, or start a new run in another folder"
    )


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"metrics__sinks": ["jsonl"], "checkpoint__every": 3, "schedule__watchdog_s": 0.0}, []),
        ({"rewards__concurrency": 1, "learner__max_nonfinite_steps": 1, "schedule__generator": "process"}, []),
        ({"learner__lr": 0.5, "generation__temperature": 0.5}, ["learner.lr", "generation.temperature", "seed2"]),
        ({"curriculum__easy_weight": 0.5}, ["curriculum.easy_weight"]),
        ({"curriculum__enabled": True}, ["curriculum.enabled"]),
    ],
)
def test_what_is_free_or_allowed(stored: RunConfig, settings: dict[str, Any], allowed: list[str]) -> None:
    known = [key for key in allowed if "." in key]
    found = resume(changed(stored, **settings), *known)
    assert found.changed == {name.replace("__", ".") for name in settings}
    assert found.samples_anew == bool({"generation__temperature", "curriculum__enabled"} & settings.keys())
    if known != allowed:
        with pytest.raises(ConfigError, match=r"--allow-change seed2: there is no such key; did you mean seed\?"):
            resume(changed(stored, **settings), *allowed)


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 5},
        {"schedule__mode": "free"},
        {"learner__batch_size": 3},
        {"model__dtype": "bfloat16"},
        {"data__shuffle": False},
    ],
)
def test_what_never_changes_cannot_be_allowed(stored: RunConfig, settings: dict[str, Any]) -> None:
    [key] = [name.replace("__", ".") for name in settings]
    with pytest.raises(CheckpointError, match=rf"  {key}: .* → .* \(never: .*\)\n.* start a new run in another folder"):
        resume(changed(stored, **settings))
    with pytest.raises(ConfigError, match=f"--allow-change {key}: this can never change"):
        resume(changed(stored, **settings), key)


def test_another_memory_limit_is_free_as_long_as_nothing_else_follows(tmp_path: Path, stored: RunConfig) -> None:
    """Decoding has no limit of its own yet; with one for everything it gets one."""
    asked = changed(stored, memory_limit_gb=1.0)
    message = (
        r"  generation.memory_limit_gb: \(none\) → \d.*\(follows from memory_limit_gb\)\n"
        r".*--allow-change memory_limit_gb$"
    )
    with pytest.raises(CheckpointError, match=message):
        prepare(asked, [weigh_ids], resume=True)
    chosen = prepare(asked, [weigh_ids], resume=True, allow_changes=["memory_limit_gb"]).config
    assert chosen.generation.memory_limit_gb
    write_config(chosen, tmp_path / "run" / RUN_TOML)
    prepare(changed(chosen, memory_limit_gb=2.0), [weigh_ids], resume=True)


# What a folder says


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model.path or data.path is missing, so a part of the file is gone; .* so restore it$"),
        ("[learner]\nlr = ", "this is not valid TOML.*restore it, or resume with the newer Troupe"),
        ("\xff", "cannot be read.*restore it"),
        ("[learner]\nquantum = 3\n", "unknown key learner.quantum.*or resume with the newer Troupe that may have"),
        ("[learner]\nlr = 'x'\n", "learner.lr is 'x'.*restore it"),
    ],
)
def test_a_damaged_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / RUN_TOML).write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=rf"{RUN_TOML}: .*{message}"):
        stored_config(tmp_path)


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert stored_config(tmp_path) is None
    assert Resumption.of(tmp_path, RunConfig(), []) is None
    with pytest.raises(ConfigError, match="there is no such key"):
        Resumption.of(tmp_path, RunConfig(), ["nonsense"])


# Runs


def config_for(model: Path, folder: Path, **settings: Any) -> RunConfig:
    """A run of `STEPS` steps with a checkpoint after each."""
    given = {"learner__max_steps": STEPS, "checkpoint__every": 1, "checkpoint__keep": 99, "schedule__max_staleness": 1}
    return tiny_config(model, folder, **given | settings)


async def drive(
    config: RunConfig,
    rewards: Any = (),
    *,
    resume: bool = False,
    allow: tuple[str, ...] = (),
    before: Callable[[Supervisor], None] = lambda run: None,
    ask: Callable[[Supervisor, Update], None] | None = None,
) -> Supervisor:
    run = Supervisor(config, rewards, resume=resume, allow_changes=allow)
    before(run)
    async with run:
        async for update in run.updates():
            if ask is not None:
                ask(run, update)
    return run


def stop_at(step: int) -> Callable[[Supervisor, Update], None]:
    def ask(run: Supervisor, update: Update) -> None:
        if update.step == step:
            run.stop()

    return ask


def final_of(folder: Path) -> Weights:
    newest = load_checkpoint(list_checkpoints(folder)[0])
    assert newest.state.version == STEPS
    return newest.weights


def metrics_of(folder: Path, name: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines}


def of_an_older_troupe(folder: Path, to: Path) -> Path:
    """A copy of a run whose checkpoints are of format 2: they do not say how they were made."""
    shutil.copytree(folder, to)
    for checkpoint in list_checkpoints(to):
        (checkpoint / "made.json").unlink()
        state = json.loads((checkpoint / "state.json").read_text())
        del state["stop_ids"]
        (checkpoint / "state.json").write_text(json.dumps(state | {"format": 2}))
        listed = json.loads((checkpoint / MANIFEST).read_text())
        del listed["made.json"]
        listed["state.json"] = msgspec.to_builtins(sum_file(checkpoint / "state.json"))
        (checkpoint / MANIFEST).write_text(json.dumps(listed))
    return to


def cut(whole: Path, folder: Path, after: int) -> Path:
    """A copy of a run as it would be if it had been killed with `after` as its newest checkpoint."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "final", ignore_errors=True)
    for path in list_checkpoints(folder):
        if path.name > f"step-{after:08d}":
            shutil.rmtree(path)
    return folder


async def test_a_moved_model_is_the_same_and_another_one_is_not(tmp_path: Path, ragged_model: Path) -> None:
    model = shutil.copytree(ragged_model, tmp_path / "model")
    config = config_for(model, tmp_path)
    await drive(config, [weigh_ids], ask=stop_at(2))
    moved = shutil.move(model, tmp_path / "moved")
    data = shutil.copy(tmp_path / "prompts.json", tmp_path / "copy.json")
    elsewhere = changed(config, model__path=str(moved), data__path=str(data))
    prepared = prepare(elsewhere, [weigh_ids], resume=True)
    assert prepared.start.first_step >= 2
    assert prepared.start.checkpoint is not None
    assert prepared.start.checkpoint.state.model == prepared.start.identity.model
    (Path(moved) / "generation_config.json").write_text('{"eos_token_id": 7}')
    with pytest.raises(CheckpointError, match=rf"the run began with another model than the one now in {moved}"):
        prepare(elsewhere, [weigh_ids], resume=True)
    other = write_tiny_model(tmp_path / "other", msgspec.structs.replace(CONFIG, intermediate_size=96))
    with pytest.raises(CheckpointError, match="another model"):
        prepare(changed(config, model__path=str(other)), [weigh_ids], resume=True)
    (Path(moved) / "generation_config.json").unlink()
    write_prompts(Path(data), rows=6)
    with pytest.raises(CheckpointError, match="made with other prompts"):
        prepare(elsewhere, [weigh_ids], resume=True)


async def test_where_nothing_was_learned_yet_nobody_can_tell_whether_it_is_the_same_model(
    tmp_path: Path, ragged_model: Path, stored: RunConfig
) -> None:
    prepare(stored, [weigh_ids], resume=True)
    copy = shutil.copytree(ragged_model, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"model.path: .* \(never: a run goes on with the model that it began"):
        prepare(changed(stored, model__path=str(copy)), [weigh_ids], resume=True)


async def test_a_state_without_a_model_s_fingerprint_is_compared_by_shapes(tmp_path: Path, ragged_model: Path) -> None:
    """As older checkpoints have it."""
    config = config_for(ragged_model, tmp_path)
    await drive(config, [weigh_ids], ask=stop_at(1))
    wider = write_tiny_model(tmp_path / "wider", msgspec.structs.replace(CONFIG, intermediate_size=96))
    for path in list_checkpoints(tmp_path / "run"):
        found = load_checkpoint(path)
        shutil.rmtree(path)
        state = msgspec.structs.replace(found.state, model="", rewards={})
        save_checkpoint(path, msgspec.structs.replace(found, state=state))
    prepare(config, [weigh_ids], resume=True)
    with pytest.raises(CheckpointError, match="trains a model of other shapes"):
        prepare(changed(config, model__path=str(wider)), [weigh_ids], resume=True)


async def test_a_free_run_of_the_first_format_says_why_it_cannot_go_on(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path, schedule__mode="free")
    await drive(config, [weigh_ids], ask=stop_at(1))
    for path in list_checkpoints(tmp_path / "run"):
        found = load_checkpoint(path)
        shutil.rmtree(path)
        state = msgspec.structs.replace(found.state, format=1, mode="pinned")  # it did not say which
        save_checkpoint(path, msgspec.structs.replace(found, state=state, unfinished=Unfinished()))
    with pytest.raises(CheckpointError, match=r"kept nothing of groups under way.*as model\.path"):
        prepare(config, [weigh_ids], resume=True)


async def test_a_checkpoint_that_is_not_of_this_run(tmp_path: Path, ragged_model: Path) -> None:
    """Whatever its `run.toml` says; and one that is damaged gives way to the one before."""
    config = config_for(ragged_model, tmp_path)
    await drive(config, [weigh_ids], ask=stop_at(3))
    folder = tmp_path / "run"
    for key, wrong, difference, message in (
        ("seed", 7, r"seed: 0 → 7 \(never", "the run has seed 0, not 7"),
        ("schedule__mode", "free", "mode: 'pinned' → 'free'", "the run's schedule is 'pinned', not 'free'"),
    ):
        other = changed(config, **{key: wrong})
        write_config(prepare(changed(other, output=None), [weigh_ids]).config, folder / RUN_TOML)
        with pytest.raises(CheckpointError, match=difference):
            prepare(other, [weigh_ids], resume=True)
        old = of_an_older_troupe(folder, tmp_path / f"old {key}")
        with pytest.raises(CheckpointError, match=message):
            prepare(changed(other, output=str(old)), [weigh_ids], resume=True)
    write_config(prepare(changed(config, output=None), [weigh_ids]).config, folder / RUN_TOML)
    newest, before, *_ = list_checkpoints(folder)
    (newest / "state.json").write_text("{}")
    prepared = prepare(config, [weigh_ids], resume=True)
    assert f"step-{prepared.start.first_step:08d}" == before.name
    assert any("trying the one before" in notice for notice in prepared.notices)


async def test_more_and_fewer_steps(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path)
    await drive(config, [weigh_ids], ask=stop_at(3))
    done = load_checkpoint(list_checkpoints(tmp_path / "run")[0]).state.version
    allowed = ["learner.max_steps", "learner.epochs"]
    with pytest.raises(ConfigError, match=rf"{done} steps are done and 1 are asked for"):
        prepare(changed(config, learner__max_steps=1), [weigh_ids], resume=True, allow_changes=allowed)
    more = prepare(changed(config, learner__max_steps=20), [weigh_ids], resume=True, allow_changes=allowed)
    assert f"learner.max_steps: {STEPS} → 20, as allowed" in more.notices
    told = f"the run now has 20 steps, {STEPS} before; the linear learning rate counts the new number from here"
    assert told in more.notices
    by_epochs = changed(config, learner__max_steps=None, learner__epochs=6)
    more = prepare(by_epochs, [weigh_ids], resume=True, allow_changes=allowed)
    assert more.inputs.total_steps == 15  # ⌈5 rows · 6 / 2⌉
    assert any(notice.startswith("the run now has 15 steps") for notice in more.notices)


async def test_other_rewards_from_python_have_to_be_allowed(tmp_path: Path, ragged_model: Path) -> None:
    def other(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    config = config_for(ragged_model, tmp_path)
    await drive(config, [weigh_ids], ask=stop_at(2))
    message = "made with the rewards weigh_ids, and is resumed with other; .*--allow-change rewards.functions"
    with pytest.raises(CheckpointError, match=message):
        prepare(config, [other], resume=True)
    assert prepare(config, [other], resume=True, allow_changes=["rewards.functions"]).inputs.rewards.names == ("other",)


async def test_what_was_sampled_otherwise_is_sampled_once_more(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path, learner__max_steps=5)
    await drive(config, [weigh_ids], ask=stop_at(3))
    hotter = changed(config, generation__temperature=1.5)
    prepared = prepare(hotter, [weigh_ids], resume=True, allow_changes=["generation.temperature"])
    assert "groups that were sampled and not trained on yet are sampled once more" in prepared.notices
    assert (prepared.start.restored.recorded, prepared.start.restored.collected.collected) == ({}, ())
    run = await drive(hotter, [weigh_ids], resume=True, allow=("generation.temperature",))
    assert run.result.complete
    assert load_config(tmp_path / "run" / RUN_TOML).generation.temperature == 1.5


async def test_a_start_that_was_killed_before_its_first_checkpoint_is_made_again(
    tmp_path: Path, ragged_model: Path
) -> None:
    """Under the stored config, with the changes made at their steps, and with no line of the start before."""
    settings = {"checkpoint__every": 99, "learner__lr_scheduler": "constant", "learner__max_steps": 3}
    config = config_for(ragged_model, tmp_path, **settings)
    await drive(config, [weigh_ids])
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "final")
    ChangesLog(folder).add(Change(step=2, key="learner.lr", value=0.125))
    run = await drive(config, [weigh_ids], resume=True)
    assert any("no whole checkpoint yet, so the run starts from the beginning" in notice for notice in run.notices)
    assert metrics_of(folder, "learning_rate") == {1: 0.01, 2: 0.01, 3: 0.125}
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


# What is changed while a run is live


@pytest.mark.parametrize("cuts", [1, pytest.param(4, marks=pytest.mark.slow)])
async def test_another_learning_rate_is_there_from_its_step_on_and_again_after_a_resume(
    tmp_path: Path, ragged_model: Path, cuts: int
) -> None:
    config = config_for(ragged_model, tmp_path)

    def ask(run: Supervisor, update: Update) -> None:
        if update.step in (2, 4):
            run.set("learner.lr", 0.05 / update.step)

    whole = await drive(config, [weigh_ids], ask=ask)
    assert whole.result.incidents == {}
    made = ChangesLog(whole.folder).read()
    assert [(change.key, change.value) for change in made] == [("learner.lr", 0.025), ("learner.lr", 0.0125)]
    first, second = [change.step for change in made]
    assert 2 <= first <= second <= STEPS
    peaks = [0.01] * first + [0.025] * (second - first) + [0.0125] * (STEPS - second)
    expected = {k + 1: peak * (1 - k / STEPS) for k, peak in enumerate(peaks)}
    assert metrics_of(whole.folder, "learning_rate") == pytest.approx(expected)
    for after in sorted({1, first, second, STEPS - 1} - {STEPS})[:cuts]:
        folder = cut(whole.folder, tmp_path / f"cut {after}", after)
        rest = await drive(changed(config, output=str(folder)), [weigh_ids], resume=True)
        assert rest.result.complete
        assert metrics_of(folder, "learning_rate") == metrics_of(whole.folder, "learning_rate")
        assert same_bits(final_of(folder), final_of(whole.folder))


async def test_what_a_resume_asks_for_takes_the_place_of_what_was_set(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path, learner__lr_scheduler="constant", checkpoint__every=50)

    def before(run: Supervisor) -> None:
        run.set("learner.lr", 0.5)
        run.set("checkpoint.every", 2)
        run.set("schedule.watchdog_s", 7)

    first = await drive(config, [weigh_ids], before=before)
    assert {"step-00000004", "step-00000006"} <= {path.name for path in list_checkpoints(first.folder)}
    again = prepare(config, [weigh_ids], resume=True)
    assert (again.live.checkpoint_every, again.live.watchdog_s, again.start.new_changes) == (2, 7.0, ())
    asked = changed(config, learner__lr=0.25, learner__max_steps=STEPS + 1, checkpoint__every=3)
    rest = await drive(asked, [weigh_ids], resume=True, allow=("learner.lr", "learner.max_steps"))
    rates = metrics_of(rest.folder, "learning_rate")
    assert (rates[1], rates[STEPS], rates[STEPS + 1]) == (0.5, 0.5, 0.25)
    assert ChangesLog(rest.folder).read()[-2:] == (
        Change(step=STEPS, key="learner.lr", value=0.25),
        Change(step=STEPS, key="checkpoint.every", value=3),
    )


async def test_a_change_that_cannot_be_kept_is_not_made(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(ragged_model, tmp_path, learner__lr_scheduler="constant")

    def no_disk(*_: object) -> None:
        raise OSError("No space left on device")

    def before(run: Supervisor) -> None:
        run.set("learner.lr", 0.5)
        run.set("checkpoint.every", 7)
        run.set("rewards.f", "r.py:g")

    monkeypatch.setattr(ChangesLog, "add", no_disk)
    (tmp_path / "r.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    run = await drive(changed(config, rewards__functions=[f"{tmp_path / 'r.py'}:f"]), before=before)
    assert run.result.incidents == {"change_failed": 2, "reward_exchange_failed": 1}
    assert set(metrics_of(run.folder, "learning_rate").values()) == {0.01}
    assert len(list_checkpoints(run.folder)) == STEPS


async def test_bad_settings_are_refused_at_once(tmp_path: Path, ragged_model: Path) -> None:
    run = Supervisor(config_for(ragged_model, tmp_path, learner__max_steps=2), [weigh_ids])
    with pytest.raises(ConfigError, match=r"set learner.lr: learner.lr is 2"):
        run.set("learner.lr", 2)
    run.set("learner.lr", 0.125)
    run.set("rewards.nobody", "length")  # who is there, is known when the run has been loaded
    async with run:
        with pytest.raises(
            ConfigError, match=r"set rewards.nobody: there is no such key to be set; what can: rewards.w"
        ):
            run.set("rewards.nobody", "length")
        with pytest.raises(ConfigError, match="only a daemon"):
            run.set("log.level", "debug")
    assert run.result.incidents == {"reward_exchange_failed": 1}
    assert [change.value for change in ChangesLog(run.folder).read()] == [0.125]
    assert metrics_of(run.folder, "learning_rate")[2] == pytest.approx(0.125 / 2), (
        "set before the first step was learned"
    )


REWARDS = """
def f(completions, completion_ids, **_):
    return [sum(ids) % 13 / 13 for ids in completion_ids]
f.quick = True

def g(completions, completion_ids, **_):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
g.quick = True

def broken():
    pass
"""


@pytest.fixture
def judges(tmp_path: Path) -> str:
    """The file of rewards `f` and `g`."""
    (tmp_path / "r.py").write_text(REWARDS)
    return str(tmp_path / "r.py")


@pytest.mark.parametrize(
    ("max_staleness", "cuts"),
    [(2, 1), pytest.param(0, 4, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)],
)
async def test_an_exchanged_reward_scores_the_same_steps_after_a_resume(
    tmp_path: Path, ragged_model: Path, judges: str, monkeypatch: pytest.MonkeyPatch, max_staleness: int, cuts: int
) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_for(
        ragged_model, tmp_path, rewards__functions=[f"{judges}:f"], schedule__max_staleness=max_staleness
    )

    def ask(run: Supervisor, update: Update) -> None:
        if update.step == 1:
            run.set("rewards.f", "r.py:g")

    whole = await drive(config, ask=ask)
    assert "reward_exchange_failed" not in whole.result.incidents
    [made] = ChangesLog(whole.folder).read()
    assert (made.key, made.value) == ("rewards.f", f"{judges}:g")
    assert 1 < made.step <= STEPS
    states = {path.name: load_checkpoint(path).state for path in list_checkpoints(whole.folder)}
    for state in states.values():
        expected = RewardState(version=1, spec=f"{judges}:g") if state.version >= made.step else None
        assert state.rewards == {"f": expected or RewardState(version=0, spec=f"{judges}:f")}
    for after in [k for k in dict.fromkeys((made.step - 1, made.step, made.step + 1, 1)) if k < STEPS][:cuts]:
        folder = cut(whole.folder, tmp_path / f"cut {after}", after)
        rest = await drive(changed(config, output=str(folder)), resume=True)
        assert rest.result.complete
        told = [notice for notice in rest.notices if notice.startswith("reward f: ")]
        assert bool(told) == (after >= made.step)
        assert metrics_of(folder, "reward") == metrics_of(whole.folder, "reward")
        assert same_bits(final_of(folder), final_of(whole.folder))


async def test_without_a_checkpoint_the_changes_say_who_scores(tmp_path: Path, ragged_model: Path, judges: str) -> None:
    config = config_for(ragged_model, tmp_path, rewards__functions=[f"{judges}:f"], learner__max_steps=3)
    folder = tmp_path / "run"
    folder.mkdir()
    judge = load_reward(f"{judges}:g")
    write_config(prepare(config).config, folder / RUN_TOML)
    ChangesLog(folder).add(Change(step=0, key="rewards.f", value=f"{judges}:g"))
    run = await drive(config, resume=True)
    assert f"reward f: {judges}:g, for which it was exchanged" in run.notices
    straight = run_straight(config, lambda ids: judge("", ids))  # type: ignore[operator]
    assert same_bits(load_checkpoint(list_checkpoints(run.folder)[0]).weights, straight.weights)


@pytest.mark.slow
async def test_other_functions_end_an_exchange(tmp_path: Path, ragged_model: Path, judges: str) -> None:
    config = config_for(ragged_model, tmp_path, rewards__functions=[f"{judges}:f"])

    def ask(run: Supervisor, update: Update) -> None:
        if update.step == 1:
            run.set("rewards.f", f"{judges}:g")
        if update.step == 5:
            run.stop()

    await drive(config, ask=ask)
    several = changed(config, rewards__functions=[f"{judges}:f", "length"])
    prepared = prepare(several, resume=True, allow_changes=["rewards.functions"])
    assert prepared.start.new_changes == (Change(step=prepared.start.first_step, key="rewards.f", value=f"{judges}:f"),)
    rest = await drive(several, resume=True, allow=("rewards.functions",))
    assert rest.result.complete
    assert prepare(several, resume=True).inputs.rewards.standing(STEPS)["f"][1] == f"{judges}:f"


async def test_a_reward_exchanged_for_one_from_python_is_named(tmp_path: Path, ragged_model: Path) -> None:
    def other(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) % 3 / 3 for ids in completion_ids]

    def ask(run: Supervisor, update: Update) -> None:
        if update.step == 1:
            run.exchange_reward("weigh_ids", other)
        if update.step == 4:
            run.stop()

    config = config_for(ragged_model, tmp_path)
    first = await drive(config, [weigh_ids], ask=ask)
    assert not (first.folder / CHANGES).exists()
    state = load_checkpoint(list_checkpoints(first.folder)[0]).state
    assert state.rewards == {"weigh_ids": RewardState(version=1, spec=None)}
    notices = prepare(config, [weigh_ids], resume=True).notices
    assert any(notice.startswith("reward weigh_ids was exchanged for one given in Python") for notice in notices)


@pytest.mark.parametrize("spec", ["f", "g"])
async def test_an_exchange_just_after_a_checkpoint_outlives_a_kill(
    tmp_path: Path, ragged_model: Path, judges: str, spec: str
) -> None:
    """It holds from the step on at which the run is cut, and the checkpoint was written before anybody asked for it."""
    config = config_for(ragged_model, tmp_path, rewards__functions=[f"{judges}:f"])

    def ask(run: Supervisor, update: Update) -> None:
        if update.step == 1:
            run.set("rewards.f", f"{judges}:g")

    whole = await drive(config, ask=ask)
    [made] = ChangesLog(whole.folder).read()
    folder = cut(whole.folder, tmp_path / "cut", after=made.step - (spec == "g"))
    if spec == "g":  # as it was when the change was made
        (folder / CHANGES).unlink()
        ChangesLog(folder).add(Change(step=made.step - 1, key="rewards.f", value=f"{judges}:g"))
    else:
        ChangesLog(folder).add(Change(step=made.step, key="rewards.f", value=f"{judges}:f"))
    prepared = prepare(changed(config, output=str(folder)), resume=True)
    assert prepared.start.first_step == made.step - (spec == "g")
    assert prepared.inputs.rewards.standing(prepared.start.first_step)["f"] == (2 - (spec == "g"), f"{judges}:{spec}")
    assert f"reward f: {judges}:{spec}, for which it was exchanged" in prepared.notices


async def test_a_text_that_is_no_reward_any_more_is_refused(tmp_path: Path, ragged_model: Path, judges: str) -> None:
    manager = RewardManager([f"{judges}:f"])
    manager.reinstate("f", f"{judges}:g", 3)
    assert manager.standing(0) == {"f": (3, f"{judges}:g")}
    assert manager.versions == {"f": 3}
    with pytest.raises(RewardError, match="has no 'h'"):
        manager.reinstate("f", f"{judges}:h", 4)


async def test_a_reward_that_does_not_start_is_an_incident_and_not_kept(
    tmp_path: Path, ragged_model: Path, judges: str
) -> None:
    config = config_for(ragged_model, tmp_path, rewards__functions=[f"{judges}:f"])

    run = await drive(config, before=lambda run: run.set("rewards.f", f"{judges}:broken"))
    assert run.result.incidents == {"reward_exchange_failed": 1}
    assert ChangesLog(run.folder).read() == ()


async def test_one_that_is_to_take_over_again_and_cannot_start_is_a_fault_that_may_pass(
    tmp_path: Path, ragged_model: Path, judges: str
) -> None:
    config = config_for(ragged_model, tmp_path, rewards__functions=[f"{judges}:f"])

    def stop(run: Supervisor, update: Update) -> None:
        run.drain()

    run = await drive(config, ask=stop)
    ChangesLog(run.folder).add(Change(step=run.result.steps + 1, key="rewards.f", value=f"{judges}:later"))
    with pytest.raises(RunError, match=r"has no 'later'.*; an earlier start named it too"):
        await drive(config, resume=True)
    (tmp_path / "r.py").write_text(f"{REWARDS}\nlater = g\n")
    assert (await drive(config, resume=True)).result.complete


@pytest.mark.parametrize(
    ("before", "name", "worked"),
    [
        ({"f": RewardState(spec="r.py:f")}, "r.py:f", True),
        ({"f": RewardState(spec="r.py:f")}, "r.py:other", False),
        ({"g": RewardState(spec="r.py:f")}, "r.py:f", False),
        ({"f": RewardState(version=2)}, "r.py:f", True),
        ({}, "r.py:f", True),
    ],
    ids=["the same", "another text", "another name", "exchanged for one in Python", "the first format"],
)
def test_which_rewards_an_earlier_start_could_use(before: dict[str, RewardState], name: str, worked: bool) -> None:
    state = RunState(version=1, seed=1, dataset="", rewards=before)
    standing = SimpleNamespace(standing=lambda step: {"f": (0, name)})
    start = SimpleNamespace(checkpoint=SimpleNamespace(state=state), first_step=1)
    prepared: Any = SimpleNamespace(start=start, inputs=SimpleNamespace(rewards=standing))
    assert Prepared.rewards_worked.__get__(prepared) is worked
    prepared.start.checkpoint, prepared.inputs.rewards = None, None
    for prepared.rewards_stood in (False, True):
        assert Prepared.rewards_worked.__get__(prepared) is prepared.rewards_stood


async def test_an_exchange_is_heeded_during_an_evaluation(tmp_path: Path, ragged_model: Path) -> None:
    calls: list[str] = []
    inside, exchanged = anyio.Event(), anyio.Event()

    async def first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append("first")
        inside.set()
        await exchanged.wait()
        return [0.0] * len(completion_ids)

    def second(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append("second")
        return weigh_ids(completion_ids)

    held_out = write_prompts(tmp_path / "held-out.json", rows=2)
    config = config_for(ragged_model, tmp_path, data__eval_path=str(held_out), learner__max_steps=1)
    async with Supervisor(config, [first]) as run:
        await inside.wait()
        run.exchange_reward("first", second)
        with anyio.fail_after(60):
            while not run._prepared.inputs.rewards.versions["first"]:
                await anyio.wait_all_tasks_blocked()
        exchanged.set()
    assert len(calls) == 2 + 2 + 2, "the rows of the evaluation before, the step, and after"
    assert calls[-2:] == ["second"] * 2


def test_the_blocking_form_takes_the_same(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path, learner__max_steps=1)
    assert train(config, [weigh_ids]).complete
    longer = changed(config, learner__max_steps=2)
    with pytest.raises(CheckpointError, match=r"--allow-change learner.max_steps"):
        train(longer, [weigh_ids], resume=True)
    assert train(longer, [weigh_ids], resume=True, allow_changes=["learner.max_steps"]).steps == 2


# A run.toml that somebody has edited


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / RUN_TOML).read_text()
    assert old in text
    (folder / RUN_TOML).write_text(text.replace(old, new))


def as_stored(folder: Path) -> RunConfig:
    """What `troupe train -o FOLDER --resume` asks for."""
    return load_config(folder / RUN_TOML, [{"output": str(folder)}])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run that ended after three of its steps."""
    tmp_path = tmp_path_factory.mktemp("begun")
    anyio.run(lambda: drive(config_for(ragged_model, tmp_path), [weigh_ids], ask=stop_at(3)))
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path: Path, begun: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def test_what_was_edited_is_asked_for_and_not_what_the_run_was_made_with(folder: Path) -> None:
    edit(folder, "batch_size = 2", "batch_size = 1")
    edit(folder, "lr = 0.01", "lr = 1.0")
    edit(folder, "every = 1", "every = 2")
    for allow in ((), ("learner.lr",)):
        with pytest.raises(CheckpointError) as refused:
            prepare(as_stored(folder), [weigh_ids], resume=True, allow_changes=allow)
        assert "learner.batch_size: 2 → 1 (never: which prompts a step has follows from it)" in str(refused.value)
        assert ("learner.lr: 0.01 → 1.0" in str(refused.value)) is (not allow)
    edit(folder, "batch_size = 1", "batch_size = 2")
    with pytest.raises(CheckpointError, match=r"--allow-change learner\.lr"):
        prepare(as_stored(folder), [weigh_ids], resume=True)
    prepared = prepare(as_stored(folder), [weigh_ids], resume=True, allow_changes=["learner.lr"])
    assert (prepared.config.learner.lr, prepared.config.checkpoint.every) == (1.0, 2)
    assert "learner.lr: 0.01 → 1.0, as allowed" in prepared.notices


def test_without_its_sum_it_is_compared_all_the_same(folder: Path) -> None:
    """As a tool writes it that keeps no comments."""
    config = as_stored(folder)
    write_config(config, folder / RUN_TOML)
    assert not is_as_written(folder / RUN_TOML)
    assert not [n for n in prepare(config, [weigh_ids], resume=True).notices if "as allowed" in n]
    write_config(changed(config, learner__beta=0.5), folder / RUN_TOML)
    with pytest.raises(CheckpointError, match=r"learner\.beta: 0\.0 → 0\.5"):
        prepare(as_stored(folder), [weigh_ids], resume=True)


def test_layout_and_comments_are_free(folder: Path) -> None:
    edit(folder, "lr = 0.01", "lr    =   1e-2  # as it was")
    assert is_as_written(folder / RUN_TOML)
    prepare(as_stored(folder), [weigh_ids], resume=True)


def test_a_run_of_an_older_troupe_is_taken_at_its_word(folder: Path, tmp_path: Path) -> None:
    old = of_an_older_troupe(folder, tmp_path / "old")
    edit(old, "lr = 0.01", "lr = 1.0")
    prepared = prepare(as_stored(old), [weigh_ids], resume=True)
    assert prepared.config.learner.lr == 1.0
    assert [notice for notice in prepared.notices if "begun by an older Troupe" in notice]
    assert not [n for n in prepare(as_stored(folder), [weigh_ids], resume=True).notices if "older Troupe" in n]


async def test_what_an_earlier_start_was_allowed_stays_allowed(folder: Path) -> None:
    """Although it was killed before it had a checkpoint of its own."""
    edit(folder, "lr = 0.01", "lr = 1.0")
    run = Supervisor(as_stored(folder), [weigh_ids], resume=True, allow_changes=["learner.lr"])
    async with run:
        run.stop()
    for checkpoint in list_checkpoints(folder):
        assert read_made(checkpoint).config["learner"]["lr"] in (0.01, 1.0)
        if checkpoint.name > "step-00000003":
            shutil.rmtree(checkpoint)
    assert read_made(list_checkpoints(folder)[0]).config["learner"]["lr"] == 0.01
    assert prepare(as_stored(folder), [weigh_ids], resume=True).config.learner.lr == 1.0


# Another machine


@pytest.fixture
def machine(folder: Path) -> dict[str, str]:
    """What is told of the machine, and what the run was made on."""
    now = dict(arithmetic())
    assert read_made(list_checkpoints(folder)[0]).machine == now
    return now


@pytest.mark.parametrize("name", ["compiler", "blas", "mlx", "device", "system"])
def test_what_decides_the_bits_is_compared_and_allowed_by_name(
    folder: Path, machine: dict[str, str], name: str
) -> None:
    old = machine.get(name, "none")
    if name not in machine:
        pytest.skip("means nothing on this device")
    machine[name] = "another"
    with pytest.raises(CheckpointError) as refused:
        prepare(as_stored(folder), [weigh_ids], resume=True, rounding=machine)
    assert str(refused.value) == (
        f"{folder}: the run in this folder was made where numbers are rounded otherwise than here:\n"
        f"  machine.{name}: '{old}' → 'another'\n"
        f"have machine.{name} as it was, for the same bits (PATH for g++, OPENBLAS_CORETYPE, the package mlx), allow "
        f"what is meant by --allow-change machine.{name}"
    )
    for allow in (f"machine.{name}", "machine"):
        prepared = prepare(as_stored(folder), [weigh_ids], resume=True, rounding=machine, allow_changes=[allow])
        assert f"machine.{name}: '{old}' → 'another', as allowed" in prepared.notices


def test_settings_and_machine_are_refused_together(folder: Path, machine: dict[str, str]) -> None:
    machine["mlx"] = "another"
    with pytest.raises(CheckpointError, match=r"(?s)learner\.lr: .*machine\.mlx: .*leave them out.*have machine\.mlx"):
        prepare(changed(as_stored(folder), learner__lr=0.5), [weigh_ids], resume=True, rounding=machine)


def test_what_nobody_knows_is_not_compared(folder: Path, tmp_path: Path, machine: dict[str, str]) -> None:
    old = of_an_older_troupe(folder, tmp_path / "old")
    newest = load_checkpoint(list_checkpoints(folder)[0]).state.version  # one more step may end before a stop is heard
    machine |= {"mlx": "another", "new of this Troupe": "yes"}
    assert prepare(as_stored(old), [weigh_ids], resume=True, rounding=machine).start.first_step == newest
    machine["mlx"] = read_made(list_checkpoints(folder)[0]).machine["mlx"]
    assert prepare(as_stored(folder), [weigh_ids], resume=True, rounding=machine).start.first_step == newest


async def test_bits_of_a_free_run_are_nobodys_promise(tmp_path: Path, ragged_model: Path) -> None:
    config = config_for(ragged_model, tmp_path, schedule__mode="free")
    await drive(config, [weigh_ids], ask=stop_at(2))
    assert prepare(config, [weigh_ids], resume=True, rounding={"mlx": "another"}).start.first_step > 0
