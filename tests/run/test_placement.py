"""The generator in processes of its own: the bits of the plain loop, whoever is killed, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.support.fakes import delayed, often_equal, same_bits, tiny_config, weigh_ids, write_ragged_model
from tests.support.straight import Straight, run_straight
from troupe import Supervisor
from troupe.actors.generator.child import GeneratorChild
from troupe.actors.generator.locked_folder import SHARED_MEMORY, remove_leftovers
from troupe.actors.generator.remote import RemoteGenerator
from troupe.actors.generator.wire import Setup
from troupe.errors import ConfigError, ModelError
from troupe.policy import Weights, load_policy
from troupe.run.config import load_config
from troupe.run.devices import Cards
from troupe.run.placement import Machine
from troupe.run.prepare import prepare
from troupe.run.result import RunResult
from troupe.runtime import linux_cpu
from troupe.runtime.process import ChildProcess

pytestmark = [pytest.mark.anyio, pytest.mark.alone]
PATIENCE_S = 120.0
PLACED: dict[str, Any] = {"schedule__generator": "process", "schedule__blas_threads": 1}
FULL: dict[str, Any] = {
    "learner__batch_size": 3,
    "learner__dynamic_sampling": True,
    "learner__max_resampling_attempts": 2,
}


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


@pytest.fixture(autouse=True)
def as_many_threads_as_the_runs_have() -> Iterator[None]:
    """For the plain loop, whose products are rounded in the same way then."""
    with linux_cpu.blas_limited(1):
        yield


class Watch:
    """Every process and every folder of weights that runs of this test had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.children: list[ChildProcess] = []
        self.folders: list[Path] = []
        start, watch = ChildProcess.start.__func__, self  # type: ignore[attr-defined]

        async def watched(cls: type[ChildProcess], /, *args: str, **options: Any) -> ChildProcess:
            child: ChildProcess = await start(cls, *args, **options)
            watch.children.append(child)
            return child

        monkeypatch.setattr(ChildProcess, "start", classmethod(watched))

    async def drive(self, run: Supervisor) -> RunResult:
        with anyio.fail_after(PATIENCE_S):
            async with run:
                files = run._pipeline.ledgers.files
                await run.wait()
                if files is not None and files._folder is not None:
                    self.folders.append(files._folder.path)
        return run.result

    def check_nothing_is_left(self, processes: int) -> None:
        assert len(self.children) == processes
        assert self.folders
        for folder in self.folders:
            assert not folder.exists()
        for child in self.children:
            assert child.returncode is not None
            with pytest.raises(ProcessLookupError):
                os.kill(child.pid, 0)  # not even a zombie


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


def final(result: RunResult) -> Weights:
    return load_policy(Path(result.folder) / "final").weights


def straight_of(config: Any, reward: Any = weigh_ids) -> Straight:
    return run_straight(config, reward)


@pytest.mark.parametrize(
    "max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)]
)
async def test_a_process_gives_the_bits_of_the_plain_loop(
    tmp_path: Path, ragged_model: Path, watch: Watch, max_staleness: int
) -> None:
    config = tiny_config(ragged_model, tmp_path, schedule__max_staleness=max_staleness, **PLACED)
    result = await watch.drive(Supervisor(config, [delayed(seed=1)]))
    assert same_bits(final(result), straight_of(config).weights)
    assert result.closed_groups == {"trained": 8}
    assert result.incidents == {}
    watch.check_nothing_is_left(processes=1)
    events = json.loads((Path(result.folder) / "trace.json").read_text())
    assert watch.children[0].pid in {event["pid"] for event in events if event["name"] == "generate"}


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
async def test_dynamic_sampling_and_delays_change_nothing(
    tmp_path: Path, ragged_model: Path, watch: Watch, max_staleness: int
) -> None:
    settings = FULL | PLACED | {"schedule__max_staleness": max_staleness, "learner__max_steps": 5}
    expected = run_straight(tiny_config(ragged_model, tmp_path, **settings), often_equal)
    assert sum(expected.filtered) >= 2, "the case is worth its name"
    for seed in range(2):
        config = tiny_config(ragged_model, tmp_path / str(seed), **settings)
        result = await watch.drive(Supervisor(config, [delayed(seed, reward=often_equal)]))
        assert same_bits(final(result), expected.weights)
    watch.check_nothing_is_left(processes=2)


