"""Whether a run may go on as it is asked to, and from which checkpoint.

A run folder says in `run.toml` what its run was made with, every choice included. Whoever resumes it may name another
config: what that leaves open takes the stored value, what differs is refused unless it changes nothing or is allowed by
name. Model and dataset are compared by their contents, wherever they lie. Knows nothing of actors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from troupe.checkpoint import (
    FORMAT,
    Checkpoint,
    Made,
    RewardState,
    RunState,
    list_checkpoints,
    load_newest,
    read_made,
)
from troupe.errors import CheckpointError, ConfigError
from troupe.messages import Unfinished
from troupe.policy import Policy, Weights, expected_shapes
from troupe.records.layout import RUN_TOML
from troupe.records.standing import Change
from troupe.rewards import RewardManager
from troupe.run.config import RunConfig, known_keys, load_config, with_value
from troupe.run.resume.changes import LIVE_KEYS, ChangesLog, in_force
from troupe.run.resume.rules import MACHINE, MACHINE_KEYS, Difference, check_allowed, differences, value_of
from troupe.run.sealed_config import is_as_written

OPEN: dict[str, Any] = {
    "rewards.functions": (),
    "generation.memory_limit_gb": None,
    "learner.gradient_accumulation_steps": None,
    "learner.gradient_checkpointing": None,
    "checkpoint.overlap": None,
    "schedule.generator": "auto",
    "schedule.generator_processes": None,
    "schedule.blas_threads": None,
    "schedule.learner_streams": None,
}
"""Key → the value with which a config leaves it to `prepare`."""

_AS_IT_WAS = "PATH for g++, OPENBLAS_CORETYPE, the package mlx"

_CAPPED = "generation.max_completion_length"
_SETTLED_BY_CONTENTS = ("model.path", "data.path", "data.prompt_column", "data.answer_column", "data.system_prompt")
_SAMPLED = re.compile(r"generation\..+|data\..+|rewards\.functions")
"""Keys of which it depends what is sampled, and what scores it gets."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a run this run and no other, besides its config."""

    dataset: str
    """Fingerprint of the prompts."""
    model: str
    """Fingerprint of the folder of the model that it begins with."""
    rewards: tuple[str, ...]
    """Their names."""


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
        newest = _newest_made(folder)
        stored = _made_with(folder, stored, newest)
        asked = config
        for key, is_open in OPEN.items():
            if value_of(asked, key) == is_open:
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
            if (d.rule == "never" and d.key not in _SETTLED_BY_CONTENTS)
            or (d.rule == "by name" and not self._flags(d) & self.allowed)
        ]
        if refused:
            raise CheckpointError(self.refusal(refused))
        return msgspec.structs.replace(self, differences=tuple(found))

    @property
    def changed(self) -> frozenset[str]:
        """The keys that differ."""
        return frozenset(difference.key for difference in self.differences)

    @property
    def samples_anew(self) -> bool:
        """Whether groups that are under way are not those that the run would sample and score now."""
        return any(_SAMPLED.fullmatch(d.key) for d in self.differences if d.rule == "by name")

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
        told = [f"{difference}, as allowed" for difference in self.differences if difference.rule == "by name"]
        if total_steps != before:
            scheduler = self.stored.learner.lr_scheduler
            counted = (
                "" if scheduler == "constant" else f"; the {scheduler} learning rate counts the new number from here"
            )
            told.append(f"the run now has {total_steps} steps, {before} before{counted}")
        return told

    def superseding(self, made: Sequence[Change], step: int, rewards: Mapping[str, str | None]) -> tuple[Change, ...]:
        """Values that are asked for now in place of those that were set while the run played.

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

    def _flags(self, difference: Difference) -> set[str]:
        """The keys that allow a difference."""
        return {self._flag(difference)} | ({MACHINE} if difference in self.machine else set())

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
    if stored.schedule.learner_streams is None:  # of a Troupe without streams, on which products are rounded otherwise
        stored = with_value(stored, "schedule.learner_streams", 1, f"{file}")
    return stored


def _newest_made(folder: Path) -> Made:
    """How the steps up to the newest checkpoint were made; whether it is whole is seen when it is loaded."""
    return next((read_made(checkpoint) for checkpoint in list_checkpoints(folder)), Made())


def _made_with(folder: Path, stored: RunConfig, newest: Made) -> RunConfig:
    """What those steps were made with, where somebody has edited `run.toml`, which is to ask for something. What a run
    wrote there itself counts: an earlier start was allowed to change something."""
    if not newest.config or is_as_written(folder / RUN_TOML):
        return stored
    try:
        return load_config(None, [newest.config])
    except ConfigError:
        return stored


def _other_machine(newest: Made, machine: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key=f"{MACHINE}.{name}", old=newest.machine[name], new=now)
        for name, now in machine.items()
        if newest.machine.get(name, now) != now
    )


_OF_AN_OLDER_TROUPE = (
    "the run was begun by an older Troupe; it goes on to the same bits but where something is computed otherwise now: "
    "prompts of more than 2,048 tokens, rewards of a group that hardly differ, scores that a fault took, and prompts "
    "that were read wrongly (CHANGELOG.md)"
)


def newest_checkpoint(
    folder: Path, resumption: Resumption | None, config: RunConfig, identity: Identity, policy: Policy
) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint, its weights in the types of `policy`, and what the user should know.

    `policy`: the model that the run begins with. CheckpointError where the checkpoint is of another run.
    """
    notices = []
    allowed = frozenset() if resumption is None else resumption.allowed
    for found in load_newest(folder):
        if isinstance(found, CheckpointError):
            notices.append(f"{found}; trying the one before")
            continue
        _check_same_run(folder, found.state, config, identity, policy.path)
        _check_same_policy(folder, found, policy, config)
        if "rewards.functions" not in allowed:
            _check_rewards(folder, found.state, identity.rewards)
        if resumption is not None and resumption.samples_anew:
            notices.append("groups that were sampled and not trained on yet are sampled once more")
            found = msgspec.structs.replace(found, unfinished=_begun_anew(found.unfinished))
        if found.state.format < FORMAT:
            notices.append(_OF_AN_OLDER_TROUPE)
        return _held(found, policy), [*notices, f"going on after step {found.state.version}"]
    if resumption is not None and (elsewhere := [d for d in resumption.differences if d.key in _SETTLED_BY_CONTENTS]):
        raise CheckpointError(resumption.refusal(elsewhere))
    return None, [*notices, f"{folder}: no whole checkpoint yet, so the run starts from the beginning"]


