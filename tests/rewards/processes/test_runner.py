"""Rewards in processes: calls across, kills, deaths, and what may be run there."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.rewards import process_rewards
from tests.rewards.scoring import is_alive, no_sleep
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import RolloutGroup
from troupe.rewards import RewardManager, RewardsConfig, TrainerState
from troupe.rewards.processes.runner import process_spec
from troupe.runtime.process import ChildProcess

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

FILE = process_rewards.__file__


def in_processes(*rewards: Any, processes: int = 1, retries: int = 0, **settings: Any) -> RewardManager:
    config = RewardsConfig(run=tuple("process" for _ in rewards), processes=processes, retries=retries, **settings)
    return RewardManager(rewards, config=config, sleep=no_sleep)


@asynccontextmanager
async def started(*rewards: Any, **settings: Any) -> AsyncIterator[RewardManager]:
    async with in_processes(*rewards, **settings) as manager:
        yield manager


async def score(manager: RewardManager, *completions: str, **columns: Any) -> Any:
    return await manager.compute_rewards(["p"] * len(completions), list(completions), **columns)


def saying(*texts: str, **columns: Any) -> RolloutGroup:
    group = make_group(make_prompt(0, 0, **columns), size=len(texts))
    rollouts = [msgspec.structs.replace(r, text=text) for r, text in zip(group.rollouts, texts, strict=True)]
    return msgspec.structs.replace(group, rollouts=tuple(rollouts))


async def test_functions_of_files_modules_and_our_own_are_called_across() -> None:
    async with started(f"{FILE}:lengths", process_rewards.later, "diversity") as manager:
        result = await score(manager, "ab", "c", answer=["x", "y"])
    assert result.scores == {"lengths": (2.0, 1.0), "later": (0.5, 0.5), "diversity_reward": (1.0, 1.0)}
    assert result.incidents == ()


async def test_workers_are_kept_work_side_by_side_and_end_with_the_manager() -> None:
    pids: set[int] = set()
    async with started(process_rewards.acts, processes=2) as manager:
        first = await score(manager, "a", "b")
        pids = {int(value) for value in first.scores["acts"]}
        assert os.getpid() not in pids
        assert (await score(manager, "c")).scores["acts"][0] in {float(pid) for pid in pids}
    assert not any(map(is_alive, pids))


async def test_logs_columns_and_the_trainer_state_cross_and_so_does_nan() -> None:
    state = TrainerState(global_step=3, max_steps=9, epoch=0.5)
    group = saying("fine", "nan", answer="a")
    async with started(process_rewards.logs) as manager:
        result = await manager.score_group(group, state)
    assert result.scores == {"logs": (3.0, None)}
    assert (result.metrics, result.extra) == ({"size": 2.0}, {"marked": ("a!", "a!")})
    assert [incident.message for incident in result.incidents] == [
        "reward logs: returned nan for sample 1; scores must be finite, 1e+18 at most"
    ]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("hang", "no answer within 2 s; its process was killed", marks=pytest.mark.slow),
        ("exit", "exit code 7"),
        pytest.param("crash", "SIGSEGV", marks=pytest.mark.slow),
    ],
)
async def test_one_bad_sample_is_missing_and_its_neighbours_are_not(fault: str, message: str) -> None:
    async with started(process_rewards.acts, timeout_s=2.0 if fault == "hang" else 60.0) as manager:
        before = (await score(manager, "a")).scores["acts"][0]
        result = await score(manager, "a", fault, "b")
        scores = result.scores["acts"]
        assert scores[1] is None
        assert scores[0] not in (None, before)
        assert scores[2] is not None
        assert not is_alive(int(before))
        (incident,) = result.incidents
        assert "samples 1 of 3" in incident.message
        assert message in incident.message
        assert (await score(manager, "next")).incidents == ()


@pytest.mark.slow
async def test_where_samples_are_compared_a_killed_call_is_tried_again_whole() -> None:
    async with started(process_rewards.compares, timeout_s=1.0, retries=1) as manager:
        result = await score(manager, "a", "hang")
        assert result.scores == {"compares": (None, None)}
        assert (await score(manager, "a", "b")).scores == {"compares": (2.0, 2.0)}
    assert result.incidents[0].kind == "reward_timeout"


@pytest.mark.slow
async def test_what_single_samples_logged_is_one_log_again() -> None:
    state = TrainerState(global_step=3, max_steps=9, epoch=0.5)
    async with started(process_rewards.logs, timeout_s=1.0, processes=2) as manager:
        result = await manager.score_group(saying("a", "hang", "nan", answer="a"), state)
    assert result.scores == {"logs": (3.0, None, None)}
    assert result.extra == {"marked": ("a!", None, "a!")}
    assert result.metrics == {"size": 1.0}
    assert sorted(incident.kind for incident in result.incidents) == ["reward_nonfinite", "reward_timeout"]


@pytest.mark.parametrize(("fault", "message"), [("raise", "ValueError: no such thing"), ("leave", "SystemExit: 3")])
async def test_what_a_reward_raises_is_a_fault_and_its_worker_goes_on(fault: str, message: str) -> None:
    async with started(process_rewards.acts) as manager:
        before = (await score(manager, "a")).scores
        result = await score(manager, fault, "a")
        assert result.scores == {"acts": (None, None)}
        assert message in result.incidents[0].message
        assert (await score(manager, "a")).scores == before


async def test_tries_that_fail_in_a_process_are_waited_for_like_others() -> None:
    waits: list[tuple[int, str]] = []
    manager = RewardManager(
        [process_rewards.acts],
        config=RewardsConfig(run=("process",), processes=1, retries=3),
        sleep=lambda seconds: note(),
    )

    async def note() -> None:
        wait = manager.waits["acts"]
        waits.append((wait.tries, wait.why))

    async with manager:
        assert (await score(manager, "raise")).scores == {"acts": (None,)}
        assert waits == [(n, "ValueError: no such thing") for n in (1, 2, 3)]
        await score(manager, "fine")
        assert manager.waits == {}


async def test_a_broken_contract_ends_everything_there_too() -> None:
    async with started(process_rewards.wrong) as manager:
        with pytest.raises(RewardError, match="reward wrong returned 1 scores for 2 completions"):
            await score(manager, "a", "b")
    async with started(process_rewards.lengths) as manager:
        with pytest.raises(RewardError, match=r"take plain data only.*columns: thing"):
            await score(manager, "a", thing=[object()])


async def test_a_cancelled_call_leaves_no_busy_worker() -> None:
    async with started(process_rewards.acts) as manager:
        pid = int((await score(manager, "a")).scores["acts"][0])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(score, manager, "hang")
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert not is_alive(pid)
        assert (await score(manager, "b")).incidents == ()


async def test_what_works_between_start_and_stop_must_be_started() -> None:
    for manager in (in_processes(process_rewards.lengths), RewardManager(process_rewards.Judge())):
        with pytest.raises(RewardError, match=r"reward \w+ has not been started"):
            await score(manager, "a")
        assert await manager.stop() == ()


async def test_a_function_gets_ready_in_its_process_and_texts_have_the_same_hashes_there(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "READY = []\n"
        "def f(completions):\n"
        "    return [len(READY), hash('a text') % 1000]\n"
        "f.get_ready = lambda: READY.append(1)\n"
        "f.run = 'process'\n"
        "def g(completions):\n"
        "    return [0, 0]\n"
        "def fail():\n"
        "    raise OSError('no word list')\n"
        "g.get_ready = fail\n"
    )
    config = RewardsConfig(processes=1)
    scores = []
    for _ in range(2):
        async with RewardManager(f"{path}:f", config=config) as manager:
            scores.append((await score(manager, "a", "b")).scores["f"])
    assert scores[0] == scores[1]
    assert scores[0][0] == 1.0
    with pytest.raises(RewardError, match=r"mine\.py:g cannot get ready: OSError: no word list"):
        async with started(f"{path}:g"):
            raise AssertionError


async def test_a_file_that_loads_here_and_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import os\n"
        "assert os.getpid() == int(os.environ['HERE']), 'not in caf\\udce9'\n"
        "def f(completions):\n"
        "    return [1]\n"
    )
    monkeypatch.setenv("HERE", str(os.getpid()))
    with pytest.raises(RewardError, match=r"mine\.py:2: the file does not import: AssertionError: not in caf\\udce9"):
        async with started(f"{path}:f"):
            raise AssertionError


async def test_a_machine_that_has_no_process_left_costs_scores_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> ChildProcess:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    manager = in_processes(process_rewards.acts)
    async with manager:
        with monkeypatch.context() as patch:
            patch.setattr(ChildProcess, "start", refuse)
            result = await score(manager, "exit")
            assert "exit code 7" in result.incidents[0].message
            result = await score(manager, "a")
            assert result.rewards == (None,)
            assert "its process could not be started: [Errno 11] Resource" in result.incidents[0].message
            with pytest.raises(RewardError, match="reward acts: its process could not be started"):
                await in_processes(process_rewards.acts).start()
        assert None not in (await score(manager, "a")).rewards


async def test_a_process_that_says_something_else_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = ChildProcess.start
    monkeypatch.setattr(ChildProcess, "start", lambda *_, **__: start("tests.runtime.child_echo", "talk"))
    with pytest.raises(RewardError, match="reward lengths: its process did not answer as a reward's does"):
        await in_processes(process_rewards.lengths).start()


@pytest.mark.slow
async def test_a_process_that_dies_or_hangs_while_loading_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.py"
    monkeypatch.setenv("HERE", str(os.getpid()))
    text = "import os, time\nif os.getpid() != int(os.environ['HERE']):\n    WHAT\ndef f(completions):\n    return []\n"
    path.write_text(text.replace("WHAT", "os._exit(5)"))
    with pytest.raises(RewardError, match=r"reward f: its process ended while it was loaded: .*exit code 5"):
        async with started(f"{path}:f"):
            raise AssertionError
    path.write_text(text.replace("WHAT", "time.sleep(600)"))
    with pytest.raises(RewardError, match="reward f: its process had not loaded it after 2 s"):
        async with started(f"{path}:f", start_timeout_s=2.0):
            raise AssertionError


def test_what_has_no_name_there_is_refused() -> None:
    def local(completions: list[str]) -> list[float]:
        return []

    class Object:
        def __call__(self, completions: list[str]) -> list[float]:
            return []

    partial = functools.partial(process_rewards.lengths)
    unnamed: list[Callable[..., Any]] = [local, lambda completions: [], partial, Object()]
    for reward in unnamed:
        with pytest.raises(RewardError, match=r"cannot be loaded by name.*define it with `def`"):
            in_processes(reward)
    with pytest.raises(RewardError, match="reward Judge is a RewardActor and lives in the event loop"):
        in_processes(process_rewards.Judge())
    assert process_spec(process_rewards.lengths, None) == "tests.rewards.process_rewards:lengths"
    assert in_processes(f"{FILE}:lengths").names == ("lengths",)


async def test_wrong_code_that_never_worked_ends_the_run_from_a_process_too() -> None:
    wanted = "reward misspelled has not worked once, and its first 2 calls failed by errors of its code.*AttributeError"
    async with started(f"{FILE}:misspelled", breaker_failures=2) as manager:
        await manager.score_group(saying("a"))
        with pytest.raises(RewardError, match=wanted):
            await manager.score_group(saying("a"))


async def test_a_function_has_the_main_thread_of_its_process_and_an_event_loop_that_it_may_run() -> None:
    async with started(f"{FILE}:as_in_a_program") as manager:
        result = await score(manager, "abc")
        assert (await score(manager, "abcd")).scores["as_in_a_program"] == (8.0,)
    assert (result.scores["as_in_a_program"], result.incidents) == ((6.0,), ())


async def test_an_alarm_that_a_call_has_left_does_not_end_its_process() -> None:
    async with started(f"{FILE}:leaves_an_alarm") as manager:
        before = await score(manager, "a")
        await anyio.sleep(0.5)
        assert (await score(manager, "a")).scores == before.scores


async def test_what_it_forks_ends_with_the_run() -> None:
    code = (
        "import anyio\nfrom troupe.rewards import RewardManager, RewardsConfig\n"
        "async def main():\n"
        f"    reward, config = {FILE + ':leaves_a_fork'!r}, RewardsConfig(run=('process',), processes=1)\n"
        "    async with RewardManager(reward, config=config) as manager:\n"
        "        result = await manager.compute_rewards(['p'], ['x'])\n"
        "        print(int(result.scores['leaves_a_fork'][0]), flush=True)\n"
        "anyio.run(main)\n"
    )
    result = await anyio.run_process([sys.executable, "-c", code], stderr=None)
    pid = int(result.stdout)
    with anyio.fail_after(30):
        while _runs(pid):  # noqa: ASYNC110
            await anyio.sleep(0.01)


def _runs(pid: int) -> bool:
    """Not for one that is dead and not buried: who would bury it is the system's affair."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


async def test_a_process_that_leaves_each_time_is_wrong_code() -> None:
    async with started(f"{FILE}:ends_all", breaker_failures=2) as manager:
        await manager.score_group(saying("a"))
        with pytest.raises(RewardError, match=r"reward ends_all has not worked once.*ended with exit code 0"):
            await manager.score_group(saying("a"))
