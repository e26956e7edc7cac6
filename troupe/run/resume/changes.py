"""What of a run may change.

In a resume: a rule for every key of the config, and for what decides bits of a machine. While it is live: a few keys,
each change of which is written to `changes.jsonl` in the run folder, with the first step that it holds for, before it
takes effect, so that whoever resumes the run from an earlier step makes it again at the same one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from troupe.errors import ConfigError
from troupe.records.layout import CHANGES
from troupe.records.standing import Change
from troupe.run.aliases import close_to, describe_meaning, ours_for
from troupe.run.config import RunConfig, known_keys, with_value
from troupe.run.tables import anchored_reward
from troupe.runtime.files import sync

Rule = Literal["free", "by name", "never"]
"""free: changes nothing that is computed; by name: has to be allowed; never: it would be another run."""

RULES: dict[str, Rule] = {
    "output": "free",
    "wired_limit_gb": "free",
    "memory_limit_gb": "free",  # what is chosen to fit it has keys of its own
    "task": "never",
    "seed": "never",
    "model.path": "never",  # unless it is the same model at another place
    "model.dtype": "never",
    "adapter.resume_from": "never",  # unless it is the same adapter at another place
    "adapter.*": "never",
    "data.path": "never",  # as above
    "data.shuffle": "never",
    "data.prompt_column": "never",  # as above
    "data.answer_column": "never",  # as above
    "data.system_prompt": "never",  # as above
    "data.eval_path": "free",
    "data.max_prompt_tokens": "free",  # refuses longer prompts, changes none
    "data.chat": "by name",
    "data.chat_template_kwargs": "by name",
    "data.chat_template_date": "by name",
    "sft.completion_column": "never",  # as above
    "sft.eval_dataset": "free",
    "sft.eval_steps": "free",
    "sft.*": "by name",
    "warm_start.path": "never",  # as above
    "warm_start.steps": "never",
    "warm_start.*": "by name",
    "curriculum.*": "by name",  # rows that were chosen already stay
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
    "environment.turn_timeout_s": "free",  # what a timeout decides is an answer, and recorded
    "environment.start_timeout_s": "free",
    "environment.retries": "free",
    "environment.concurrency": "free",
    "environment.run": "free",
    "environment.processes": "free",
    "environment.breaker_failures": "free",
    "environment.breaker_max_wait_s": "free",
    "environment.on_lost": "free",
    "environment.*": "by name",
    "learner.batch_size": "never",
    "learner.max_nonfinite_steps": "free",
    "learner.*": "by name",
    "teacher.*": "by name",
    "schedule.mode": "never",
    "schedule.engines": "free",
    "schedule.generator": "free",
    "schedule.learner_ranks": "free",  # the lanes decide the bits
    "schedule.devices": "free",
    "schedule.rank_timeout_s": "free",
    "schedule.generator_processes": "free",
    "schedule.watchdog_s": "free",
    "schedule.*": "by name",
    "checkpoint.*": "free",
    "evaluation.*": "free",
    "metrics.*": "free",
    "daemon.*": "free",
    "cluster.*": "free",
}
"""Key → rule; `SECTION.*` is for the keys of a section that are not named themselves."""

MACHINE = "machine"
"""Allows all of the next ones."""
MACHINE_KEYS = tuple(f"{MACHINE}.{name}" for name in ("device", "mlx", "system", "compiler", "blas", "tf32"))
"""What is no key of the config and decides the bits, too: that of the machine."""

_WHY_NEVER = {
    "model.path": "a run goes on with the model that it began with",
    "model.dtype": "the optimizer's state belongs to weights of that type",
    "adapter.*": "a run goes on with the adapter that it began with",
    "data.path": "a run goes on with the prompts that it began with",
    "data.prompt_column": "a run goes on with the prompts that it began with",
    "data.answer_column": "a run goes on with the answers that it began with",
    "data.system_prompt": "a run goes on with the prompts that it began with",
    "data.shuffle": "which prompts a step has follows from it",
    "task": "what a step is follows from it",
    "sft.completion_column": "a run goes on with the rows that it began with",
    "warm_start.path": "a run goes on with the rows that it began with",
    "warm_start.steps": "which steps are supervised follows from it",
    "learner.batch_size": "which prompts a step has follows from it",
    "schedule.mode": "the two schedules keep other things of groups under way",
    "seed": "all that is drawn follows from it",
}


def _why_never(key: str) -> str:
    return _WHY_NEVER.get(key) or _WHY_NEVER[f"{key.partition('.')[0]}.*"]


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
        why = f" (never: {_why_never(self.key)})" if self.rule == "never" else ""
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
                f"--allow-change {key}: this can never change ({_why_never(key)}); start a new run in another folder, "
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


LIVE_KEYS = ("learner.lr", "rewards.NAME", "checkpoint.every", "schedule.watchdog_s", "log.level")
"""What may be set while a run is live. NAME is a reward's, and its value what `rewards.functions` takes; `log.level` is
the daemon's own."""

_ADDING = threading.Lock()
"""Held by whoever writes a change: each finds the end of the file, and several logs may be of one file."""


