"""Rewards that test_processes.py has run in processes, by the name of this module or file."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from troupe.rewards import RewardActor, RewardSample, TrainerState


def lengths(completions: list[str], **columns: Any) -> list[float]:
    print("printed by a reward")
    return [float(len(c)) for c in completions]


async def later(completions: list[str]) -> list[float]:
    return [0.5] * len(completions)


def misspelled(completions: list[str]) -> list[float]:
    return [len(completion.textt) for completion in completions]  # type: ignore[attr-defined]


def acts(completions: list[str]) -> list[float]:
    """Does what the completions say."""
    for completion in completions:
        match completion:
            case "hang":
                time.sleep(600)
            case "exit":
                os._exit(7)
            case "crash":
                ctypes.string_at(0)
            case "raise":
                raise ValueError("no such thing")
            case "leave":
                sys.exit(3)
    return [float(os.getpid())] * len(completions)


def leaves_an_alarm(completions: list[str]) -> list[float]:
    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    return [float(os.getpid())] * len(completions)


def compares(completions: list[str]) -> list[float]:
    if "hang" in completions:
        time.sleep(600)
    return [float(len(set(completions)))] * len(completions)


compares.scope = "group"  # type: ignore[attr-defined]


def logs(
    completions: list[str],
    answer: list[str],
    trainer_state: TrainerState,
    log_extra: Callable[[str, Sequence[Any]], None],
    log_metric: Callable[[str, float], None],
) -> list[float]:
    if "hang" in completions:
        time.sleep(600)
    log_extra("marked", [f"{a}!" for a in answer])
    log_metric("size", len(completions))
    return [trainer_state.global_step + (float("nan") if c == "nan" else 0) for c in completions]


def wrong(completions: list[str]) -> list[float]:
    return [1.0]


def as_in_a_program(completions: list[str]) -> list[float]:
    """What works on the main thread of a program only: an alarm, a loop that is there, another that is made."""
    length = float(len(completions[0]))

    def late(number: int, frame: object) -> None:
        raise TimeoutError

    async def later() -> float:
        await asyncio.sleep(0)
        return length

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        time.sleep(600)
    except TimeoutError:
        score = asyncio.get_event_loop().run_until_complete(later()) + asyncio.run(later())
    finally:
        signal.signal(signal.SIGALRM, before)
    return [score] * len(completions)


def leaves_a_fork(completions: list[str]) -> list[float]:
    """Scores are the number of a process that would go on for long, in a session of its own."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        while True:
            time.sleep(600)
    return [float(pid)] * len(completions)


def hides(completions: list[str]) -> list[float]:
    """Right in a process, 0 elsewhere, since it hides that it failed."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    except Exception:
        return [0.0] * len(completions)
    return [float(len(c)) for c in completions]


def weighs_with_an_alarm(completion_ids: list[list[int]], **_: Any) -> list[float]:
    try:
        signal.alarm(100)
    except Exception:
        return [0.0] * len(completion_ids)
    signal.alarm(0)
    return [sum(ids) / 1000 for ids in completion_ids]


def forks(completions: list[str]) -> list[float]:
    for _ in completions:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
    return [float(len(c)) for c in completions]


async def forks_async(completions: list[str]) -> list[float]:
    return forks(completions)


def ends_all(completions: list[str]) -> list[float]:
    os._exit(0)


HERE = threading.Event()
"""Set by who imports this; no process that is spawned has it."""


def late(completions: list[str]) -> list[float]:
    if HERE.is_set():
        time.sleep(5)
    return [float(len(c)) for c in completions]


class Judge(RewardActor):
    async def score(self, sample: RewardSample) -> float | None:
        return 1.0


ITS_OWN = threading.local()
ITS_OWN.score = 1.0


def wants_its_thread(completions: list[str]) -> list[float]:
    """What only the thread that has read this file may use."""
    return [float(ITS_OWN.score)] * len(completions)


def moves(completions: list[list[dict[str, Any]]], environments: list[Any], environment_rewards: list[float]) -> Any:
    """The moves that each environment tells of, and what it gave itself."""
    return [env.moves + 10 * reward for env, reward in zip(environments, environment_rewards, strict=True)]


def sets(environments: list[Any], **columns: Any) -> list[float]:
    for environment in environments:
        environment.moves = 0
    return [0.0] * len(environments)


def marks(completions: list[str], answer: list[str], log_extra: Callable[[str, Sequence[Any]], None]) -> list[float]:
    log_extra("marked", [f"{a}!" for a in answer])
    return [float(len(a)) for a in answer]


def waits_for(completions: list[str]) -> list[float]:
    """Leaves a file of its own in the folder that the completion names and waits for the file `go` there."""
    folder = Path(completions[0])
    (folder / str(os.getpid())).touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return [2.0] * len(completions)


def pids(completions: list[str]) -> list[float]:
    """Writes the process's number to the file that a completion names; hangs at "hang"."""
    for completion in completions:
        if completion == "hang":
            time.sleep(600)
        with Path(completion).open("a") as file:
            file.write(f"{os.getpid()}\n")
    return [1.0] * len(completions)
