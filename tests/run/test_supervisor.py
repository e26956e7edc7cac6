"""Supervisor: what a run leaves behind, how it is asked to end, how it goes on, how it fails."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.support.fakes import (
    BATCH_SIZE,
    delayed,
    often_equal,
    same_bits,
    tiny_config,
    weigh_ids,
    write_prompts,
    write_ragged_model,
)
from tests.support.tiny import CONFIG, write_tiny_model
from troupe import Supervisor
from troupe.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from troupe.daemon.trainer import process as trainer
from troupe.errors import CheckpointError, OutputError, RewardError, RunError
from troupe.policy import Weights, load_policy
from troupe.records.evaluations import read_evaluations
from troupe.records.standing import read_standing
from troupe.run.config import RunConfig, load_config
from troupe.run.folder import RunFolder
from troupe.run.ledgers import Factories
from troupe.run.result import RunResult

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Any:
    yield
    names = {thread.name for thread in threading.enumerate()} - {"troupe-aside"}  # the process's own, for ever
    assert not [name for name in names if name.startswith("troupe-")]


TRLS_NAMES = {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "entropy"}
TRLS_NAMES |= {"reward", "reward_std", "frac_reward_zero_std", "rewards/weigh_ids/mean", "rewards/weigh_ids/std"}
TRLS_NAMES |= {f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")}
TRLS_NAMES |= {f"completions/{what}_length" for what in ("mean", "min", "max")} | {"completions/clipped_ratio"}
TRLS_NAMES |= {f"completions/{what}_terminated_length" for what in ("mean", "min", "max")}
TRLS_NAMES |= {f"sampling/sampling_logp_difference/{what}" for what in ("mean", "max")}
TRLS_NAMES |= {f"sampling/importance_sampling_ratio/{what}" for what in ("mean", "min", "max")}
OUR_NAMES = {"staleness", "staleness/max", "tokens_per_second", "learn_tokens_per_second", "learn_time"}
OUR_NAMES |= {f"advantages/{what}" for what in ("mean", "std", "abs_mean", "frac_zero")}
OUR_NAMES |= {
    f"groups/{what}" for what in ("trained", "filtered", "quarantined", "resampled", "filtered_token_fraction")
}
OUR_NAMES |= {"peak_memory_gb", "queue/scored/depth"}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def newest(run: str | Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(Path(run))[0])


def newest_weights(run: str | Path) -> Weights:
    return newest(run).weights


def same_state(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether learning would go on from both in the same way."""
    arrays = same_bits(one.weights, other.weights) and same_bits(one.optimizer_state, other.optimizer_state)
    references = (one.reference or {}, other.reference or {})
    states = [
        msgspec.structs.replace(checkpoint.state, metrics={}) for checkpoint in (one, other)
    ]  # times are in these
    return arrays and same_bits(*references) and states[0] == states[1]


async def drive(config: RunConfig, reward: Any = weigh_ids, *, resume: bool = False, ask_at: int = 0) -> RunResult:
    """A run to its end; drained when step `ask_at` is told."""
    async with Supervisor(config, [reward], resume=resume) as run:
        async for update in run.updates():
            if update.step == ask_at:
                run.drain()
    return run.result