def as_begun(policy: Policy, checkpoint: Checkpoint) -> Policy:
    """The policy that the run began with, as it took it to be: which ids end a text, and whether it has a head of its
    own. Older Troupes passed over a head beside tie_word_embeddings: true, and such a run goes on without it."""
    stop_ids = checkpoint.state.stop_ids
    eos_ids = policy.eos_ids_by_one_file if stop_ids is None else frozenset(stop_ids)
    config, weights = policy.config, policy.weights
    if checkpoint.config.tie_word_embeddings and not config.tie_word_embeddings:
        config = msgspec.structs.replace(config, tie_word_embeddings=True)
        weights = {name: weights[name] for name in expected_shapes(config)}
    return policy.having(weights, config=config, eos_ids=eos_ids)


def reinstated(
    rewards: RewardManager, standing: Mapping[str, RewardState], made: Sequence[Change], step: int
) -> list[str]:
    """Give the rewards that were exchanged up to a step their places again; what the user should know.

    `standing`: by the checkpoint; without one, the changes `made` say it. RewardError where one cannot be used now.
    """
    told = []
    for name in rewards.names:
        there = standing.get(name)
        before = [(first, spec) for first, spec in in_force(made, f"rewards.{name}") if first <= step]
        if there is None:
            there = RewardState(version=len(before), spec=before[-1][1] if before else None)
        elif before and before[-1][0] == step and before[-1][1] != there.spec:  # asked for when the checkpoint was cut
            there = RewardState(version=there.version + 1, spec=before[-1][1])
        if there.version and there.spec is not None:
            rewards.reinstate(name, there.spec, there.version)
            told.append(f"reward {name}: {there.spec}, for which it was exchanged")
        elif there.version:
            told.append(
                f"reward {name} was exchanged for one given in Python, which only you have: the one that the run began "
                "with is used unless you exchange it again"
            )
    return told


