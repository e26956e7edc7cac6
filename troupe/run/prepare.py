"""From a configuration to a run that can begin: its inputs, its placement, and where it starts from.

Whatever is wrong is raised as an InputError; nothing on disk has been touched by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from troupe.errors import ConfigError
from troupe.policy import is_on_cpu
from troupe.records.layout import STORE
from troupe.records.sinks.base import check_sinks
from troupe.records.store.write import check_store
from troupe.rewards import Reward
from troupe.run.config import RunConfig, check_config
from troupe.run.folder import run_folder
from troupe.run.inputs import Inputs, load_inputs
from troupe.run.memory import Plan
from troupe.run.placement import Machine, place_run
from troupe.run.resume.changes import Live
from troupe.run.resume.check import Resumption
from troupe.run.start import Start, start_run
from troupe.runtime import linux_cpu
from troupe.runtime.arithmetic import arithmetic
from troupe.runtime.memory import check_wired_limit

_REWARDS = {"rewards.functions", "rewards.run"}
"""Which they are, and where they run."""


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """A run that can begin."""

    config: RunConfig
    """Resolved: absolute paths, and the sizes that the model allows."""
    folder: Path
    inputs: Inputs
    """Without the arrays of its policy, which `start` has."""
    memory: Plan
    """What the run takes, and what was chosen for it."""
    start: Start
    rounding: dict[str, str] = {}
    """What of this machine decides the bits."""
    rewards_stood: bool = False
    """Whether an earlier start of the run named the same rewards, all of them in its config."""
    notices: tuple[str, ...]
    """What the user should know, one line each."""

    def without_arrays(self) -> Prepared:
        """What is to be known once a run goes on by itself, which keeps the arrays that it needs."""
        return msgspec.structs.replace(self, start=self.start.without_arrays())

    @property
    def live(self) -> Live:
        """What this start begins with, of all that may be set while it runs."""
        return Live.of(self.config, self.start.changes, self.inputs.rewards.names)

    @property
    def rewards_worked(self) -> bool:
        """Whether an earlier start could use the rewards that this one begins with, as far as the checkpoint says, or
        without one the stored config: of a first start that a reward ended nothing stays."""
        if self.start.checkpoint is None:
            return self.rewards_stood
        before = self.start.checkpoint.state.rewards
        standing = self.inputs.rewards.standing(self.start.first_step)
        return not before or all(  # the first format does not name them
            times or (name in before and (before[name].version > 0 or before[name].spec == spec))
            for name, (times, spec) in standing.items()
        )


def prepare(
    config: RunConfig,
    rewards: Sequence[Reward] = (),
    *,
    resume: bool = False,
    allow_changes: Sequence[str] = (),
    to_show: bool = False,
    machine: Machine | None = None,
    rounding: dict[str, str] | None = None,
) -> Prepared:
    """Load and check everything. `rewards` are used beside those that the config names; `allow_changes` are the keys in
    which the config may differ from that of the run that is resumed. `to_show`: nothing is to be run, so that a few
    rows are enough where each has to be made; not in a resume, which compares all. `machine`, `rounding`: what of this
    machine decides where work is placed, and what decides bits; None: it is looked at. Raises InputError."""
    asked, notices = _check(config)
    folder = run_folder(asked, resume=resume)
    rounding = arithmetic() if rounding is None else rounding
    machine = Machine(on_cpu=is_on_cpu(), cores=linux_cpu.blas_threads()) if machine is None else machine
    resumption = Resumption.of(folder, asked, allow_changes, rounding) if resume else None
    if resume and "sqlite" in asked.metrics.sinks:
        check_store(folder / STORE)
    if resumption is not None:
        asked = resumption.asked
    inputs = load_inputs(asked, rewards, resumption, resume=resume, to_show=to_show)
    memory = place_run(inputs, machine)
    if resumption is not None:
        resumption = resumption.compared(memory.config)
    start = start_run(folder, memory.config, inputs, resumption, resume=resume)
    return Prepared(
        config=msgspec.structs.replace(memory.config, output=str(folder)),
        folder=folder,
        inputs=msgspec.structs.replace(inputs, policy=inputs.policy.having({})),
        memory=memory,
        start=start,
        rounding=rounding,
        rewards_stood=not rewards and resumption is not None and not _REWARDS & resumption.changed,
        notices=(*notices, *inputs.notices, *start.policy.notices, *memory.notices, *start.notices),
    )


def _check(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The config, and what the user should know of the machine, as far as nothing has to be loaded for it."""
    config = check_config(config)
    check_sinks(config.metrics)
    notices: list[str] = []
    if is_on_cpu():
        notices = linux_cpu.advice()
        linux_cpu.check_temporary_files()
    if config.model.path is None:
        raise ConfigError(
            "model.path is missing: name a Hugging Face folder of a Qwen3 model (in RUN.toml, or with -m MODEL_DIR)"
        )
    if config.data.path is None:
        raise ConfigError(
            "data.path is missing: name a .json or .jsonl file of prompts (-d PROMPTS.json), or another source"
        )
    return config, notices + check_wired_limit(config.wired_limit_gb)
