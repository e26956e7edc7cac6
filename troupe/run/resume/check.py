"""Whether a run may go on as it is asked to.

A run folder says in `run.toml` what its run was made with, every choice included. Whoever resumes it may name another
config: what that leaves open takes the stored value, what differs is refused unless it changes nothing or is allowed by
name. Model and dataset are compared by their contents, wherever they lie.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import Checkpoint, Made, list_checkpoints, read_made
from troupe.errors import CheckpointError, ConfigError
from troupe.records.layout import RUN_TOML
from troupe.records.standing import Change
from troupe.run.config import RunConfig, known_keys, load_config, with_value
from troupe.run.folder import is_as_written
from troupe.run.resume.changes import (
    LIVE_KEYS,
    MACHINE,
    MACHINE_KEYS,
    ChangesLog,
    Difference,
    check_allowed,
    differences,
    in_force,
    value_of,
)

OPEN: dict[str, Any] = {
    "rewards.functions": (),
    "data.chat_template_date": None,
    "generation.memory_limit_gb": None,
    "learner.lr": None,
    "warm_start.lr": None,
    "warm_start.steps": None,
    "learner.gradient_accumulation_steps": None,
    "learner.gradient_checkpointing": None,
    "checkpoint.overlap": None,
    "schedule.generator": "auto",
    "schedule.generator_processes": None,
    "schedule.parts": None,
    "schedule.blas_threads": None,
    "schedule.learner_streams": None,
}
"""Key → the value with which a config leaves it to `prepare`."""

_AS_IT_WAS = "PATH for g++, OPENBLAS_CORETYPE, the package mlx"

_CAPPED = "generation.max_completion_length"
SETTLED_BY_CONTENTS = (
    "model.path",
    "adapter.resume_from",
    "data.path",
    "warm_start.path",
    "data.prompt_column",
    "sft.completion_column",
    "data.answer_column",
    "data.system_prompt",
)
_TEACHERS = ("teacher.path", "teacher.models")
_SAMPLED = re.compile(
    r"generation\..+|data\..+|rewards\.functions|teacher\.(path|models|column|dtype)|environment\..+|curriculum\.enabled"
)
"""Keys of which it depends what is sampled, what scores it gets, and what a teacher says of it."""


class Resumption(msgspec.Struct, frozen=True, kw_only=True):
    """What a run that is resumed was made with, what is asked for now, and what of it is allowed."""

    folder: Path
    stored: RunConfig
    asked: RunConfig
    """With what it leaves open as it was chosen when the run began."""
    allowed: frozenset[str]
    machine: tuple[Difference, ...] = ()
    """In what this machine rounds otherwise than the one that the newest checkpoint is of."""
    differences: tuple[Difference, ...] = ()
    """What becomes different, known when `compared`; all allowed, but for where model and dataset lie."""

    @classmethod
    def of(
        cls, folder: Path, config: RunConfig, allowed: Sequence[str], machine: Mapping[str, str] | None = None
    ) -> Resumption | None:
        """None where no run was begun in the folder. `machine`: what `arithmetic` says of it.

        CheckpointError for what is asked for and not allowed, as far as that can be known before anything is loaded;
        ConfigError where the folder does not say what the run was made with, or for keys that cannot be allowed.
        """
        allow = check_allowed(allowed)
        stored = stored_config(folder)
        if stored is None:
            return None
        # how the steps up to the newest checkpoint were made; whether it is whole is seen when it is loaded
        newest = next((read_made(checkpoint) for checkpoint in list_checkpoints(folder)), Made())
        stored = _made_with(folder, stored, newest)
        asked = config
        for key, is_open in OPEN.items():
            if value_of(asked, key) == is_open and key != _left_open(config.schedule, stored.schedule):
                asked = with_value(asked, key, value_of(stored, key), f"{folder / RUN_TOML}")
        made = ChangesLog(folder).read()
        for key in known_keys():  # a file that was mended to say what was set meanwhile asks for nothing new
            if (values := in_force(made, key)) and value_of(asked, key) == values[-1][1]:
                asked = with_value(asked, key, value_of(stored, key), f"{folder / RUN_TOML}")
        others = _other_machine(newest, machine or {}) if config.schedule.mode == "pinned" else ()
        resumption = cls(folder=folder, stored=stored, asked=asked, allowed=allow, machine=others)
        if asked.generation.max_completion_length > stored.generation.max_completion_length:
            # it may be more than the model has positions for, and was then when the run began
            asked = with_value(asked, _CAPPED, value_of(stored, _CAPPED), _CAPPED)
        resumption.compared(asked)
        return resumption

    def compared(self, resolved: RunConfig) -> Resumption:
        """With the differences, where `resolved` is what became of `asked`. CheckpointError for those not allowed.

        What comes out different although nobody asked for it is this machine's doing; that counts only where another
        memory limit was asked for.
        """
        named = {difference.key for difference in differences(self.stored, self.asked)}
        found = [d for d in differences(self.stored, resolved) if d.key in named or "memory_limit_gb" in named]
        found += self.machine
        refused = [
            d
            for d in found
            if not self.is_settled_later(d) and (d.rule == "never" or (d.rule == "by name" and not self._allows(d)))
        ]
        if refused:
            raise CheckpointError(self.refusal(refused))
        return msgspec.structs.replace(self, differences=tuple(found))

    def _allows(self, difference: Difference) -> bool:
        names = {self._flag(difference), *([MACHINE] if difference in self.machine else [])}
        return bool(names & self.allowed)

    def is_settled_later(self, difference: Difference) -> bool:
        """Whether what lies in two places tells if anything differs."""
        return difference.key in SETTLED_BY_CONTENTS or (self.moves_teacher and difference.key in _TEACHERS)

    def hangs_on_contents(self, difference: Difference) -> bool:
        """Whether it is allowed only if what lies in two places is the same."""
        return self.is_settled_later(difference) and not (difference.rule == "by name" and self._allows(difference))

    @property
    def moves_teacher(self) -> bool:
        """Whether as many teachers as before, of the same names, are said to lie elsewhere."""
        before, now = self.stored.teacher, self.asked.teacher
        places = [(each.path, *(model.path for model in each.models)) for each in (before, now)]
        names = [(each.path is None, *(model.name for model in each.models)) for each in (before, now)]
        return names[0] == names[1] and places[0] != places[1]

    @property
    def changed(self) -> frozenset[str]:
        """The keys that differ."""
        return frozenset(difference.key for difference in self.differences)

    @property
    def samples_anew(self) -> bool:
        """Whether groups that are under way are not those that the run would sample and score now."""
        return any(
            _SAMPLED.fullmatch(d.key) for d in self.differences if d.rule == "by name" and not self.is_settled_later(d)
        )

    def notices(self, total_steps: int, before: int, checkpoint: Checkpoint | None) -> list[str]:
        """What the user should know of what changes. ConfigError where more steps are done than are asked for.

        `before`: steps that the run was to have.
        """
        done = 0 if checkpoint is None else checkpoint.state.version
        if total_steps < done:
            raise ConfigError(
                f"{self.folder}: {done} steps are done and {total_steps} are asked for (learner.max_steps, "
                "learner.epochs); ask for more, or take the policy of an earlier step from a checkpoint"
            )
        told = [
            f"{difference}, as allowed"
            for difference in self.differences
            if difference.rule == "by name" and not self.hangs_on_contents(difference)
        ]
        if total_steps != before:
            scheduler = self.stored.learner.lr_scheduler
            counted = (
                "" if scheduler == "constant" else f"; the {scheduler} learning rate counts the new number from here"
            )
            told.append(f"the run now has {total_steps} steps, {before} before{counted}")
        return told

    def superseding(self, made: Sequence[Change], step: int, rewards: Mapping[str, str | None]) -> tuple[Change, ...]:
        """Values that are asked for now in place of those that were set while the run was live.

        `rewards`: name → the text that the config has for it now, where it has one.
        """
        now = {difference.key: difference.new for difference in self.differences if difference.key in LIVE_KEYS}
        if "rewards.functions" in self.changed:
            now |= {f"rewards.{name}": spec for name, spec in rewards.items() if spec is not None}
        return tuple(Change(step=step, key=key, value=value) for key, value in now.items() if in_force(made, key))

    def refusal(self, refused: Sequence[Difference]) -> str:
        """Every difference that is not allowed, and what to do."""
        named = {difference.key for difference in differences(self.stored, self.asked)} | {*MACHINE_KEYS}
        others = [difference for difference in refused if difference in self.machine]
        told = [f"{self.folder}: the run in this folder was made with other settings than are asked for now:"]
        if len(others) == len(refused):
            told = [f"{self.folder}: the run in this folder was made where numbers are rounded otherwise than here:"]
        told += [f"  {d}" if d.key in named else f"  {d} (follows from memory_limit_gb)" for d in refused]
        flags = dict.fromkeys(self._flag(difference) for difference in refused if difference.rule == "by name")
        remedies = [] if len(others) == len(refused) else ["leave them out to go on as before"]
        if others:
            remedies.append(f"have {' and '.join(d.key for d in others)} as it was, for the same bits ({_AS_IT_WAS})")
        if flags:
            remedies.append("allow what is meant by " + " ".join(f"--allow-change {key}" for key in flags))
        if any(difference.rule == "never" for difference in refused):
            remedies.append("or start a new run in another folder")
        return "\n".join([*told, ", ".join(remedies)])

    def _flag(self, difference: Difference) -> str:
        """The key by which a difference is allowed: another memory limit brings other choices with it."""
        if difference in self.machine:
            return difference.key
        is_asked = value_of(self.asked, difference.key) != difference.old
        return difference.key if is_asked else "memory_limit_gb"


def stored_config(folder: Path) -> RunConfig | None:
    """What the run in a folder was made with; None where no run was begun there.

    ConfigError where `run.toml` is damaged, or was written by a Troupe that knows more than this one.
    """
    file = folder / RUN_TOML
    if not file.is_file():
        return None
    remedy = "it says what the run was made with, so restore it"
    try:
        stored = load_config(file)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}, or resume with the newer Troupe that may have written it") from None
    if stored.model.path is None or stored.data.path is None:
        raise ConfigError(f"{file}: model.path or data.path is missing, so a part of the file is gone; {remedy}")
    return _as_of_then(stored, file)


def _as_of_then(stored: RunConfig, file: Path) -> RunConfig:
    """With what earlier Troupes did and did not say."""
    schedule = stored.schedule
    if schedule.learner_streams is None:  # there were none, and products were rounded otherwise
        stored = with_value(stored, "schedule.learner_streams", 1, f"{file}")
    if schedule.parts is None:  # prompts were dealt to processes for good
        parts = 1 if schedule.generator == "thread" else schedule.generator_processes or 1
        stored = with_value(stored, "schedule.parts", parts, f"{file}")
    return stored


def _left_open(asked: ScheduleConfig, stored: ScheduleConfig) -> str:
    """The key whose stored value goes not with where the generator is to run now."""
    if asked.generator == "thread" and stored.generator == "process":
        return "schedule.generator_processes"
    if asked.generator == "auto" and (asked.generator_processes or 1) > 1 and stored.generator == "thread":
        return "schedule.generator"
    return ""


def _made_with(folder: Path, stored: RunConfig, newest: Made) -> RunConfig:
    """What those steps were made with, where somebody has edited `run.toml`, which is to ask for something. What a run
    wrote there itself counts: an earlier start was allowed to change something."""
    if not newest.config or is_as_written(folder / RUN_TOML):
        return stored
    try:
        return _as_of_then(load_config(None, [newest.config]), folder / RUN_TOML)
    except ConfigError:
        return stored


def _other_machine(newest: Made, machine: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key=f"{MACHINE}.{name}", old=newest.machine[name], new=now)
        for name, now in machine.items()
        if newest.machine.get(name, now) != now
    )