def _check_same_run(folder: Path, state: RunState, config: RunConfig, identity: Identity, source: Path | None) -> None:
    if state.dataset != identity.dataset:
        raise CheckpointError(
            f"{folder}: the run was made with other prompts than those now in {config.data.path}; "
            "restore the dataset, or start a new run in another folder"
        )
    if state.model not in ("", identity.model):
        raise CheckpointError(
            f"{folder}: the run began with another model than the one now in {source}, whose configuration, tokenizer "
            "or weights differ; restore the model, or start a new run in another folder"
        )
    if state.format == 1 and config.schedule.mode == "free":
        raise CheckpointError(
            f"{folder}: the checkpoint of step {state.version} is of a Troupe that kept nothing of groups under way, "
            "so that a free run cannot go on from it; start a new run in another folder, with this checkpoint as "
            "model.path"
        )
    if state.mode != config.schedule.mode:
        raise CheckpointError(
            f"{folder}: the run's schedule is {state.mode!r}, not {config.schedule.mode!r}, which would leave prompts "
            "out; resume with the schedule.mode that it began with"
        )
    if state.seed != config.seed:
        raise CheckpointError(f"{folder}: the run has seed {state.seed}, not {config.seed}; leave --seed out to resume")


def _check_same_policy(folder: Path, found: Checkpoint, policy: Policy, config: RunConfig) -> None:
    if expected_shapes(found.config) != expected_shapes(as_begun(policy, found).config):
        raise CheckpointError(
            f"{folder}: the run trains a model of other shapes than the one in {policy.path}; "
            "resume with the model it began with (model.path), or start a new run in another folder"
        )
    step = found.state.version
    staleness = config.schedule.max_staleness if config.schedule.mode == "pinned" else 0
    if missing := set(range(max(0, step - staleness), step)) - found.behind.keys():
        raise CheckpointError(
            f"{folder}: schedule.max_staleness is {staleness}, so step {step} needs policy version "
            f"{', '.join(map(str, sorted(missing)))}, which the checkpoint does not hold; resume with the "
            "max_staleness that the run began with"
        )


def _check_rewards(folder: Path, state: RunState, rewards: Sequence[str]) -> None:
    """Rewards given in Python stand in no config, so that their names are all that can be compared."""
    if state.rewards and set(state.rewards) != set(rewards):
        raise CheckpointError(
            f"{folder}: the run was made with the rewards {', '.join(state.rewards)}, and is resumed with "
            f"{', '.join(rewards)}; give the same ones, or allow others by --allow-change rewards.functions"
        )


def _begun_anew(unfinished: Unfinished) -> Unfinished:
    """What was begun stays begun, but nothing is kept of what came of it."""
    return msgspec.structs.replace(unfinished, scored=(), collected=(), states={}, replaced=())


def _held(found: Checkpoint, policy: Policy) -> Checkpoint:
    def like(stored: Weights) -> Weights:
        """In the types that the run holds its policy in, which a checkpoint file need not give back."""
        weights = {name: array.astype(policy.weights[name].dtype) for name, array in stored.items()}
        mx.eval(list(weights.values()))
        return weights

    return msgspec.structs.replace(
        found,
        weights=like(found.weights),
        behind={version: like(weights) for version, weights in found.behind.items()},
        reference=None if found.reference is None else like(found.reference),
    )
