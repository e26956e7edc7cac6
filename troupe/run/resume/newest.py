"""From which checkpoint a run goes on, whether it is of this very run, and which rewards have their places in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.checkpoint import FORMAT, Checkpoint, RewardState, RunState, load_newest
from troupe.errors import CheckpointError
from troupe.messages import Unfinished
from troupe.policy import Policy, Weights, expected_shapes
from troupe.records.standing import Change
from troupe.rewards import RewardManager
from troupe.run.config import RunConfig
from troupe.run.resume.changes import in_force
from troupe.run.resume.check import SETTLED_BY_CONTENTS, Resumption

_OF_AN_OLDER_TROUPE = (
    "the run was begun by an older Troupe; it goes on to the same bits but where something is computed otherwise now: "
    "prompts of more than 2,048 tokens, rewards of a group that hardly differ, scores that a fault took, and prompts "
    "that were read wrongly (CHANGELOG.md)"
)


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a run this run and no other, besides its config."""

    dataset: str
    """Fingerprint of the prompts."""
    model: str
    """Fingerprint of the folder of the model that it begins with."""
    rewards: tuple[str, ...]
    """Their names."""


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
    if resumption is not None and (elsewhere := [d for d in resumption.differences if d.key in SETTLED_BY_CONTENTS]):
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
