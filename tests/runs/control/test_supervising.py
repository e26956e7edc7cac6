"""Runs from Python: listening, steering, ending, failing, and living with others in one process."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.support.fakes import same_bits, tiny_config, weigh_ids
from tests.support.runs import STORED, column, completions, incidents, lines, names_in, policy_of, summary
from troupe import Supervisor
from troupe.checkpoint import list_checkpoints
from troupe.daemon.control.answers import answer
from troupe.errors import ConfigError, DatasetError, OutputError
from troupe.messages import Done, Pause, Refused, Resume, Status, Step

pytestmark = pytest.mark.anyio


def config_in(model: Path, folder: Path, **settings: Any) -> troupe.RunConfig:
    return tiny_config(model, folder, **STORED | settings)


async def until(there: Any) -> None:
    """Wait for something that is on its way."""
    with anyio.fail_after(60):
        while not there():  # noqa: ASYNC110
            await anyio.sleep(0.01)


async def test_every_update_is_a_line_of_the_metrics_file(tmp_path: Path, ragged_model: Path) -> None:
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        heard = [update async for update in run.updates()]
    told = lines(run.folder)
    assert [update.step for update in heard] == [line["step"] for line in told]
    for update, line in zip(heard, told, strict=True):
        assert update.metrics["reward"] == line["reward"]
        assert update.metrics["loss"] == line["loss"]
        assert update.total_steps == 4


async def test_a_run_may_be_ended_early_by_what_its_updates_say(tmp_path: Path, ragged_model: Path) -> None:
    async with Supervisor(config_in(ragged_model, tmp_path, learner__max_steps=500), [weigh_ids]) as run:
        async for update in run.updates():
            if update.step >= 2:
                run.drain()
    assert 2 <= run.result.steps < 500
    assert not run.result.complete
    assert summary(run.folder) == run.result
    assert len(lines(run.folder)) == run.result.steps
    assert "final" in names_in(run.folder)


async def test_two_listeners_hear_the_same(tmp_path: Path, ragged_model: Path) -> None:
    heard: dict[str, list[int]] = {"one": [], "two": []}
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        run.pause()

        async def listen(name: str) -> None:
            async for update in run.updates():
                heard[name].append(update.step)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, "one")
            tasks.start_soon(listen, "two")
            await anyio.wait_all_tasks_blocked()
            run.resume()
    assert heard["one"] == heard["two"]
    assert heard["one"][-1] == 4


async def test_who_stops_listening_does_not_stop_the_run(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        async for _ in run.updates():
            break
    assert run.result.complete
    assert same_bits(policy_of(run.folder), policy_of(plain))


async def test_a_step_may_be_asked_for_right_after_the_pause(tmp_path: Path, ragged_model: Path) -> None:
    refused = Refused(message="the run is going on, not paused: pause it first, then it goes by steps")
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        await until(lambda: run.status().phase == "running")
        answers = [answer(run, request) for request in (Pause(), Step())]  # nothing runs in between
        assert run.status().phase == "running", "the pause is not heeded yet"
        assert [type(one) for one in answers] == [Done, Done]
        await until(lambda: run.status().phase == "paused")
        answer(run, Resume())
        assert (run.status().phase, answer(run, Step())) == ("paused", refused)
    assert run.result.complete


async def test_pausing_stepping_and_going_on_change_nothing_that_is_learned(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    phases: list[str] = []
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        run.pause()
        await until(lambda: run.status().phase == "paused")
        assert run.status().step == 0
        run.step(2)
        await until(lambda: run.status().step == 2 and not run.status().groups)
        phases.append(run.status().phase)
        run.step()
        await until(lambda: run.status().step == 3 and not run.status().groups)
        phases.append(run.status().phase)
        run.resume()
    assert phases == ["paused", "paused"]
    assert run.result.complete
    assert same_bits(policy_of(run.folder), policy_of(plain))


async def test_the_status_counts_up_and_can_be_sent_anywhere(tmp_path: Path, ragged_model: Path) -> None:
    steps: list[int] = []
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        assert run.status().phase in ("starting", "running")
        async for update in run.updates():
            status = run.status()
            assert msgspec.json.decode(msgspec.json.encode(status), type=Status).step == status.step
            assert status.total_steps == 4
            assert status.policy_version == status.step >= update.step
            steps.append(status.step)
        await run.wait()
        assert run.status().phase == "ended"
    assert steps == sorted(steps)
    assert run.status().metrics["reward"] == lines(run.folder)[-1]["reward"]
    assert run.status().groups == ()


async def test_another_learning_rate_holds_from_the_next_step_on_and_is_kept(
    tmp_path: Path, ragged_model: Path
) -> None:
    config = config_in(ragged_model, tmp_path, learner__lr_scheduler="constant")
    async with Supervisor(config, [weigh_ids]) as run:
        run.pause()
        run.step()
        async for update in run.updates():
            if update.step == 1:
                run.set("learner.lr", 0.125)
                await until(lambda: "changes.jsonl" in names_in(run.folder) or run.status().step > 1)
                run.step(2)
            if update.step == 3:
                run.stop()
    assert column(run.folder, "learning_rate")[0] == pytest.approx(0.01)
    assert column(run.folder, "learning_rate")[2] == pytest.approx(0.125)
    async with Supervisor(config, [weigh_ids], resume=True) as again:
        await again.wait()
    assert column(run.folder, "learning_rate")[3] == pytest.approx(0.125)


async def test_what_cannot_be_set_is_refused_at_once_and_the_run_goes_on(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    wrong = [
        ("learner.lr", -1.0, "learner.lr is -1.0"),
        ("learner.lr", "fast", "learner.lr is 'fast'"),
        ("learner.batch_size", 8, "cannot change while a run is live"),
        ("learner.learning_rate", 0.1, "there is no such key"),
        ("rewards.nobody", "length", "rewards.weigh_ids"),
    ]
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        for key, value, said in wrong:
            with pytest.raises(ConfigError) as raised:
                run.set(key, value)
            assert said in str(raised.value)
    assert "changes.jsonl" not in names_in(run.folder)
    assert same_bits(policy_of(run.folder), policy_of(plain))


async def test_an_error_of_ones_own_comes_out_and_the_run_can_be_gone_on_with(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    config = config_in(ragged_model, tmp_path, checkpoint__every=1)

    async def body() -> None:
        async with Supervisor(config, [weigh_ids]) as run:
            async for update in run.updates():
                if update.step == 2:
                    await until(lambda: list_checkpoints(run.folder))
                    raise KeyError("no such column in my plot")

    with pytest.raises(KeyError, match="my plot"):
        await body()
    async with Supervisor(config, [weigh_ids], resume=True) as again:
        await again.wait()
    assert again.result.complete
    assert same_bits(policy_of(again.folder), policy_of(plain))
    assert completions(again.folder) == completions(plain)


async def test_a_program_that_gives_up_waiting_leaves_a_folder_that_is_free(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    async def never(completions: list[str], **_: Any) -> list[float]:
        await anyio.Event().wait()
        return []

    config = config_in(ragged_model, tmp_path, rewards__timeout_s=600.0)
    never.__name__ = "weigh_ids"
    with anyio.CancelScope() as patience:
        async with Supervisor(config, [never]) as run:
            await until(lambda: run.status().groups)
            patience.cancel()
            await run.wait()
    assert patience.cancelled_caught
    async with Supervisor(config, [weigh_ids], resume=True) as again:
        await again.wait()
    assert again.result.complete
    assert same_bits(policy_of(again.folder), policy_of(plain))


async def test_two_runs_one_after_the_other_in_one_program_are_two_runs_alone(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    before = set(threading.enumerate())
    other = config_in(ragged_model, tmp_path / "other", seed=9, learner__max_steps=2)
    async with Supervisor(other, [weigh_ids]) as first:
        await first.wait()
    async with Supervisor(config_in(ragged_model, tmp_path / "same"), [weigh_ids]) as second:
        await second.wait()
    assert completions(second.folder) == completions(plain)
    assert same_bits(policy_of(second.folder), policy_of(plain))
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if thread.name.startswith("troupe-")]


async def test_two_runs_at_once_in_two_folders_do_not_disturb_each_other(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    results = {}

    async def one(name: str, seed: int) -> None:
        config = config_in(ragged_model, tmp_path / name, seed=seed)
        async with Supervisor(config, [weigh_ids]) as run:
            await run.wait()
        results[name] = run.result

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(one, "same", 0)
        tasks.start_soon(one, "other", 9)
    assert results["same"].complete
    assert results["other"].complete
    assert completions(results["same"].folder) == completions(plain)
    assert same_bits(policy_of(results["same"].folder), policy_of(plain))
    assert {c.text for c in completions(results["other"].folder)} != {c.text for c in completions(plain)}


async def test_limits_of_two_runs_at_once_are_all_gone_when_both_have_ended(tmp_path: Path, ragged_model: Path) -> None:
    before = mx.get_memory_limit()
    long = config_in(ragged_model, tmp_path / "long", memory_limit_gb=0.5)
    short = config_in(ragged_model, tmp_path / "short", memory_limit_gb=0.4, learner__max_steps=1)
    async with Supervisor(short, [weigh_ids]) as first:
        first.pause()
        await until(lambda: first.status().phase == "paused")
        async with Supervisor(long, [weigh_ids]) as second:
            second.pause()
            await until(lambda: second.status().phase == "paused")
            first.resume()
            await first.wait()
            second.resume()
            await second.wait()
    assert first.result.complete
    assert second.result.complete
    assert mx.get_memory_limit() == before


async def test_a_supervisor_whose_input_is_bad_writes_nothing_and_another_may_follow(
    tmp_path: Path, ragged_model: Path
) -> None:
    config = config_in(ragged_model, tmp_path)
    (tmp_path / "prompts.json").write_text('[{"prompt": ""}]')
    with pytest.raises(DatasetError, match="the prompt is empty"):
        async with Supervisor(config, [weigh_ids]):
            pass
    assert names_in(tmp_path) == {"prompts.json"}
    (tmp_path / "prompts.json").write_text('[{"prompt": "a"}]')
    async with Supervisor(config, [weigh_ids]) as run:
        await run.wait()
    assert run.result.complete


async def test_a_folder_in_which_a_run_is_live_is_refused_to_a_second_one(tmp_path: Path, ragged_model: Path) -> None:
    config = config_in(ragged_model, tmp_path)
    async with Supervisor(config, [weigh_ids]) as run:
        run.pause()
        with pytest.raises(OutputError, match="another run, process"):
            async with Supervisor(config, [weigh_ids], resume=True):
                pass
        run.resume()
    assert run.result.complete
    assert len(lines(run.folder)) == 4


async def test_a_supervisor_that_is_entered_twice_says_so_and_the_run_in_it_is_not_harmed(
    tmp_path: Path, ragged_model: Path, plain: Path
) -> None:
    async with Supervisor(config_in(ragged_model, tmp_path), [weigh_ids]) as run:
        with pytest.raises(RuntimeError, match="make another one"):
            async with run:
                pass
    with pytest.raises(RuntimeError, match="make another one"):
        async with run:
            pass
    assert run.result.complete
    assert same_bits(policy_of(run.folder), policy_of(plain))
    assert names_in(run.folder) == names_in(plain)


def test_training_from_a_thread_of_ones_own_is_training(tmp_path: Path, ragged_model: Path, plain: Path) -> None:
    results: list[troupe.RunResult] = []
    thread = threading.Thread(
        target=lambda: results.append(troupe.train(config_in(ragged_model, tmp_path), [weigh_ids]))
    )
    thread.start()
    thread.join(120)
    assert results
    assert same_bits(policy_of(results[0].folder), policy_of(plain))


async def test_a_reward_may_ask_the_run_it_scores_to_end(tmp_path: Path, ragged_model: Path) -> None:
    holder: list[Supervisor] = []

    async def enough(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step == 2:
            holder[0].drain()
        return weigh_ids(completion_ids)

    supervisor = Supervisor(config_in(ragged_model, tmp_path, learner__max_steps=100), [enough])
    holder.append(supervisor)
    async with supervisor as run:
        await run.wait()
    assert run.result.steps == 3


async def test_an_incident_is_counted_told_and_kept_in_the_same_words(tmp_path: Path, ragged_model: Path) -> None:
    calls: list[int] = []

    def once(completion_ids: list[list[int]], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("first of all")
        return weigh_ids(completion_ids)

    async with Supervisor(config_in(ragged_model, tmp_path), [once]) as run:
        await run.wait()
        counted = run.status().incidents
    assert counted == run.result.incidents == summary(run.folder).incidents
    assert sum(counted.values()) == len(incidents(run.folder))
    assert any("first of all" in message for _, message in incidents(run.folder))
