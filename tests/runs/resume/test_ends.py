"""Ends, checkpoints and resumes: of a run that is cut, copied, moved, damaged, or asked for more."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import anyio
import pytest
from safetensors import safe_open

import troupe
from tests.support.fakes import same_bits, tiny_config, weigh_ids, write_prompts
from tests.support.runs import (
    STORED,
    call,
    column,
    completions,
    done,
    in_store,
    lines,
    names_in,
    policy_of,
    refused,
    summary,
    train,
)
from troupe import Supervisor
from troupe.checkpoint import list_checkpoints
from troupe.policy import load_policy

RUN = ("-m", "m", "-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--reward", "length", "--lr", "0.01")
SHORT = ("--set", "generation.max_completion_length=8", "--set", "checkpoint.every=1", "--set", "checkpoint.keep=9")


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its contents."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("run.sqlite-")  # which SQLite leaves behind after reading
    }


def checkpoints_in(run: Path) -> list[str]:
    return [path.name for path in reversed(list_checkpoints(run))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run of four steps that nothing happened to, with a checkpoint of each."""
    return Path(train(ragged_model, tmp_path_factory.mktemp("whole"), checkpoint__every=1).folder)


async def cut(model: Path, folder: Path, ending: str, at: int = 2, /, **settings: Any) -> Path:
    """The same run, ended at a step."""
    config = tiny_config(model, folder, **STORED | {"checkpoint__every": 1} | settings)
    async with Supervisor(config, [] if "rewards__functions" in settings else [weigh_ids]) as run:
        run.pause()
        run.step(at)
        async for update in run.updates():
            if update.step == at:
                getattr(run, ending)()
    assert run.result.steps == at
    return run.folder


def resumed(run: Path, **settings: Any) -> Path:
    """Gone on with to the end."""
    config = troupe.load_config(run / "run.toml", [{"output": str(run)}, *settings.pop("changes", [])])
    assert troupe.train(config, [weigh_ids], resume=True, **settings).complete
    return run


@pytest.mark.anyio
@pytest.mark.parametrize("ending", ["drain", "stop"])
async def test_a_run_that_was_copied_while_it_stood_still_goes_on_there_and_the_original_stays(
    tmp_path: Path, ragged_model: Path, whole: Path, ending: str
) -> None:
    original = await cut(ragged_model, tmp_path, ending)
    before = tree(original)
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(original, copy)
    await anyio.to_thread.run_sync(resumed, copy)
    assert same_bits(policy_of(copy), policy_of(whole))
    assert completions(copy) == completions(whole)
    assert tree(original) == before


@pytest.mark.anyio
async def test_a_run_whose_folder_was_moved_goes_on(tmp_path: Path, ragged_model: Path, whole: Path) -> None:
    moved = (await cut(ragged_model, tmp_path, "stop")).rename(tmp_path / "moved")
    await anyio.to_thread.run_sync(resumed, moved)
    assert same_bits(policy_of(moved), policy_of(whole))
    assert troupe.load_config(moved / "run.toml").output == str(moved)
    assert [line["step"] for line in lines(moved)] == [1, 2, 3, 4]


@pytest.mark.anyio
async def test_prompts_and_model_may_have_moved_meanwhile(tmp_path: Path, ragged_model: Path, whole: Path) -> None:
    (tmp_path / "model").symlink_to(ragged_model)
    run = await cut(tmp_path / "model", tmp_path, "drain")
    (tmp_path / "data").mkdir()
    (tmp_path / "prompts.json").rename(tmp_path / "data" / "other name.json")
    (tmp_path / "model").rename(tmp_path / "data" / "m")
    paths = {"data": {"path": str(tmp_path / "data" / "other name.json")}, "model": {"path": str(tmp_path / "data/m")}}
    await anyio.to_thread.run_sync(lambda: resumed(run, changes=[paths]))
    assert same_bits(policy_of(run), policy_of(whole))


