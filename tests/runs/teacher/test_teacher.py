"""Whole runs with a teacher: to the bits of a plain loop, on from any checkpoint, and what is refused before one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import troupe
from tests.support.adapters import LORA, cut_back, write_base
from tests.support.fakes import RAGGED, delayed, same_bits, tiny_config, weigh_ids
from tests.support.games import acting, write_player
from tests.support.runs import STORED, column, lines, policy_of, timeless
from tests.support.straight import run_straight
from tests.support.tiny import write_tiny_model
from troupe import RunConfig, load_config
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.cli.train import describe_plan
from troupe.errors import CheckpointError, ConfigError, ModelError
from troupe.run.prepare import prepare
from troupe.runtime import linux_cpu

pytestmark = pytest.mark.no_cover
ALONE: dict[str, Any] = {"teacher__reward_coef": 0.0}
SLOW = pytest.mark.slow
HALF = ALONE | {"teacher__coef": 0.5, "learner__num_iterations": 2}
STALE: dict[str, Any] = {"schedule__max_staleness": 1}


@pytest.fixture(autouse=True)
def as_many_threads_as_the_runs_have() -> Iterator[None]:
    """For the plain loop, whose products are rounded in the same way then."""
    with linux_cpu.blas_limited(1):
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the policies' family, and of another size."""
    larger = msgspec.structs.replace(RAGGED, hidden_size=48, num_hidden_layers=3, max_position_embeddings=256)
    return write_tiny_model(tmp_path_factory.mktemp("teacher") / "teacher", larger, seed=7)


def config_of(model: Path, folder: Path, teacher: Path, **settings: Any) -> RunConfig:
    return tiny_config(
        model, folder, **STORED | {"schedule__learner_streams": 1, "teacher__path": str(teacher)} | settings
    )


@pytest.mark.parametrize("settings", [STALE, pytest.param(HALF, marks=SLOW)])
def test_the_weights_are_those_of_the_plain_loop(
    tmp_path: Path, ragged_model: Path, teacher: Path, settings: dict[str, Any]
) -> None:
    config = config_of(ragged_model, tmp_path, teacher, **settings, learner__max_steps=3)
    [line] = [line for line in describe_plan(prepare(config, [weigh_ids])) if line.startswith("teacher: ")]
    assert line.startswith(f"teacher: {teacher}, ")
    assert line.endswith(f"its word counts {config.teacher.coef:g}, the rewards {config.teacher.reward_coef:g}")
    result = troupe.train(config, [delayed(1)])
    assert result.incidents == {}
    assert same_bits(policy_of(result.folder), run_straight(config, weigh_ids).weights)
    assert column(result.folder, "teacher/coef") == [config.teacher.coef] * 3
    assert all(value != 0.0 for value in column(result.folder, "teacher/kl"))


@SLOW
def test_a_run_goes_on_from_any_checkpoint_to_the_same_bits(tmp_path: Path, ragged_model: Path, teacher: Path) -> None:
    def run(folder: Path, *, resume: bool = False) -> Path:
        config = config_of(ragged_model, folder, teacher, **STALE, checkpoint__every=1)
        return Path(troupe.train(config, [delayed(2)], resume=resume).folder)

    whole, recorded = run(tmp_path), 0
    for version in range(1, 4):
        rest = run(cut_back(whole, version, tmp_path / str(version)), resume=True)
        assert same_bits(policy_of(rest), policy_of(whole))
        assert [timeless(line) for line in lines(rest)] == [timeless(line) for line in lines(whole)[version:]]
        found = load_checkpoint(whole / "checkpoints" / f"step-{version:08d}").unfinished
        kept = [*found.scored, *found.collected]
        recorded += len(kept)
        for group in kept:
            assert all(len(r.teacher_log_probs) == len(r.token_ids) for r in group.group.rollouts)
    assert recorded, "some of what the teacher said was under way"


@pytest.mark.parametrize(
    "settings",
    [{"schedule__mode": "free", **STALE}, pytest.param({"schedule__generator": "process"}, marks=SLOW)],
    ids=["free", "process"],
)
def test_no_reward_need_be_named_where_it_teaches_alone(
    tmp_path: Path, ragged_model: Path, teacher: Path, settings: dict[str, Any]
) -> None:
    config = config_of(ragged_model, tmp_path, teacher, **ALONE | settings, learner__max_steps=2)
    Path(str(config.data.path)).write_text(json.dumps([{"prompt": "abc"}, {"prompt": "de"}]), encoding="utf-8")
    result = troupe.train(config)
    assert result.incidents == {}
    assert column(result.folder, "rewards/no_reward/mean") == [0.0, 0.0]
    assert all(value != 0.0 for value in column(result.folder, "teacher/kl"))
    assert all(value > 0.0 for value in column(result.folder, "grad_norm"))


