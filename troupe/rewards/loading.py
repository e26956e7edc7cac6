"""From the name of a reward, as a configuration or command line has it, to the reward itself.

User files are run as Python, so they must be the user's own.
"""

import inspect
from collections.abc import Callable, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor
from troupe.rewards.builtin import (
    diversity_reward,
    exact_answer_reward,
    format_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    length_reward,
    no_reward,
    think_format_reward,
)
from troupe.rewards.convention import Reward, RewardFunction, check_signature
from troupe.rewards.episodes import environment_reward
from troupe.rewards.faults import described
from troupe.rewards.verifiers import get_math_verify_reward, load_reasoning_gym_reward
from troupe.rewards.watching import Watch, loading_watch, remember
from troupe.runtime.code_loading import Wanted, load_named
from troupe.runtime.isolation import in_daemon_thread

BUILTIN: dict[str, RewardFunction] = {
    "length": length_reward,
    "none": no_reward,
    "diversity": diversity_reward,
    "exact_answer": exact_answer_reward,
    "think_format": think_format_reward,
    "repetition_penalty": get_repetition_penalty_reward(),
    "environment": environment_reward,
}
"""Name → reward."""

NUMBERED: dict[str, tuple[Callable[..., RewardFunction], Sequence[tuple[str, type[int] | type[float]]]]] = {
    "repetition_penalty": (get_repetition_penalty_reward, [("N", int), ("PENALTY", float)]),
    "soft_overlong": (get_soft_overlong_punishment, [("LONGEST", int), ("CACHE", int)]),
}
"""Name → what makes the reward from the numbers that stand behind the name, and what they are called."""

_KINDS = [*BUILTIN, *NUMBERED, "format", "math_verify", "reasoning_gym"]


def load_reward(spec: str, base: Path | None = None) -> Reward:
    """The reward of a name: one of `BUILTIN`, "format:REGEX", one of `NUMBERED`, "math_verify", "math_verify:COLUMN",
    "reasoning_gym", "FILE.py:NAME" or "MODULE:NAME".

    "repetition_penalty:N:PENALTY" punishes repeated N-grams of tokens by down to PENALTY (alone: 3 and −1);
    "soft_overlong:LONGEST:CACHE" punishes the last CACHE tokens before LONGEST, and all beyond.
    NAME is a function, sync or async, in TRL's signature, a `RewardActor` or a subclass of it, which is instantiated
    without arguments. A relative FILE starts at `base`, by default the working folder. The file is run once under a
    module name of its own, however many rewards come from it; its folder is appended to `sys.path` and stays there,
    so that it can import its neighbours, also later, but never hides an installed package. MODULE is one that can be
    imported, such as a package's.

    Raises:
        RewardError: with file and line, for whatever keeps the reward from being used.
    """
    watch = loading_watch()
    with watch.watching():
        try:
            return _load(spec, base)
        finally:
            watch.is_loaded = True


def _load(spec: str, base: Path | None) -> Reward:
    if spec in BUILTIN:
        return BUILTIN[spec]
    kind, colon, rest = spec.partition(":")
    if kind == "format" and colon:
        return format_reward(rest)
    if kind in NUMBERED:
        return _with_numbers(spec, *NUMBERED[kind])
    if kind == "math_verify":
        return get_math_verify_reward(rest if colon else "answer")
    if spec == "reasoning_gym":
        return load_reasoning_gym_reward()
    return _usable(*load_named(spec, base, _WANTED))


async def load_beside(spec: str) -> Reward:
    """The reward of a name, loaded in a thread while groups are scored: an import may take long, and may not fork.

    Raises:
        RewardError: as `load_reward`.
    """
    watch = Watch(is_loading=True)
    watch.refuses_forks = True
    with watch.watching():
        reward: Reward = await in_daemon_thread(partial(load_reward, spec))
        return reward


def is_code(spec: str) -> bool:
    """Whether a name is that of code which is not ours: "FILE.py:NAME" or "MODULE:NAME"."""
    kind, colon, _ = spec.partition(":")
    return bool(colon) and kind not in _KINDS


def is_own(spec: str) -> bool:
    """Whether a name is that of a reward of our own, so that nobody's code is run to load it but ours and that of the
    packages it is known to need."""
    kind = spec.partition(":")[0]
    return spec in BUILTIN or spec == "reasoning_gym" or kind in (*NUMBERED, "math_verify") or spec[:7] == "format:"


def default_reward(columns: Set[str], source: str, *, environment_rewards: bool = False) -> str:
    """Name of the reward for rows with such columns where none is named. `environment_rewards`: whether there are
    environments that give rewards.

    Raises:
        RewardError: where nothing in them says what is right.
    """
    if environment_rewards:
        return "environment"
    if "reasoning_gym" in columns:
        return "reasoning_gym"
    if "answer" in columns:
        return "exact_answer"
    raise RewardError(
        f"{source}: the rows have no `answer` column and no reward is named; name one with --reward ({_FORMS[5:]}), or "
        "the column by --set data.answer_column=NAME"
    )


def _with_numbers(
    spec: str, make: Callable[..., RewardFunction], parameters: Sequence[tuple[str, type[int] | type[float]]]
) -> RewardFunction:
    name, *texts = spec.split(":")
    try:
        return make(*[number(text) for (_, number), text in zip(parameters, texts, strict=True)])
    except ValueError:
        form = ":".join([name, *(label for label, _ in parameters)])
        kinds = " and ".join(f"{label} a {'whole ' if kind is int else ''}number" for label, kind in parameters)
        raise RewardError(f"reward {spec!r} cannot be read; write {form}, {kinds}") from None


_FORMS = (
    "give length, diversity, exact_answer, think_format, format:REGEX, repetition_penalty[:N:PENALTY], "
    "soft_overlong:LONGEST:CACHE, math_verify[:COLUMN], reasoning_gym, environment, FILE.py:NAME or MODULE:NAME"
)


_WANTED = Wanted("reward", "function or RewardActor", _FORMS, RewardError, described, _KINDS, remember)


def _usable(found: Any, name: str, path: Path) -> Reward:
    if inspect.isclass(found):
        return _instance(found, path)
    if isinstance(found, RewardActor):
        return found
    if not callable(found):
        raise RewardError(
            f"{path}: {name} is of type {type(found).__name__} and cannot be called; name a function or RewardActor"
        )
    check_signature(found)
    return found  # type: ignore[no-any-return]


def _instance(found: type, path: Path) -> RewardActor:
    line = inspect.getsourcelines(found)[1]
    if not issubclass(found, RewardActor):
        raise RewardError(
            f"{path}:{line}: class {found.__name__} is no RewardActor; derive it from that or name a function"
        )
    try:
        return found()
    except Exception as error:
        raise RewardError(
            f"{path}:{line}: {found.__name__}() failed: {type(error).__name__}: {error}; "
            "it is made without arguments, so give them defaults"
        ) from error