@pytest.mark.anyio
async def test_a_run_that_is_cut_after_every_step_is_the_run_that_was_not(
    tmp_path: Path, ragged_model: Path, whole: Path
) -> None:
    run = await cut(ragged_model, tmp_path, "stop", 1)
    for steps in (2, 3, 4):
        config = troupe.load_config(run / "run.toml")
        async with Supervisor(config, [weigh_ids], resume=True) as again:
            again.pause()
            again.step(1)
            async for update in again.updates():
                assert update.step == steps
                again.drain()
    assert again.result.complete
    assert same_bits(policy_of(run), policy_of(whole))
    assert completions(run) == completions(whole)
    for name in ("reward", "loss", "num_tokens", "epoch", "learning_rate", "completions/mean_length"):
        assert column(run, name) == column(whole, name), name
    assert in_store(run, "SELECT count(*) FROM starts") == [(4,)]


@pytest.mark.anyio
async def test_a_reward_that_is_wrong_only_since_the_resume_holds_the_run_and_does_not_end_it(
    tmp_path: Path, ragged_model: Path
) -> None:
    def weigh_ids(completions: list[str], **_: Any) -> list[float]:
        raise TypeError("mended badly")

    run = await cut(ragged_model, tmp_path, "stop", 2)
    changes = {"rewards": {"breaker_failures": 1, "retries": 0}}
    config = troupe.load_config(run / "run.toml", [changes])
    allowed = ["rewards.breaker_failures", "rewards.retries"]
    async with Supervisor(config, [weigh_ids], resume=True, allow_changes=allowed) as again:
        with anyio.fail_after(60):
            while not again.status().rewards_down:  # noqa: ASYNC110
                await anyio.sleep(0.01)
        again.stop()
    assert again.result.steps == 2


def test_where_every_checkpoint_is_damaged_the_run_says_so_and_begins_again(
    tmp_path: Path, ragged_model: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for folder in list_checkpoints(run):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    async def again() -> tuple[str, ...]:
        config = troupe.load_config(run / "run.toml", [{"output": str(run)}])
        async with Supervisor(config, [weigh_ids], resume=True) as supervisor:
            pass
        return supervisor.notices

    told = anyio.run(again)
    assert sum("model.safetensors: size or sha256 differs" in notice for notice in told) == 4
    assert "starts from the beginning" in told[-1]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]
    assert same_bits(policy_of(run), policy_of(whole))
    assert completions(run) == completions(whole)