@SLOW
def test_it_judges_the_turns_of_episodes(tmp_path: Path, teacher: Path) -> None:
    player = write_player(tmp_path / "player")
    settings = acting(tmp_path, learner__max_steps=2, learner__dynamic_sampling=True)
    result = troupe.train(config_of(player, tmp_path, teacher, **settings), [weigh_ids])
    assert result.incidents == {}
    assert all(value != 0.0 for value in column(result.folder, "teacher/kl"))


@SLOW
def test_an_adapter_of_the_policys_own_base_teaches_without_a_second_base(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    first = troupe.train(tiny_config(base, tmp_path / "first", **STORED | LORA), [weigh_ids])
    for path, differs in ((Path(first.folder) / "final", True), (base, False)):
        config = config_of(base, tmp_path / f"by-{path.name}", path, **LORA | ALONE, learner__max_steps=1)
        result = troupe.train(config, [weigh_ids])
        [divergence] = column(result.folder, "teacher/kl")
        assert (abs(divergence) > 1e-3) == differs, "a new adapter is its base, which has nothing to teach it"


def several(tmp_path: Path, model: Path, teacher: Path, who: list[str | None], **settings: Any) -> RunConfig:
    """Rows that name the model itself, or another; `who`: of each row."""
    models = [{"name": "itself", "path": str(model)}, {"name": "other", "path": str(teacher)}]
    config = config_of(
        model,
        tmp_path,
        teacher,
        **{"teacher__path": None, "teacher__models": models, "teacher__column": "who"} | settings,
    )
    rows = [
        {"prompt": "abcd"[: 2 + i % 3], "answer": "1"} | ({"who": name} if name else {}) for i, name in enumerate(who)
    ]
    Path(str(config.data.path)).write_text(json.dumps(rows), encoding="utf-8")
    return config


@SLOW
def test_rows_name_their_teachers(tmp_path: Path, ragged_model: Path, teacher: Path) -> None:
    found = []
    for name in ("itself", "other"):
        config = several(tmp_path / name, ragged_model, teacher, [name, name], learner__max_steps=1)
        [divergence] = column(troupe.train(config, [weigh_ids]).folder, "teacher/kl")
        found.append(abs(divergence))
    assert found[0] < 1e-4 < 1e-1 < found[1], "a policy is its own teacher before it has learned"
    config = several(
        tmp_path, ragged_model, teacher, ["itself", None], teacher__path=str(teacher), learner__max_steps=1
    )
    assert troupe.train(config, [weigh_ids]).incidents == {}


def test_rows_that_name_nobody_who_is_there_are_refused(tmp_path: Path, ragged_model: Path, teacher: Path) -> None:
    for who, told in (
        (["itself", "nobody"], "row 1 names the teacher 'nobody' .*has 'itself', 'other'"),
        (["itself", None], "row 1 names no teacher, and there is no teacher.path"),
        ([None, None], "has no column 'who'"),
    ):
        with pytest.raises(ConfigError, match=told):
            troupe.train(several(tmp_path, ragged_model, teacher, list(who)), [weigh_ids])
    with pytest.raises(ConfigError, match="the name 'a' twice"):
        config_of(ragged_model, tmp_path, teacher, teacher__models=[{"name": "a", "path": "x"}] * 2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no path": ({"teacher__path": None, "teacher__coef": 0.5}, "teacher.path is missing"),
    "whole completions": ({"learner__loss_type": "gmpo"}, 'loss_type is "gmpo", which weighs whole'),
    "sequences": ({"learner__importance_sampling_level": "sequence"}, "weighs whole completions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_teacher_could_not_teach_is_refused(
    tmp_path: Path, ragged_model: Path, teacher: Path, case: str
) -> None:
    settings, told = REFUSED[case]
    with pytest.raises(ConfigError, match=told):
        troupe.train(config_of(ragged_model, tmp_path, teacher, **settings), [weigh_ids])
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_tokens_is_refused_with_the_first_that_differs(tmp_path: Path, ragged_model: Path) -> None:
    other = write_tiny_model(tmp_path / "other")
    table = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = table["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(ConfigError, match="id 97 stands for b'a' here, and stands for b'b' there"):
        troupe.train(config_of(ragged_model, tmp_path, other), [weigh_ids])


def test_a_run_without_a_final_policy_is_no_teacher_yet(tmp_path: Path, ragged_model: Path) -> None:
    begun = tmp_path / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "run.toml").write_text("", encoding="utf-8")
    with pytest.raises(ModelError, match=r"^teacher\.path: .*begun: the run in this folder has no final policy yet"):
        load_config(None, [{"teacher": {"path": str(begun)}}])
    models = [{"name": "maths", "path": str(begun)}]
    with pytest.raises(ModelError, match=r"^teacher\.models: .*has no final policy yet"):
        load_config(None, [{"teacher": {"models": models}}])


@SLOW
def test_two_adapters_of_one_base_that_is_not_the_policys_load_it_once(tmp_path: Path) -> None:
    base, student = write_base(tmp_path / "base"), write_base(tmp_path / "student")
    table = json.loads((student / "config.json").read_text(encoding="utf-8"))
    (student / "config.json").write_text(json.dumps(table | {"rope_theta": 5000.0}), encoding="utf-8")
    models = []
    for seed in (1, 2):
        config = tiny_config(base, tmp_path / str(seed), **STORED | LORA, seed=seed)
        models.append({"name": str(seed), "path": str(Path(troupe.train(config, [weigh_ids]).folder) / "final")})
    config = several(
        tmp_path, student, base, ["1", "2"], teacher__models=models, learner__max_steps=1, learner__batch_size=2
    )
    teachers = prepare(config, [weigh_ids]).inputs.teachers
    assert teachers is not None
    assert [work.shares_base for work in teachers.works] == [False, True]
    first, second = (each.policy for each in teachers.by_name.values())
    assert first.base.weights is second.base.weights
    assert not same_bits(first.weights, second.weights)
    assert troupe.train(config, [weigh_ids]).incidents == {}


@SLOW
def test_a_teacher_that_was_moved_is_the_same_teacher(tmp_path: Path, ragged_model: Path, teacher: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(teacher, here)
    settings = STALE | {"checkpoint__every": 1}
    whole = Path(troupe.train(config_of(ragged_model, tmp_path / "whole", here, **settings), [weigh_ids]).folder)
    here.rename(there)
    cut = cut_back(whole, 2, tmp_path / "cut")
    write_tiny_model(tmp_path / "another", RAGGED, seed=9)
    other = config_of(ragged_model, cut, tmp_path / "another", **settings)
    with pytest.raises(CheckpointError, match="has learned from another teacher"):
        troupe.train(other, [weigh_ids], resume=True)
    told = prepare(other, [weigh_ids], resume=True, allow_changes=["teacher.path"]).notices
    assert any("teacher.path" in notice and "as allowed" in notice for notice in told)
    rest = config_of(ragged_model, cut, there, **settings)
    told = prepare(rest, [weigh_ids], resume=True).notices
    assert not any("teacher.path" in notice or "sampled once more" in notice for notice in told)
    assert troupe.train(rest, [weigh_ids], resume=True).steps == 4
    assert same_bits(policy_of(cut / "run"), policy_of(whole))


@SLOW
def test_another_teacher_is_allowed_by_name_alone(tmp_path: Path, ragged_model: Path) -> None:
    mine = write_tiny_model(tmp_path / "mine", RAGGED, seed=3)
    config = config_of(ragged_model, tmp_path, mine, learner__max_steps=1)
    troupe.train(config, [weigh_ids])
    write_tiny_model(mine, RAGGED, seed=4)
    more = config_of(ragged_model, tmp_path, mine, learner__max_steps=2)
    with pytest.raises(CheckpointError, match="has learned from another teacher"):
        troupe.train(more, [weigh_ids], resume=True, allow_changes=["learner.max_steps"])
    allowed = ["learner.max_steps", "teacher.path"]
    told = prepare(more, [weigh_ids], resume=True, allow_changes=allowed).notices
    assert any("are sampled once more" in notice for notice in told), "what the other said of them is not kept"
    troupe.train(more, [weigh_ids], resume=True, allow_changes=allowed)
    assert len(list_checkpoints(tmp_path / "run")) == 2