@pytest.mark.slow
async def test_thread_and_process_resume_each_other(tmp_path: Path, ragged_model: Path, watch: Watch) -> None:
    settings = PLACED | {"schedule__max_staleness": 1, "learner__max_steps": 6, "checkpoint__every": 1}
    expected = run_straight(tiny_config(ragged_model, tmp_path, **settings), weigh_ids)
    config = tiny_config(ragged_model, tmp_path, **settings)
    async with Supervisor(config, [weigh_ids]) as run:
        async for update in run.updates():
            if update.step == 2:
                run.stop()
    assert not run.result.complete
    there = tiny_config(ragged_model, tmp_path, **settings | {"schedule__generator": "thread"})
    async with Supervisor(there, [weigh_ids], resume=True) as run:
        async for update in run.updates():
            if update.step == 4:
                run.stop()
    result = await watch.drive(Supervisor(config, [weigh_ids], resume=True))
    assert same_bits(final(result), expected.weights)


@pytest.mark.slow
async def test_several_processes_are_a_function_of_the_config(tmp_path: Path, ragged_model: Path, watch: Watch) -> None:
    runs = []
    settings = PLACED | {"schedule__max_staleness": 1, "schedule__generator_processes": 2, "learner__batch_size": 3}
    for seed in range(2):
        config = tiny_config(ragged_model, tmp_path / str(seed), **settings)
        runs.append(final(await watch.drive(Supervisor(config, [delayed(seed)]))))
    assert same_bits(runs[0], runs[1])
    watch.check_nothing_is_left(processes=4)


@pytest.mark.slow
@pytest.mark.parametrize("on_stale", ["drop", "requeue"])
async def test_the_free_schedule_goes_to_its_end(
    tmp_path: Path, ragged_model: Path, watch: Watch, on_stale: str
) -> None:
    settings = {"schedule__mode": "free", "schedule__on_stale": on_stale, "schedule__max_staleness": 1}
    config = tiny_config(ragged_model, tmp_path, **PLACED | settings)
    result = await watch.drive(Supervisor(config, [delayed(seed=1)]))
    assert result.complete
    assert result.incidents == {}
    watch.check_nothing_is_left(processes=1)


@pytest.mark.slow
async def test_a_killed_process_is_restarted_and_changes_nothing(
    tmp_path: Path, ragged_model: Path, watch: Watch
) -> None:
    killed: list[int] = []

    async def kill_at_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The other groups of the step are still being decoded."""
        if not killed:
            killed.append(watch.children[-1].pid)
            os.kill(killed[0], signal.SIGKILL)
        return weigh_ids(completion_ids)

    sizes = {"learner__batch_size": 4, "generation__max_completion_length": 48, "schedule__max_staleness": 1}
    config = tiny_config(ragged_model, tmp_path, **PLACED | sizes)
    result = await watch.drive(Supervisor(config, [kill_at_first]))
    assert result.incidents == {"process_restarted": 1}
    assert result.closed_groups == {"trained": 16}
    assert same_bits(final(result), straight_of(config).weights)
    watch.check_nothing_is_left(processes=2)


RUN = """
import sys
from pathlib import Path
import anyio, msgspec, troupe
from tests.support.fakes import tiny_config, weigh_ids

async def main():
    settings = {"schedule__generator": "process", "schedule__max_staleness": 1, "learner__max_steps": 100_000}
    config = tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), **settings)
    async with troupe.Supervisor(config, [weigh_ids]) as run:
        async for update in run.updates():
            pipeline = run._pipeline
            generator = pipeline.roles[1].actor
            print(generator.sources[0].pids[0], pipeline.ledgers.files._folder.path, flush=True)