async def test_what_a_run_leaves_behind(tmp_path: Path, ragged_model: Path) -> None:
    held_out = write_prompts(tmp_path / "held-out.json", rows=3)
    settings = {"checkpoint__every": 2, "checkpoint__keep": 1, "checkpoint__keep_best": False}
    config = tiny_config(ragged_model, tmp_path, **settings, data__eval_path=str(held_out))
    result = await drive(config)
    run = tmp_path / "run"
    files = {"run.toml", "summary.json", "metrics.jsonl", "evaluations.jsonl", "trace.json", "checkpoints", "final"}
    assert names_in(run) == files
    assert names_in(run / "checkpoints") == {"step-00000004"}
    assert msgspec.json.decode((run / "summary.json").read_bytes(), type=RunResult) == result
    assert (result.steps, result.total_steps, result.version, result.complete) == (4, 4, 4, True)
    assert result.closed_groups == {"trained": 8}
    assert (result.incidents, result.switched_off_sinks) == ({}, {})
    assert (result.accuracy_before, result.accuracy_after) == (0.0, 0.0)
    assert result.rewards_before.keys() == result.rewards_after.keys() == {"weigh_ids"}
    assert result.rewards_before != result.rewards_after
    assert result.wall_s > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["version"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert all(line.keys() >= TRLS_NAMES | OUR_NAMES for line in lines)
    stored = troupe.load_config(run / "run.toml")
    assert (stored.schedule.generator, (stored.schedule.blas_threads or 0) >= 1) == ("thread", True)
    assert stored == msgspec.structs.replace(
        config,
        schedule=stored.schedule,
        learner=msgspec.structs.replace(config.learner, gradient_accumulation_steps=1, gradient_checkpointing=False),
        checkpoint=msgspec.structs.replace(config.checkpoint, overlap=True),
    ), "what was left open is chosen and kept"
    final = load_policy(run / "final")
    assert same_bits(final.weights, newest_weights(run))
    assert final.generate_text("ab", 4, seed=1) == final.generate_text("ab", 4, seed=1)


async def test_updates_come_as_steps_are_made_and_the_result_only_at_the_end(
    tmp_path: Path, ragged_model: Path
) -> None:
    async with Supervisor(tiny_config(ragged_model, tmp_path), [weigh_ids]) as run:
        with pytest.raises(RuntimeError, match="the run has no result yet"):
            _ = run.result
        steps = [update.step async for update in run.updates()]
        await run.wait()
        assert [update async for update in run.updates()] == [], "nothing more comes from a run that has ended"
        run.drain()
        run.checkpoint()
    assert steps == [1, 2, 3, 4]
    assert run.result.steps == 4


async def test_groups_come_as_they_end_and_incidents_as_they_happen(tmp_path: Path, ragged_model: Path) -> None:
    def fails_once(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
        if not failed:
            failed.append(True)
            raise ValueError("the judge is late")
        return [float(len(text)) for text in completions]

    failed: list[bool] = []
    async with Supervisor(tiny_config(ragged_model, tmp_path), [fails_once]) as run:
        incidents, groups = run.incidents(), run.closed_groups()
        first = await anext(incidents)
        assert "the judge is late" in first.message
        ended = [group async for group in groups]
        await run.wait()
    assert {group.version for group in ended} == {1, 2, 3, 4}
    assert all(group.scored is not None and group.rewards for group in ended)
    assert len({group.gid for group in ended}) == len(ended)


async def test_a_slow_reader_gets_the_newest_updates_and_never_stalls_the_run(
    tmp_path: Path, ragged_model: Path
) -> None:
    async with Supervisor(tiny_config(ragged_model, tmp_path), [weigh_ids]) as run:
        updates = run.updates(2)
        first = await anext(updates)
        await run.wait()
        rest = [update.step async for update in updates]
    assert (first.step, rest) == (1, [3, 4])


def test_a_supervisor_can_be_made_before_there_is_an_event_loop(tmp_path: Path, ragged_model: Path) -> None:
    made = Supervisor(tiny_config(ragged_model, tmp_path, learner__max_steps=1), [weigh_ids])

    async def run() -> RunResult:
        async with made as entered:
            await entered.wait()
        return made.result

    assert anyio.run(run).complete


@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_a_drained_run_goes_on_to_the_same_bits(tmp_path: Path, ragged_model: Path, max_staleness: int) -> None:
    settings = {"schedule__max_staleness": max_staleness, "learner__max_steps": 7}
    whole = await drive(tiny_config(ragged_model, tmp_path / "whole", **settings), delayed(1))
    config = tiny_config(ragged_model, tmp_path / "cut", **settings)
    part = await drive(config, delayed(2), ask_at=2)
    assert 2 <= part.steps < 7
    assert not part.complete
    assert part.closed_groups == {"trained": 2 * part.steps}
    assert same_bits(load_policy(Path(part.folder) / "final").weights, newest_weights(part.folder))
    stored = troupe.load_config(Path(part.folder) / "run.toml")
    rest = await drive(stored, delayed(3), resume=True)
    assert (rest.steps, rest.complete, rest.closed_groups) == (7, True, {"trained": 2 * (7 - part.steps)})
    assert same_bits(newest_weights(rest.folder), newest_weights(whole.folder))
    assert same_bits(load_policy(Path(rest.folder) / "final").weights, newest_weights(whole.folder))
    lines = (Path(rest.folder) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("max_staleness", [0, pytest.param(1, marks=pytest.mark.slow)])
async def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, ragged_model: Path, max_staleness: int) -> None:
    settings = {"schedule__max_staleness": max_staleness, "learner__max_steps": 6}
    whole = await drive(tiny_config(ragged_model, tmp_path / "whole", **settings))
    config = tiny_config(ragged_model, tmp_path / "cut", **settings)
    async with Supervisor(config, [delayed(4)]) as run:
        async for update in run.updates():
            if update.step == 2:
                run.stop()
    part = run.result
    assert 2 <= part.steps < 6
    assert [path.name for path in list_checkpoints(run.folder)] == [f"step-{part.steps:08d}"]
    assert "final" not in names_in(run.folder)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, part.steps + 1)), "every step told"
    rest = await drive(config, resume=True)
    assert rest.complete
    assert same_bits(newest_weights(rest.folder), newest_weights(whole.folder))


