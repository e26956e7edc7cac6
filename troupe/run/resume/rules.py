"""What of a run a resume may change: a rule for every key of the config, and for what decides bits of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from troupe.errors import ConfigError
from troupe.run.config import RunConfig, known_keys
from troupe.run.naming import close_to, describe_meaning, ours_for

Rule = Literal["free", "by name", "never"]
"""free: changes nothing that is computed; by name: has to be allowed; never: it would be another run."""

RULES: dict[str, Rule] = {
    "output": "free",
    "wired_limit_gb": "free",
    "memory_limit_gb": "free",  # what is chosen to fit it has keys of its own
    "seed": "never",
    "model.path": "never",  # unless it is the same model at another place
    "model.dtype": "never",
    "data.path": "never",  # as above
    "data.shuffle": "never",
    "data.prompt_column": "never",  # as above
    "data.answer_column": "never",  # as above
    "data.system_prompt": "never",  # as above
    "data.eval_path": "free",
    "data.max_prompt_tokens": "free",  # refuses longer prompts, changes none
    "data.chat": "by name",
    "data.chat_template_kwargs": "by name",
    "generation.*": "by name",
    "rewards.functions": "by name",
    "rewards.run": "by name",
    "rewards.weights": "by name",
    "rewards.timeout_s": "by name",  # it decides which scores are missing, as do the next ones
    "rewards.retries": "by name",
    "rewards.breaker_failures": "by name",
    "rewards.min_scored": "by name",
    "rewards.processes": "free",
    "rewards.concurrency": "free",
    "rewards.start_timeout_s": "free",
    "rewards.breaker_max_wait_s": "free",
    "learner.batch_size": "never",
    "learner.max_nonfinite_steps": "free",
    "learner.*": "by name",
    "schedule.mode": "never",
    "schedule.generator": "free",
    "schedule.watchdog_s": "free",
    "schedule.*": "by name",
    "checkpoint.*": "free",
    "metrics.*": "free",
    "daemon.*": "free",
}
"""Key → rule; `SECTION.*` is for the keys of a section that are not named themselves."""

MACHINE = "machine"
"""Allows all of the next ones."""
MACHINE_KEYS = tuple(f"{MACHINE}.{name}" for name in ("device", "mlx", "system", "compiler", "blas", "tf32"))
"""What is no key of the config and decides the bits, too: that of the machine."""

_WHY_NEVER = {
    "model.path": "a run goes on with the model that it began with",
    "model.dtype": "the optimizer's state belongs to weights of that type",
    "data.path": "a run goes on with the prompts that it began with",
    "data.prompt_column": "a run goes on with the prompts that it began with",
    "data.answer_column": "a run goes on with the answers that it began with",
    "data.system_prompt": "a run goes on with the prompts that it began with",
    "data.shuffle": "which prompts a step has follows from it",
    "learner.batch_size": "which prompts a step has follows from it",
    "schedule.mode": "the two schedules keep other things of groups under way",
    "seed": "all that is drawn follows from it",
}


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A key that has another value than it had."""

    key: str
    old: Any
    new: Any

    @property
    def rule(self) -> Rule:
        """Whether a resume may change it."""
        return rule_of(self.key)

    def __str__(self) -> str:
        why = f" (never: {_WHY_NEVER[self.key]})" if self.rule == "never" else ""
        return f"{self.key}: {_shown(self.old)} → {_shown(self.new)}{why}"


def value_of(config: RunConfig, key: str) -> Any:
    """What a config has for a key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def rule_of(key: str) -> Rule:
    """What a resume may do with a key."""
    if key in MACHINE_KEYS:
        return "by name"
    return RULES.get(key) or RULES.get(f"{key.partition('.')[0]}.*") or "by name"


def differences(old: RunConfig, new: RunConfig) -> list[Difference]:
    """The keys in which two configs differ."""
    pairs = [(key, value_of(old, key), value_of(new, key)) for key in known_keys()]
    return [Difference(key=key, old=before, new=after) for key, before, after in pairs if before != after]


def check_allowed(keys: Sequence[str]) -> frozenset[str]:
    """The keys that a resume is told to let change. ConfigError for one that is unknown, or may never change."""
    known = [*known_keys(), MACHINE, *MACHINE_KEYS]
    for key in keys:
        if key not in known:
            raise ConfigError(f"--allow-change {key}: there is no such key; {_nearest(key)}")
        if rule_of(key) == "never":
            raise ConfigError(
                f"--allow-change {key}: this can never change ({_WHY_NEVER[key]}); start a new run in another folder, "
                "from a checkpoint of this one if you like: each is a model folder"
            )
    return frozenset(keys)


def _nearest(key: str) -> str:
    """What may have been meant by a key that does not exist."""
    if (meaning := ours_for(key, known_keys())) is not None:
        return describe_meaning(meaning)
    close = close_to(key, [*known_keys(), MACHINE, *MACHINE_KEYS])
    return f"did you mean {close}?" if close else "name it as section.key, for instance learner.lr"


def _shown(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return repr(value) if isinstance(value, str) else str(value)