def check_change(config: RunConfig, key: str, value: Any, rewards: Sequence[str] | None) -> Any:
    """The value, as the config would hold it, of a key that is to be set while a run is live.

    `rewards`: their names; None where they are not known yet. ConfigError for a key that may not be set now, or a value
    that the config would refuse.
    """
    section, _, name = key.partition(".")
    is_reward = name in rewards if rewards is not None else key not in known_keys()
    if section == "rewards" and is_reward:
        if not isinstance(value, str):
            raise ConfigError(
                f"set {key}: {value!r} is no text; name a reward as the config does, for instance FILE.py:NAME"
            )
        return anchored_reward(value, Path.cwd())
    if key == "log.level":
        raise ConfigError("set log.level: only a daemon keeps a log of its own; run this with `troupe daemon`")
    if key not in LIVE_KEYS or section == "rewards":
        names = [f"rewards.{reward}" for reward in rewards or ()] if section == "rewards" else list(LIVE_KEYS)
        known = key in known_keys()
        problem = "cannot change while a run is live" if known else "there is no such key to be set"
        if not known and section != "rewards" and (meaning := ours_for(key, known_keys())) is not None:
            problem += f": {describe_meaning(meaning)}"
        may_be_allowed = known and rule_of(key) != "never"
        remedy = f"; for others: end the run, and resume it with --allow-change {key}" if may_be_allowed else ""
        raise ConfigError(f"set {key}: {problem}; what can: {', '.join(names)}{remedy}")
    if value is None:
        raise ConfigError(f"set {key}: None is no value; what a config may leave open is chosen when a run is prepared")
    return value_of(with_value(config, key, value, f"set {key}"), key)


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What a start of a run begins with, of all that may be set while it is live."""

    rates: tuple[tuple[int, float], ...] = ()
    """First step → peak learning rate, rising; before that the config's."""
    checkpoint_every: int = 50
    watchdog_s: float = 600.0
    exchanges: tuple[tuple[int, str, str], ...] = ()
    """First step, name of a reward, and the text of what takes its place then; in the order of steps."""

    @classmethod
    def of(cls, config: RunConfig, changes: Sequence[Change] = (), rewards: Sequence[str] = ()) -> Live:
        """What follows from the config and the changes made to it so far. What changes nothing that is computed holds
        from the beginning; the rest from its step."""
        every = in_force(changes, "checkpoint.every")
        watchdog = in_force(changes, "schedule.watchdog_s")
        exchanges = [(step, name, spec) for name in rewards for step, spec in in_force(changes, f"rewards.{name}")]
        return cls(
            rates=tuple(in_force(changes, "learner.lr")),
            checkpoint_every=every[-1][1] if every else config.checkpoint.every,
            watchdog_s=watchdog[-1][1] if watchdog else config.schedule.watchdog_s,
            exchanges=tuple(sorted(exchanges)),
        )


class ChangesLog:
    """`changes.jsonl` of one run folder. Its calls may come from any thread."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CHANGES

    def read(self) -> tuple[Change, ...]:
        """All changes, in the order in which they were made. ConfigError where the file is damaged.

        A last line without its end was never in force: whoever wrote it died on the way.
        """
        try:
            whole, _, _ = self._path.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigError(
                f"{self._path}: the changes made while the run was live cannot be read: {error}"
            ) from None
        changes = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                changes.append(msgspec.json.decode(line, type=Change))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise ConfigError(
                    f"{self._path}:{number}: this is no change of a setting: {error}; mend the line, or remove it if "
                    "what it set is not wanted"
                ) from None
        return tuple(changes)

    def checked(self, config: RunConfig, rewards: Sequence[str]) -> tuple[Change, ...]:
        """`read`, for a run of this config and with rewards of these names: what was set of others is left out.

        ConfigError for a change that cannot be made.
        """
        changes = []
        for change in self.read():
            section, _, name = change.key.partition(".")
            if section == "rewards" and name not in rewards:
                continue
            try:
                value = check_change(config, change.key, change.value, rewards)
            except ConfigError as error:
                raise ConfigError(f"{self._path}: {error}") from None
            changes.append(msgspec.structs.replace(change, value=value))
        return tuple(changes)

    def add(self, change: Change) -> None:
        """Write one more; it is on the disk on return. OSError where the disk fails, and then it is not there."""
        with _ADDING:
            self._add(msgspec.json.encode(change) + b"\n")

    def _add(self, line: bytes) -> None:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            end = os.pread(descriptor, size, 0).rfind(b"\n") + 1
            try:
                os.ftruncate(descriptor, end)  # half a line of somebody who died
                _write_all(descriptor, line, end)
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, end)
                raise
        finally:
            os.close(descriptor)
        if not end:
            sync(self._path.parent)


def in_force(changes: Sequence[Change], key: str) -> list[tuple[int, Any]]:
    """First step → value, rising: what a key was set to. A later change takes the place of those for later steps."""
    schedule: list[tuple[int, Any]] = []
    for change in changes:
        if change.key == key:
            schedule = [(step, value) for step, value in schedule if step < change.step]
            schedule.append((change.step, change.value))
    return schedule


def _write_all(descriptor: int, line: bytes, start: int) -> None:
    if os.pwrite(descriptor, line, start) < len(line):
        raise OSError("the disk has room for a part of the line only")
