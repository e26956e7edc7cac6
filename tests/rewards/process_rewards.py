"""Rewards that test_processes.py has run in processes, by the name of this module or file."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
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


class Judge(RewardActor):
    async def score(self, sample: RewardSample) -> float | None:
        return 1.0