FULL = {
    "learner__dynamic_sampling": True,
    "learner__max_resampling_attempts": 2,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_sync_steps": 3,
    "learner__use_adaptive_entropy": True,
    "learner__max_steps": 7,
}
"""Everything of which a checkpoint must keep something."""


@pytest.mark.parametrize(
    ("ending", "max_staleness"),
    [
        ("stop", 1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("drain", 0), ("drain", 1), ("stop", 0))),
    ],
)
async def test_a_run_that_resamples_and_follows_goes_on_to_the_same_bits(
    tmp_path: Path, ragged_model: Path, max_staleness: int, ending: str
) -> None:
    settings = FULL | {"schedule__max_staleness": max_staleness}
    whole = await drive(tiny_config(ragged_model, tmp_path / "whole", **settings), delayed(1, reward=often_equal))
    assert whole.closed_groups["filtered"] >= 3
    config = tiny_config(ragged_model, tmp_path / "cut", **settings)
    async with Supervisor(config, [delayed(2, reward=often_equal)]) as run:
        async for update in run.updates():
            if update.step == 4:
                getattr(run, ending)()
    assert 4 <= run.result.steps < 7
    rest = await drive(config, delayed(3, reward=often_equal), resume=True)
    assert rest.complete
    assert same_state(newest(rest.folder), newest(whole.folder))
    assert newest(rest.folder).reference is not None
    lines, wanted = (
        [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (rest.folder, whole.folder)
    )
    for name in ("step", "num_tokens", "groups/filtered", "groups/resampled", "epoch", "kl", "entropy_coef", "reward"):
        assert [line[name] for line in lines] == [line[name] for line in wanted], name


@pytest.mark.parametrize("ending", ["drain", "stop"])
async def test_an_end_amid_a_round_of_replacements(tmp_path: Path, ragged_model: Path, ending: str) -> None:
    inside, go_on = anyio.Event(), anyio.Event()
    calls = 0

    async def equal_then_waiting(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > BATCH_SIZE:  # the first round is without signal
            inside.set()
            await go_on.wait()
        return [0.0] * len(completion_ids) if calls <= BATCH_SIZE else weigh_ids(completion_ids)

    config = tiny_config(ragged_model, tmp_path, learner__dynamic_sampling=True)
    async with Supervisor(config, [equal_then_waiting]) as run:
        await inside.wait()
        getattr(run, ending)()
        go_on.set()
    if ending == "stop":
        assert (run.result.steps, run.result.closed_groups) == (0, {})
    else:
        assert (run.result.steps, run.result.closed_groups) == (1, {"filtered": BATCH_SIZE, "trained": BATCH_SIZE})


@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_a_run_without_any_signal_ends_with_the_weights_that_it_had(
    tmp_path: Path, ragged_model: Path, max_staleness: int
) -> None:
    def constant(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    settings = {"learner__dynamic_sampling": True, "schedule__max_staleness": max_staleness}
    result = await drive(tiny_config(ragged_model, tmp_path, **settings), constant)
    assert result.complete
    assert result.closed_groups == {"filtered": 4 * BATCH_SIZE * (1 + 3)}
    assert same_bits(newest_weights(result.folder), load_policy(ragged_model).weights)
    lines = [json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    assert [(line["reward"], line["groups/filtered_token_fraction"]) for line in lines] == [(1.0, 1.0)] * 4


async def test_bfloat16_goes_on_in_bfloat16(tmp_path: Path, ragged_model: Path) -> None:
    settings = {"model__dtype": "bfloat16", "learner__max_steps": 4, "schedule__max_staleness": 1}
    whole = await drive(tiny_config(ragged_model, tmp_path / "whole", **settings))
    part = await drive(tiny_config(ragged_model, tmp_path / "cut", **settings), ask_at=1)
    assert part.steps < 4
    rest = await drive(troupe.load_config(Path(part.folder) / "run.toml"), resume=True)
    assert same_bits(newest_weights(rest.folder), newest_weights(whole.folder))


async def test_a_checkpoint_can_be_asked_for(tmp_path: Path, ragged_model: Path) -> None:
    async with Supervisor(tiny_config(ragged_model, tmp_path), [delayed(5)]) as run:
        async for update in run.updates():
            if update.step == 1:
                run.checkpoint()
    versions = [load_checkpoint(path).state.version for path in list_checkpoints(run.folder)]
    assert len(versions) == 2
    assert versions[0] == 4
    assert 1 <= versions[1] <= 3


def held_up() -> tuple[Any, anyio.Event, anyio.Event]:
    """A reward whose first call waits, with the events that it is there and may go on."""
    inside, go_on = anyio.Event(), anyio.Event()

    async def waits(completion_ids: list[list[int]], **_: Any) -> list[float]:
        inside.set()
        await go_on.wait()
        return weigh_ids(completion_ids)

    waits.__name__ = "weigh_ids"
    return waits, inside, go_on


async def test_a_drain_during_evaluation_ends_with_the_step_that_was_begun(tmp_path: Path, ragged_model: Path) -> None:
    held_out = write_prompts(tmp_path / "held-out.json", rows=2)
    config = tiny_config(ragged_model, tmp_path, data__eval_path=str(held_out), learner__max_steps=2)
    reward, inside, go_on = held_up()
    async with Supervisor(config, [reward]) as run:
        await inside.wait()
        run.drain()
        go_on.set()
    assert (run.result.steps, run.result.closed_groups) == (1, {"trained": 2})
    assert [each.version for each in read_evaluations(run.folder)] == [0, 1]
    assert (await drive(config, resume=True)).complete


async def test_a_stop_during_evaluation_ends_at_once(tmp_path: Path, ragged_model: Path) -> None:
    held_out = write_prompts(tmp_path / "held-out.json", rows=2)
    config = tiny_config(ragged_model, tmp_path, data__eval_path=str(held_out), learner__max_steps=2)
    reward, inside, _ = held_up()
    async with Supervisor(config, [reward]) as run:
        await inside.wait()
        run.stop()
    assert run.result.rewards_before == {}
    assert read_evaluations(run.folder) == ()
    assert (await drive(config, resume=True)).complete
    assert [each.version for each in read_evaluations(run.folder)] == [0, 2], "from the weights in the checkpoint"


async def test_an_error_in_the_body_cancels_the_run_and_comes_out_as_itself(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=500)

    async def body() -> None:
        async with Supervisor(config, [weigh_ids]) as run:
            async for _ in run.updates():
                raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await body()
    assert "final" not in names_in(tmp_path / "run")


async def test_a_cancelled_consumer_ends_the_run(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=500)
    with anyio.CancelScope() as scope:
        async with Supervisor(config, [weigh_ids]) as run:
            async for _ in run.updates():
                scope.cancel()
    assert scope.cancelled_caught
    assert "final" not in names_in(tmp_path / "run")


async def test_a_start_that_is_cancelled_while_it_takes_its_folder_leaves_nothing_behind(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, take = asyncio.get_running_loop(), RunFolder.take

    def cancelled_meanwhile(config: RunConfig, *, resume: bool) -> RunFolder:
        place = take(config, resume=resume)
        loop.call_soon_threadsafe(scope.cancel)
        return place

    monkeypatch.setattr(RunFolder, "take", cancelled_meanwhile)
    with anyio.CancelScope() as scope:
        async with Supervisor(tiny_config(ragged_model, tmp_path)):
            pass
    assert scope.cancelled_caught
    assert names_in(tmp_path) == {"prompts.json"}


@pytest.mark.parametrize("answer", [[1.0], [1.0] * 4, "abc", {"a": 1}, ["x", "y", "z"]])
async def test_a_reward_that_breaks_its_contract_leaves_nothing_behind(
    tmp_path: Path, ragged_model: Path, answer: Any
) -> None:
    def wrong(completions: list[str], **_: Any) -> Any:
        return answer

    config = tiny_config(ragged_model, tmp_path, output=str(tmp_path / "runs" / "deep" / "run"))
    with pytest.raises(RewardError, match="reward wrong returned"):
        await drive(config, wrong)
    assert names_in(tmp_path) == {"prompts.json"}, "the folders that the run made are gone"


async def test_a_broken_reward_leaves_an_empty_folder_empty_and_an_earlier_run_alone(
    tmp_path: Path, ragged_model: Path
) -> None:
    def wrong(completions: list[str], **_: Any) -> Any:
        return None

    config = tiny_config(ragged_model, tmp_path, learner__max_steps=6)
    (tmp_path / "run").mkdir()
    with pytest.raises(RewardError):
        await drive(config, wrong, resume=True)  # of which nothing is there yet
    assert names_in(tmp_path) == {"prompts.json", "run"}
    assert names_in(tmp_path / "run") == set()
    wrong.__name__ = "weigh_ids"
    await drive(config, ask_at=1)
    before = names_in(tmp_path / "run")
    with pytest.raises(RewardError):
        await drive(config, wrong, resume=True)
    assert names_in(tmp_path / "run") == before - {"summary.json"}, "which spoke of the start before"
    assert (await drive(config, resume=True)).complete


async def test_a_reward_that_does_not_start_leaves_nothing_behind(tmp_path: Path, ragged_model: Path) -> None:
    class Away(troupe.RewardActor):
        async def start(self) -> None:
            raise ConnectionError("no judge")

        async def score(self, sample: troupe.RewardSample) -> float:
            return 0.0

    with pytest.raises(RewardError, match="reward Away did not start: ConnectionError: no judge"):
        await drive(tiny_config(ragged_model, tmp_path), Away())
    assert names_in(tmp_path) == {"prompts.json"}


class Judge(troupe.RewardActor):
    """One that may be away."""

    is_away = False

    async def start(self) -> None:
        if self.is_away:
            raise ConnectionError("no judge")

    async def score(self, sample: troupe.RewardSample) -> float:
        return float(len(sample.completion) % 3)


async def test_a_judge_that_is_away_at_a_resume_is_a_fault_that_may_pass(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    judge = Judge()
    assert (await drive(config, judge, ask_at=1)).steps < 3
    judge.is_away = True
    with pytest.raises(RunError, match=r"reward Judge did not start: .*no judge.*; an earlier start named it too"):
        await drive(config, judge, resume=True)
    judge.is_away = False
    assert (await drive(config, judge, resume=True)).complete


@pytest.mark.parametrize("is_new", [False, True])
async def test_a_judge_that_is_away_before_the_first_checkpoint_may_come_back_too(
    tmp_path: Path, ragged_model: Path, is_new: bool
) -> None:
    (tmp_path / "judges.py").write_text(JUDGES, encoding="utf-8")
    (tmp_path / "here").touch()
    config = tiny_config(ragged_model, tmp_path, rewards__functions=(f"{tmp_path / 'judges.py'}:Judge",))
    async with Supervisor(config) as run:
        run.drain()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "here").unlink()
    if is_new:
        config = tiny_config(ragged_model, tmp_path, rewards__functions=(f"{tmp_path / 'judges.py'}:Other",))
    fault = RewardError if is_new else RunError
    with pytest.raises(fault, match=r"reward (Judge|Other) did not start: .*no judge"):
        async with Supervisor(config, resume=True, allow_changes=["rewards.functions"]):
            pass
    assert (tmp_path / "run" / "run.toml").exists()
    (tmp_path / "here").touch()
    async with Supervisor(config, resume=True, allow_changes=["rewards.functions"]) as run:
        pass
    assert run.result.complete


JUDGES = """
from pathlib import Path
import troupe

class Judge(troupe.RewardActor):
    async def start(self):
        if not Path(__file__).with_name("here").exists():
            raise ConnectionError("no judge")

    async def score(self, sample):
        return float(len(sample.completion) % 3)

class Other(Judge):
    pass
"""


async def test_a_reward_that_is_new_at_a_resume_has_to_start(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    await drive(config)
    away = Judge()
    away.is_away = True
    with pytest.raises(RewardError, match="reward Judge did not start"):
        async with Supervisor(config, [weigh_ids, away], resume=True, allow_changes=["rewards.functions"]):
            pass


async def test_an_output_folder_under_a_file_is_refused(tmp_path: Path, ragged_model: Path) -> None:
    (tmp_path / "file").write_text("x")
    config = tiny_config(ragged_model, tmp_path, output=str(tmp_path / "file" / "run"))
    with pytest.raises(OutputError, match="the output folder cannot be written"):
        await drive(config)
    assert (tmp_path / "file").read_text() == "x"


async def test_a_fault_in_the_learner_ends_the_run_with_its_checkpoints_whole(
    tmp_path: Path, ragged_model: Path
) -> None:
    calls = 0

    def endless(completions: list[str], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [1e-20, 0.0, 5e-21] if calls <= 2 else [1e18, 0.0, 0.0]

    config = tiny_config(
        ragged_model,
        tmp_path,
        learner__scale_rewards="none",
        learner__max_nonfinite_steps=2,
        rewards__weights=[1e20],
        checkpoint__every=1,
        learner__max_steps=9,
    )
    with pytest.raises(RunError, match=r"learner.max_nonfinite_steps"):
        await drive(config, endless)
    versions = [load_checkpoint(path).state.version for path in list_checkpoints(tmp_path / "run")]
    assert versions[-1] == 1
    assert "final" not in names_in(tmp_path / "run")


async def test_a_stop_whose_checkpoint_fails_is_a_fault(tmp_path: Path, ragged_model: Path) -> None:
    async def body() -> None:
        async with Supervisor(tiny_config(ragged_model, tmp_path, learner__max_steps=50), [weigh_ids]) as run:
            async for _ in run.updates():
                (run.folder / "checkpoints").write_text("in the way")
                run.stop()

    with pytest.raises(RunError, match=r"the checkpoint of step \d+ could not be written"):
        await body()


async def test_resuming_as_another_run_is_refused(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    await drive(config)
    before = names_in(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"seed: 0 → 3 \(never"):
        await drive(msgspec.structs.replace(config, seed=3), resume=True)
    with pytest.raises(CheckpointError, match=r"schedule.max_staleness: 0 → 1\n(.*\n)*.*--allow-change schedule.max"):
        await drive(tiny_config(ragged_model, tmp_path, schedule__max_staleness=1), resume=True)
    later = tiny_config(ragged_model, tmp_path, schedule__max_staleness=1, learner__max_steps=2)
    with pytest.raises(CheckpointError, match=r"max_staleness is 1, so step 2 needs policy version 1"):
        async with Supervisor(later, [weigh_ids], resume=True, allow_changes=["schedule.max_staleness"]):
            pass
    wider = write_tiny_model(tmp_path / "wider", msgspec.structs.replace(CONFIG, intermediate_size=96))
    with pytest.raises(CheckpointError, match="the run began with another model"):
        await drive(tiny_config(wider, tmp_path, learner__max_steps=2), resume=True)
    write_prompts(tmp_path / "prompts.json", rows=6)
    with pytest.raises(CheckpointError, match="made with other prompts"):
        await drive(config, resume=True)
    assert names_in(tmp_path / "run") == before


async def test_resuming_a_run_that_is_done_makes_no_step(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    done = await drive(config)
    weights = newest_weights(done.folder)
    again = await drive(config, resume=True)
    assert (again.steps, again.closed_groups, again.complete) == (2, {}, True)
    assert same_bits(newest_weights(again.folder), weights)


async def test_what_a_shorter_run_came_to_does_not_count_for_the_longer_one(tmp_path: Path, ragged_model: Path) -> None:
    done = await drive(tiny_config(ragged_model, tmp_path, learner__max_steps=1))
    folder = Path(done.folder)
    assert read_standing(folder).fate == "complete"
    longer = tiny_config(ragged_model, tmp_path, learner__max_steps=2)

    def die(*_: Any, **__: Any) -> Any:
        raise RuntimeError("killed")

    killed = Factories(sinks=die)
    allowed = ["learner.max_steps"]
    with pytest.raises(RuntimeError, match="killed"):
        await Supervisor(longer, [weigh_ids], resume=True, allow_changes=allowed, factories=killed).__aenter__()
    stored = load_config(folder / "run.toml")
    assert stored.learner.max_steps == 2
    assert trainer._finished(folder, stored) is None
    assert read_standing(folder).fate == "cut off"
    assert (await drive(longer, resume=True)).steps == 2
    assert read_standing(folder).fate == "complete"


async def test_a_summary_that_cannot_be_removed_is_told_before_the_config_is_stored(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=1)
    folder = Path((await drive(config)).folder)
    before, real = (folder / "run.toml").read_bytes(), Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "summary.json":
            raise OSError(errno.EROFS, "Read-only file system")
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    longer = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    with pytest.raises(OutputError, match=r"the output folder cannot be written: .*Read-only file system"):
        async with Supervisor(longer, [weigh_ids], resume=True, allow_changes=["learner.max_steps"]):
            pass
    assert (folder / "run.toml").read_bytes() == before
    assert (folder / "summary.json").is_file()


async def test_two_runs_cannot_share_a_folder(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=2)
    async with Supervisor(config, [weigh_ids]) as run:
        with pytest.raises(OutputError, match=rf"another run, process {os.getpid()}, is writing in this folder"):
            async with Supervisor(config, [weigh_ids], resume=True):
                pass
    assert run.result.steps == 2
    async with Supervisor(config, [weigh_ids], resume=True) as again:
        pass
    assert again.result.steps == 2


async def test_a_folder_that_cannot_be_locked_is_used_all_the_same(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("troupe.runtime.lock.fcntl.flock", no_locks)
    async with Supervisor(tiny_config(ragged_model, tmp_path, learner__max_steps=1), [weigh_ids]) as run:
        pass
    assert run.result.steps == 1


async def test_mlx_keeps_the_limit_of_a_run_as_long_as_it_runs(tmp_path: Path, ragged_model: Path) -> None:
    seen: list[int] = []

    def look(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(mx.get_memory_limit())
        return weigh_ids(completion_ids)

    before = mx.get_memory_limit()
    async with troupe.Supervisor(tiny_config(ragged_model, tmp_path, memory_limit_gb=0.5), [look]) as run:
        await run.wait()
        assert not run._prepared.start.policy.weights, "the run itself keeps what it still needs of them"
    assert set(seen) == {475_000_000}
    assert mx.get_memory_limit() == before
    assert any(notice.startswith("memory: at most 0.0 of 0.5 GB") for notice in run.notices)
