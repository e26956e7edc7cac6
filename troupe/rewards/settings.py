"""The `[rewards]` section, and what names, weights and ways to run follow from it for a list of rewards."""

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from troupe.errors import RewardError
from troupe.rewards.convention import Reward, reward_name, unwrapped

Run: TypeAlias = Literal["auto", "process", "worker"]


class RewardsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[rewards]` section."""

    functions: tuple[str, ...] = ()
    """What `load_reward` takes: "length", "exact_answer", "format:REGEX", "FILE.py:NAME", …"""
    run: tuple[Run, ...] | None = None
    """Where each runs, one a function: "auto", an async function in the event loop and a sync one in a thread (in the
    event loop too where its attribute `quick` is true), "process", in processes that can be killed, or "worker", in
    such processes of workers on other machines, which offer it (`--offers rewards`). An "auto" one that
    turns out to need a process moves to some by itself. None: all "auto", but for those whose attribute `run` is
    "process", as some of our own."""
    processes: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Processes of each function that runs in some, on all workers together where it runs there; each makes one call at
    a time."""
    weights: tuple[float, ...] | None = None
    """One a function; None: all 1."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Seconds that one attempt at one call may take. A call is for a group; of a `RewardActor` for one completion, with
    `scope = "batch"` for all groups of a round."""
    retries: Annotated[int, msgspec.Meta(ge=0)] = 1
    """Further attempts after the first fails."""
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 16
    """Calls of one reward at once (see `timeout_s`), where it does not run in processes."""
    start_timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Seconds that an actor's `start`, or a process with what it loads, may take."""
    breaker_failures: Annotated[int, msgspec.Meta(ge=0)] = 8
    """Calls in a row that fail after their retries (an error, a timeout, a dead process) before a reward is taken to be
    down: from then on its calls wait and no step is begun, until one succeeds. Where none ever has, and all
    failed by errors that no service makes which is away, the run ends. 0: never."""
    breaker_max_wait_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    """Longest time between two tries whether a reward that is down is back."""
    min_scored: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Groups with fewer scored samples are quarantined, not trained: one has nothing to be compared with."""


def unique_names(rewards: Sequence[Reward]) -> tuple[str, ...]:
    """TRL's names; of equal ones the second gets `_2`, the third `_3`, leaving out what is taken."""
    wanted = [reward_name(reward) for reward in rewards]
    names: list[str] = []
    for name in wanted:
        candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        # A suffixed name must not take one that another reward really has.
        names.append(next(c for c in candidates if c not in names and (c == name or c not in wanted)))
    return tuple(names)


def checked_weights(
    weights: Sequence[float] | None, names: Sequence[str], rewards: Sequence[Reward]
) -> tuple[float, ...]:
    """One weight a reward: those given, or each reward's own attribute, or 1. RewardError where they do not fit."""
    if weights is None:
        own = [getattr(unwrapped(reward), "weight", None) for reward in rewards]
        weights = [1.0 if weight is None else weight for weight in own]
    _check_one_each("weights", "numbers", weights, names)
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise RewardError(f"rewards.weights: {weight} for reward {name}; give a finite number")
    return tuple(float(weight) for weight in weights)


def checked_run(run: Sequence[Run] | None, names: Sequence[str], rewards: Sequence[Reward]) -> Sequence[Run]:
    """One way to run a reward: those given, or each function's own attribute, or "auto". RewardError where they do not
    fit."""
    if run is None:
        return ["process" if getattr(unwrapped(reward), "run", None) == "process" else "auto" for reward in rewards]
    _check_one_each("run", "values", run, names)
    return run


def _check_one_each(key: str, what: str, given: Sequence[object], names: Sequence[str]) -> None:
    if len(given) != len(names):
        raise RewardError(
            f"rewards.{key} has {len(given)} {what} for {len(names)} rewards ({', '.join(names)}); give one for each"
        )


def own_config(reward: Reward, name: str, config: RewardsConfig) -> RewardsConfig:
    """The section, overruled by the attributes of a function or an actor's class."""
    given = unwrapped(reward)
    own = {key: getattr(given, key, None) for key in ("timeout_s", "retries", "concurrency")}
    own = {key: value for key, value in own.items() if value is not None}
    try:
        return msgspec.convert({**msgspec.structs.asdict(config), **own}, RewardsConfig)
    except msgspec.ValidationError as error:
        raise RewardError(f"reward {name}: {error}; correct the attribute of its class") from None