def test_half_written_checkpoints_of_a_killed_run_are_passed_over_and_cleared_away(
    tmp_path: Path, ragged_model: Path, whole: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / "step-00000004"
    (newest / "MANIFEST.json").unlink()
    shutil.copytree(newest, run / "checkpoints" / ".writing-step-00000003")
    resumed(run)
    assert checkpoints_in(run) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert not any(name.startswith(".") for name in names_in(run / "checkpoints"))
    assert same_bits(policy_of(run), policy_of(whole))


def test_another_learning_rate_has_to_be_allowed_and_holds_from_there_on(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "2", "--set", "learner.lr_scheduler=constant")
    before = lines("out")
    more = ("train", "-o", "out", "--resume", "--max-steps", "4", "--allow-change", "learner.max_steps")
    message = refused(*more, "--lr", "0.5")
    assert "learner.lr: 0.01 → 0.5" in message
    assert "--allow-change learner.lr" in message
    assert lines("out") == before
    said = done(*more, "--lr", "0.5", "--allow-change", "learner.lr")
    assert "learner.lr: 0.01 → 0.5, as allowed" in said
    assert lines("out")[:2] == before
    assert column("out", "learning_rate") == pytest.approx([0.01, 0.01, 0.5, 0.5])


def test_more_epochs_are_a_longer_run_and_the_prompts_go_on_in_turn(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--epochs", "1")
    assert summary("out").total_steps == 3
    done("train", "-o", "out", "--resume", "--epochs", "2", "--allow-change", "learner.epochs")
    assert summary("out").total_steps == 5
    rows = [row for (row,) in in_store("out", "SELECT row FROM groups ORDER BY gid")]
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 1, 2, 3, 4]


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_lost(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "3")
    before = tree(desk / "out")
    message = refused("train", "-o", "out", "--resume", "--max-steps", "2", "--allow-change", "learner.max_steps")
    assert "3 steps are done and 2 are asked for" in message
    assert tree(desk / "out") == before


def test_how_often_and_where_it_is_written_may_change_without_asking(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "2", "--set", 'metrics.sinks=["jsonl"]')
    assert "run store" in refused("inspect", "out")
    more = ("--max-steps", "4", "--allow-change", "learner.max_steps", "--set", 'metrics.sinks=["jsonl","sqlite"]')
    done("train", "-o", "out", "--resume", *more, "--set", "checkpoint.keep=1", "--set", "checkpoint.keep_best=false")
    assert checkpoints_in(desk / "out") == ["step-00000004"]
    assert {c.step for c in completions("out")} == {3, 4}
    assert [line["step"] for line in lines("out")] == [1, 2, 3, 4]


def test_a_reward_file_that_is_gone_is_named_and_the_run_waits_for_it(desk: Path) -> None:
    (desk / "r.py").write_text("def f(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    done("train", *RUN[:-4], "--reward", "r.py:f", *SHORT, "-o", "out", "--max-steps", "2")
    (desk / "r.py").rename(desk / "gone.py")
    before = tree(desk / "out")
    more = ("train", "-o", "out", "--resume", "--max-steps", "3", "--allow-change", "learner.max_steps")
    assert f"{desk / 'r.py'}: no such file" in refused(*more)
    assert tree(desk / "out") == before
    (desk / "gone.py").rename(desk / "r.py")
    assert "3 of 3 steps" in done(*more)


def test_a_finished_run_that_is_resumed_says_so_and_changes_no_weight(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "2")
    final = tree(desk / "out" / "final")
    said = done("train", "-o", "out", "--resume")
    assert "going on after step 2" in said
    assert "2 of 2 steps" in said
    assert tree(desk / "out" / "final") == final
    assert [line["step"] for line in lines("out")] == [1, 2]


@pytest.mark.anyio
async def test_a_run_that_is_drained_at_once_leaves_the_policy_that_it_was_given(
    tmp_path: Path, ragged_model: Path, whole: Path
) -> None:
    config = tiny_config(ragged_model, tmp_path, **STORED)
    supervisor = Supervisor(config, [weigh_ids])
    supervisor.drain()
    async with supervisor as run:
        await run.wait()
    assert (run.result.steps, run.result.complete) == (0, False)
    assert same_bits(policy_of(run.folder), load_policy(ragged_model).weights)
    await anyio.to_thread.run_sync(resumed, run.folder)
    assert same_bits(policy_of(run.folder), policy_of(whole))


@pytest.mark.anyio
async def test_only_a_run_that_came_to_an_end_has_a_final_folder(tmp_path: Path, ragged_model: Path) -> None:
    stopped = await cut(ragged_model, tmp_path / "stopped", "stop")
    drained = await cut(ragged_model, tmp_path / "drained", "drain")
    assert "final" not in names_in(stopped)
    assert "final" in names_in(drained)
    assert checkpoints_in(stopped)[-1] == checkpoints_in(drained)[-1] == "step-00000002"


def test_what_to_type_to_go_on_can_be_pasted_whatever_the_folder_is_called(tmp_path: Path, ragged_model: Path) -> None:
    settings = {"rewards__functions": ["length"]}
    folder = anyio.run(lambda: cut(ragged_model, tmp_path / "my runs (old)", "stop", **settings))
    [command] = re.findall(r"go on with: troupe (.*)$", done("status", folder), re.MULTILINE)
    assert "4 of 4 steps" in done(*shlex.split(command))
    assert summary(folder).complete


@pytest.mark.anyio
async def test_questions_about_a_run_that_is_over_are_answered_from_its_folder(
    tmp_path: Path, ragged_model: Path
) -> None:
    stopped = await cut(ragged_model, tmp_path, "stop")
    said = done("status", stopped)
    assert "2 of 4" in said
    told = json.loads(done("status", stopped, "--json"))
    assert (told["step"], told["total_steps"], told["fate"]) == (2, 4, "ended")
    assert call("pause", stopped).exit_code == 2


def test_the_newest_checkpoints_and_the_best_stay(tmp_path: Path, ragged_model: Path) -> None:
    def second_is_best(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return [10.0 * (trainer_state.global_step == 1) + index for index in range(len(completions))]

    settings = {"checkpoint__every": 1, "checkpoint__keep": 2, "learner__max_steps": 6}
    run = Path(train(ragged_model, tmp_path, second_is_best, **settings).folder)
    assert checkpoints_in(run) == ["step-00000002", "step-00000005", "step-00000006"]
    standing = in_store(run, "SELECT version FROM checkpoints WHERE removed_at IS NULL ORDER BY version")
    assert standing == [(2,), (5,), (6,)]


def test_every_checkpoint_is_a_model_that_generates_and_trains_on(desk: Path, whole: Path) -> None:
    first = whole / "checkpoints" / "step-00000001"
    flags = ("-p", "ab", "--temperature", "0", "--max-new-tokens", "5")
    assert done("generate", "-m", first, *flags) == load_policy(first).generate_text("ab", 5, temperature=0.0) + "\n"
    done("train", "-m", first, *RUN[2:], *SHORT, "-o", "out", "--max-steps", "1")
    assert summary("out").complete
    assert not same_bits(policy_of("out"), load_policy(first).weights)


def test_final_weights_are_named_and_shaped_as_those_of_the_model(whole: Path, ragged_model: Path) -> None:
    shapes = []
    for folder in (ragged_model, whole / "final"):
        with safe_open(folder / "model.safetensors", framework="numpy") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}, "without which transformers refuses the file"
    assert shapes[0] == shapes[1]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (whole / "final" / name).read_bytes() == (ragged_model / name).read_bytes()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "F32"), ("bfloat16", "BF16"), pytest.param("float16", "F16", marks=pytest.mark.slow)],
)
def test_the_final_folder_has_the_type_that_was_trained_in_and_says_so(
    tmp_path: Path, ragged_model: Path, dtype: str, stored: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ragged_model, model)
    said = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(said | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    run = Path(train(model, tmp_path, model__dtype=dtype, learner__max_steps=2).folder)
    with safe_open(run / "final" / "model.safetensors", framework="numpy") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {stored}  # noqa: SIM118
    config = json.loads((run / "final" / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    assert all(abs(loss) < 100 for loss in column(run, "loss"))
    assert not same_bits(load_policy(run / "final", dtype).weights, load_policy(ragged_model, dtype).weights)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.anyio
async def test_a_run_in_half_the_bits_goes_on_as_if_it_had_not_been_cut(
    tmp_path: Path, ragged_model: Path, dtype: str
) -> None:
    settings = {"model__dtype": dtype}
    await anyio.to_thread.run_sync(lambda: train(ragged_model, tmp_path / "whole", checkpoint__every=1, **settings))
    run = await cut(ragged_model, tmp_path / "cut", "stop", **settings)
    await anyio.to_thread.run_sync(resumed, run)
    weights = [(folder / "final/model.safetensors").read_bytes() for folder in (run, tmp_path / "whole" / "run")]
    assert weights[0] == weights[1]


@pytest.mark.anyio
async def test_a_checkpoint_that_was_asked_for_is_there_while_the_run_goes_on(
    tmp_path: Path, ragged_model: Path
) -> None:
    async with Supervisor(tiny_config(ragged_model, tmp_path, **STORED), [weigh_ids]) as run:
        run.pause()
        run.step(2)
        async for update in run.updates():
            if update.step == 2:
                run.checkpoint()
                with anyio.fail_after(60):
                    while not list_checkpoints(run.folder):  # noqa: ASYNC110
                        await anyio.sleep(0.005)
                assert checkpoints_in(run.folder) == ["step-00000002"]
                run.resume()
    assert run.result.complete
    assert checkpoints_in(run.folder) == ["step-00000002", "step-00000004"]


def test_the_prompts_may_not_change_between_starts_even_by_a_letter(desk: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "1")
    write_prompts(desk / "p.json", rows=5)
    more = ("train", "-o", "out", "--resume", "--max-steps", "2", "--allow-change", "learner.max_steps")
    rows = json.loads((desk / "p.json").read_text())
    rows[3]["answer"] = "4"
    (desk / "p.json").write_text(json.dumps(rows))
    assert "other prompts" in refused(*more)
    rows[3]["answer"] = "3"
    (desk / "p.json").write_text(json.dumps(rows, indent=4))
    assert "2 of 2 steps" in done(*more), "how the file is laid out does not matter"
