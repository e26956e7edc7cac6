"""Rewards that fork, that want the main thread, and that never worked: the right values are in `tests/data/cases`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.cases.cases import CASES, copy_case, expected_of
from tests.support.fakes import make_group, make_prompt
from troupe.errors import RewardError
from troupe.messages import Incident, RolloutGroup
from troupe.rewards import RewardManager, RewardsConfig

SHORT = ("--set", "generation.max_completion_length=8")


def names_in(case: str) -> list[str]:
    """The rewards of a case's file."""
    source = (CASES / case / "rewards.py").read_text(encoding="utf-8")
    return re.findall(r"^(?:async )?def (\w+)\(completions", source, re.MULTILINE)


def train(folder: Path, reward: str, *arguments: str) -> tuple[int, str]:
    """One run as a user starts it → exit code and what was said."""
    command = [sys.executable, "-m", "troupe", "train", "-d", "prompts.json", "-o", "o", "--reward", reward]
    done = subprocess.run(
        [*command, *SHORT, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout


def steps(folder: Path) -> list[dict[str, Any]]:
    """What the metrics say of each step."""
    lines = [json.loads(line) for line in (folder / "o" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line]


def saying(*texts: str, **columns: Any) -> RolloutGroup:
    group = make_group(make_prompt(0, 0, **columns), size=len(texts))
    rollouts = [msgspec.structs.replace(r, text=text) for r, text in zip(group.rollouts, texts, strict=True)]
    return msgspec.structs.replace(group, rollouts=tuple(rollouts))


async def scored_in_a_run(reward: str, group: RolloutGroup) -> tuple[tuple[float | None, ...], list[Incident]]:
    """The scores of one group as in a run, and what was told meanwhile."""
    told: list[Incident] = []
    async with RewardManager(reward, config=RewardsConfig(retries=0, processes=1)) as manager:
        manager.listen(told.append)
        result = await manager.score_group(group)
    assert result.incidents == ()
    return next(iter(result.scores.values())), told


@pytest.mark.slow
@pytest.mark.alone
def test_a_reward_that_forks_makes_its_steps_with_the_right_scores(tmp_path: Path) -> None:
    folder = copy_case("fork-in-reward", tmp_path)
    code, said = train(folder, "rewards.py:one_process_each", "--max-steps", "2", "--set", "rewards.timeout_s=20")
    assert code == expected_of("fork-in-reward")["exit_code"], said
    assert len(steps(folder)) == 2
    assert "reward one_process_each now runs in processes of its own" in said
    assert "rewards.run" in said


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["one_process_each", "os_fork", "async_fork", "pool"])
def test_it_does_so_to_the_end(tmp_path: Path, name: str) -> None:
    expected = expected_of("fork-in-reward")
    folder = copy_case("fork-in-reward", tmp_path)
    count = expected["steps"]
    code, said = train(folder, f"rewards.py:{name}", "--max-steps", str(count), "--set", "rewards.timeout_s=20")
    assert (code, len(steps(folder))) == (expected["exit_code"], count), said
    assert "reward_error" not in said


@pytest.mark.anyio
@pytest.mark.alone
@pytest.mark.parametrize(
    "name",
    ["one_process_each", "os_fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("async_fork", "pool"))],
)
async def test_every_way_to_fork_is_scored_in_a_process(tmp_path: Path, name: str) -> None:
    reward = copy_case("fork-in-reward", tmp_path) / "rewards.py"
    scores, told = await scored_in_a_run(f"{reward}:{name}", saying("a", "four", ""))
    assert scores == (1.0, 4.0, 0.0)
    assert [incident.kind for incident in told] == ["reward_moved"]


@pytest.mark.anyio
@pytest.mark.alone
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
async def test_processes_that_are_not_forked_stay_and_find_the_functions_of_the_file(
    tmp_path: Path, method: str
) -> None:
    reward = copy_case("fork-in-reward", tmp_path) / "rewards.py"
    text = "\n\ndef anew(completions, **k):\n"
    text += f"    with cf.ProcessPoolExecutor(1, mp_context=mp.get_context({method!r})) as ex:\n"
    text += "        return list(ex.map(_len, completions))\n"
    reward.write_text(reward.read_text(encoding="utf-8") + text, encoding="utf-8")
    code = (
        "import anyio\nfrom troupe.rewards import RewardManager\n"
        "async def main():\n"
        f"    async with RewardManager({f'{reward}:anew'!r}) as manager:\n"
        "        result = await manager.compute_rewards(['p', 'p'], ['a', 'four'])\n"
        "    print(result.scores['anew'], result.incidents)\n"
        "if __name__ == '__main__':\n"
        "    anyio.run(main)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = await anyio.run_process([sys.executable, str(script)], env=env, stderr=None)
    assert done.stdout.decode().strip() == "(1.0, 4.0) ()"


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("name", ["acc", "acc_swallow"])
def test_a_reward_that_wants_the_main_thread_trains_on_its_scores(tmp_path: Path, name: str) -> None:
    pytest.importorskip("math_verify")
    folder = copy_case("main-thread-rewards", tmp_path)
    expected = expected_of("main-thread-rewards")
    code, said = train(folder, f"rewards.py:{name}", "--max-steps", "1")
    assert code == expected["exit_code"], said
    mean = expected["rewards/acc/mean, step 1, seed 0"]
    assert [step[f"rewards/{name}/mean"] for step in steps(folder)] == [mean]
    assert f"reward {name} now runs in processes of its own" in said


@pytest.mark.anyio
@pytest.mark.alone
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("acc", (1.0, 0.0)),
        pytest.param("acc_swallow", (1.0, 0.0), marks=pytest.mark.slow),
        pytest.param("with_alarm", (1.0, 0.0), marks=pytest.mark.slow),
        ("get_loop", (1.0, 2.0)),
    ],
)
async def test_so_does_every_other_one(tmp_path: Path, name: str, right: tuple[float, ...]) -> None:
    pytest.importorskip("math_verify")
    reward = copy_case("main-thread-rewards", tmp_path) / "rewards.py"
    scores, told = await scored_in_a_run(f"{reward}:{name}", saying("7", "12", answer="7"))
    assert scores == right
    assert [incident.kind for incident in told] == ["reward_moved"]


def test_a_reward_that_never_worked_ends_the_run(tmp_path: Path) -> None:
    folder = copy_case("down-for-ever", tmp_path)
    code, said = train(folder, "rewards.py:val", "--max-steps", "3", "--set", "rewards.retries=0")
    assert code == expected_of("down-for-ever")["exit_code"], said
    assert "reward val has not worked once" in said
    assert "ValueError: could not convert string to float: 'x" in said
    assert f"({folder / 'rewards.py'}:2)" in said


@pytest.mark.anyio
@pytest.mark.parametrize("name", names_in("down-for-ever"))
async def test_whatever_it_raises(tmp_path: Path, name: str) -> None:
    reward = copy_case("down-for-ever", tmp_path) / "rewards.py"
    config = RewardsConfig(retries=0, breaker_failures=2)
    manager = RewardManager(f"{reward}:{name}", config=config)
    with anyio.fail_after(60):
        await manager.score_group(saying("7", "12"))
        with pytest.raises(RewardError) as raised:
            await manager.score_group(saying("7", "12"))
    assert f"reward {name} has not worked once" in str(raised.value)
    line = int(str(raised.value).rpartition(f"{reward}:")[2].partition(")")[0])
    body = reward.read_text(encoding="utf-8").splitlines()
    begins = next(n for n, text in enumerate(body, 1) if f"def {name}(" in text)
    assert begins <= line <= begins + 3  # the user's own line, not that of json or re