anyio.run(main)
"""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="leftovers in memory are a matter of Linux")
async def test_a_killed_run_leaves_no_process_and_the_next_start_no_file(tmp_path: Path, ragged_model: Path) -> None:
    command = [sys.executable, "-c", RUN, str(ragged_model), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:  # noqa: ASYNC220
        assert run.stdout is not None
        pid, folder = run.stdout.readline().split()
        run.kill()
    with anyio.fail_after(PATIENCE_S):
        while Path(f"/proc/{pid}").exists():  # noqa: ASYNC110, ASYNC240 - nobody tells us
            await anyio.sleep(0.01)
    remove_leftovers(SHARED_MEMORY, tmp_path)  # as every start does
    assert not Path(folder).exists()  # noqa: ASYNC240


async def test_every_start_removes_leftovers(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, learner__max_steps=1)
    left = tmp_path / "run" / "troupe-weights-abc"
    async with Supervisor(config, [weigh_ids]) as run:
        await run.wait()
    left.mkdir()
    async with Supervisor(config, [weigh_ids], resume=True) as run:
        assert not left.exists()


async def test_a_tokenizer_that_the_process_cannot_load_ends_the_run_as_bad_input(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ragged_model: Path, watch: Watch
) -> None:
    """The process refuses it; no restart is tried."""
    start = GeneratorChild.start

    async def spoiled(setup: Setup, *args: Any, **options: Any) -> GeneratorChild:
        return await start(msgspec.structs.replace(setup, tokenizer_files={"tokenizer.json": b"{}"}), *args, **options)

    monkeypatch.setattr(GeneratorChild, "start", spoiled)
    with pytest.raises(ModelError, match="tokenizer"):
        await watch.drive(Supervisor(tiny_config(ragged_model, tmp_path, **PLACED), [weigh_ids]))
    assert len(watch.children) == 1


async def test_a_process_that_is_made_anew_needs_no_model_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ragged_model: Path, watch: Watch
) -> None:
    begin = RemoteGenerator.start

    async def start(self: RemoteGenerator) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        await begin(self)

    copy = tmp_path / "model"
    shutil.copytree(ragged_model, copy)
    monkeypatch.setattr(RemoteGenerator, "start", start)
    await watch.drive(Supervisor(tiny_config(copy, tmp_path, **PLACED), [weigh_ids]))
    assert len(watch.children) == 1


@pytest.mark.parametrize(
    ("settings", "streams"),
    [
        ({"schedule__learner_streams": 3, "learner__gradient_accumulation_steps": 2}, 2),
        ({"schedule__learner_streams": 3}, 3),
        ({"schedule__blas_threads": 2}, 1),  # too little work to be worth it
        ({"schedule__blas_threads": 2, "generation__max_completion_length": 40, "learner__batch_size": 256}, 2),
        ({"schedule__blas_threads": 2, "schedule__max_staleness": 1, "schedule__generator": "thread"}, 1),
    ],
)
def test_as_many_micro_batches_are_learned_at_a_time_as_are_worth_it(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], streams: int
) -> None:
    config = prepare(tiny_config(tiny_model, tmp_path, **settings), [weigh_ids]).config
    assert config.schedule.learner_streams == streams
    assert (config.learner.gradient_accumulation_steps or 1) >= streams


def test_on_a_gpu_there_is_one_stream_whatever_was_asked_for(tmp_path: Path, tiny_model: Path) -> None:
    settings: dict[str, Any] = {"generator": "auto", "learner_streams": 2, "max_staleness": 1}
    config = tiny_config(tiny_model, tmp_path, **{f"schedule__{key}": value for key, value in settings.items()})
    schedule = prepare(config, [weigh_ids], machine=Machine(on_cpu=False, cores=2)).config.schedule
    assert (schedule.generator, schedule.learner_streams) == ("thread", 1)


@pytest.mark.parametrize(
    ("settings", "cards", "expected"),
    [
        ({"schedule__parts": 2}, Cards(("0", "1"), ("0", "1")), ("process", 2)),
        ({"schedule__parts": 2}, Cards(("0",), ("0", "1", "2")), ("process", 2)),
        ({}, Cards(("0", "1"), ("0", "1")), ("thread", 1)),
        ({}, Cards(("0", "1"), ("2", "3")), ("process", 1)),
        ({"schedule__mode": "free"}, Cards(("0", "1"), ("2", "3")), ("process", 2)),
        ({"schedule__parts": 2, "schedule__generator": "thread"}, Cards(("0", "1"), ("0", "1")), ("thread", 1)),
    ],
)
def test_each_card_of_the_generator_has_a_process_where_there_is_a_part_for_it(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], cards: Cards, expected: tuple[str, int]
) -> None:
    config = tiny_config(tiny_model, tmp_path, **{"schedule__generator": "auto", "learner__lanes": 2, **settings})
    prepared = prepare(config, [weigh_ids], machine=Machine(on_cpu=False, cores=2, cards=cards))
    schedule = prepared.config.schedule
    assert (schedule.generator, schedule.generator_processes) == expected
    assert (prepared.ranks, prepared.cards) == (len(cards.ranks), cards)


def test_ranks_without_cards_are_for_processors_alone(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, learner__lanes=2, schedule__learner_ranks=2)
    assert prepare(config, [weigh_ids], machine=Machine(on_cpu=True, cores=2)).ranks == 2
    with pytest.raises(ConfigError, match=r"learner_ranks is 2, but each rank has an NVIDIA card"):
        prepare(config, [weigh_ids], machine=Machine(on_cpu=False, cores=2))


def test_a_generator_in_a_thread_beside_the_learner_leaves_no_streams() -> None:
    with pytest.raises(ConfigError, match=r"schedule.learner_streams is 2, but with max_staleness 1"):
        load_config(None, ["schedule.generator=thread", "schedule.max_staleness=1", "schedule.learner_streams=2"])
