"""From which checkpoint a run goes on, whether it is of this very run, which rewards have their places in it, and what
is done with the groups that were under way.

A checkpoint keeps of a group what cannot be had again: completions and scores. Prompts are made anew from slot and row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import msgspec

from troupe.actors.schedule import PromptSchedule
from troupe.checkpoint import FORMAT, Checkpoint, RewardState, RunState, load_newest
from troupe.errors import CheckpointError
from troupe.messages import OpenGroup, Prompt, ScoredGroup, Slot, Unfinished
from troupe.policy import Policy, Weights, expected_shapes
from troupe.records.standing import Change
from troupe.rewards import RewardManager
from troupe.run.config import RunConfig
from troupe.run.resume.changes import in_force
from troupe.run.resume.check import Resumption

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
    teacher: str = ""
    """Fingerprint of who teaches; empty where nobody does."""


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
        _check_same_run(folder, found, config, identity, policy.path)
        _check_same_policy(folder, found, policy, config)
        if "rewards.functions" not in allowed:
            _check_rewards(folder, found.state, identity.rewards)
        is_taught_otherwise = _has_other_teacher(folder, found.made.teacher, identity.teacher, resumption)
        if is_taught_otherwise or (resumption is not None and resumption.samples_anew):
            notices.append("groups that were sampled and not trained on yet are sampled once more")
            # what was begun stays begun, but nothing is kept of what came of it
            bare = msgspec.structs.replace(found.unfinished, scored=(), collected=(), states={}, replaced=())
            found = msgspec.structs.replace(found, unfinished=bare)
        if found.state.format < FORMAT:
            notices.append(_OF_AN_OLDER_TROUPE)
        return _held(found, policy), [*notices, f"going on after step {found.state.version}"]
    differences = () if resumption is None else resumption.differences
    if resumption is not None and (elsewhere := [d for d in differences if resumption.hangs_on_contents(d)]):
        raise CheckpointError(resumption.refusal(elsewhere))
    return None, [*notices, f"{folder}: no whole checkpoint yet, so the run starts from the beginning"]


def as_begun(policy: Policy, checkpoint: Checkpoint) -> Policy:
    """The policy that the run began with, as it took it to be: which ids end a text, and whether it has a head of its
    own. Older Troupes passed over a head beside tie_word_embeddings: true, and such a run goes on without it."""
    stop_ids = checkpoint.state.stop_ids
    eos_ids = policy.eos_ids_by_one_file if stop_ids is None else frozenset(stop_ids)
    config, weights = policy.config, policy.weights
    own = checkpoint.config
    if own is not None and own.tie_word_embeddings and not config.tie_word_embeddings:
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


def _check_same_run(
    folder: Path, found: Checkpoint, config: RunConfig, identity: Identity, source: Path | None
) -> None:
    state = found.state
    if state.dataset != identity.dataset:
        raise CheckpointError(
            f"{folder}: the run was made with other prompts than those now in {config.data.path}; "
            "restore the dataset, or start a new run in another folder"
        )
    if state.model not in ("", identity.model):
        began = f"another model than the one now in {source}, whose configuration, tokenizer or weights differ"
        remedy = "restore the model"
        if found.config is None:
            began = f"another base than the one now in {source}, or another adapter than adapter.resume_from now names"
            remedy = "restore them"
        raise CheckpointError(f"{folder}: the run began with {began}; {remedy}, or start a new run in another folder")
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
    begun = as_begun(policy, found)
    if {name: array.shape for name, array in found.weights.items()} != shapes_of(begun):
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


def shapes_of(policy: Policy) -> dict[str, tuple[int, ...]]:
    """Of what is trained."""
    return {name: array.shape for name, array in policy.weights.items()}


def _check_rewards(folder: Path, state: RunState, rewards: Sequence[str]) -> None:
    """Rewards given in Python stand in no config, so that their names are all that can be compared."""
    if state.rewards and set(state.rewards) != set(rewards):
        raise CheckpointError(
            f"{folder}: the run was made with the rewards {', '.join(state.rewards)}, and is resumed with "
            f"{', '.join(rewards)}; give the same ones, or allow others by --allow-change rewards.functions"
        )


def _has_other_teacher(folder: Path, before: str, now: str, resumption: Resumption | None) -> bool:
    """Whether another one lies now where the run's teacher was. CheckpointError where that is not allowed."""
    is_moved = resumption is not None and resumption.moves_teacher
    if before == now or not now or not (before or is_moved):  # of one that was not moved nothing else is known
        return False
    allowed = frozenset[str]() if resumption is None else resumption.allowed
    if not {"teacher.path", "teacher.models"} & allowed:
        raise CheckpointError(
            f"{folder}: the run has learned from another teacher than the one named now, whose "
            "configuration, tokenizer or weights differ; restore it, or allow the other by --allow-change teacher.path"
        )
    return True


def _held(found: Checkpoint, policy: Policy) -> Checkpoint:
    def like(stored: Weights) -> Weights:
        """In the types that the run holds its policy in, which a checkpoint file need not give back."""
        weights = {name: stored[name].astype(begun.dtype) for name, begun in policy.weights.items() if name in stored}
        mx.eval(list(weights.values()))
        return weights

    return msgspec.structs.replace(
        found,
        weights=like(found.weights),
        behind={version: like(weights) for version, weights in found.behind.items()},
        reference=None if found.reference is None else like(found.reference),
    )


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """Where prompting goes on, and what need not be done again."""

    next: int
    """Number of the first prompt in the stream that was not begun."""
    open: tuple[OpenGroup, ...] = ()
    """Groups that were begun and have not ended."""
    prompts: tuple[Prompt, ...] = ()
    """Those of the open groups that the learner does not have and will need, in the order in which they are issued."""
    alive: dict[int, Slot] = {}
    """Gid → slot of the open groups that hold a credit."""
    recorded: dict[int, ScoredGroup] = {}
    """Gid → groups that are prompted once more, and need be neither sampled nor scored."""
    collected: Unfinished = Unfinished()
    """Free schedule: what the learner had collected for its next step."""


def restored_pinned(
    unfinished: Unfinished, schedule: PromptSchedule, first_step: int, *, max_staleness: int, whole_rounds: bool
) -> Restored:
    """A pinned run prompts every step from `first_step` on, and what was scored is used where it comes up.

    What other versions have sampled than `max_staleness` now asks for is sampled anew. `whole_rounds`: whether a round
    counts only if all of its groups were scored, because a reward looks at all at once.
    """
    there = (*unfinished.collected, *unfinished.scored)
    groups = [g for g in there if _slot(g).step >= first_step and _is_pinned(g, max_staleness)]
    if whole_rounds:
        sizes = Counter(map(_round, groups))
        groups = [group for group in groups if sizes[_round(group)] == group.group.prompt.round_size]
    return Restored(next=first_step * schedule.batch_size, recorded=_recorded(groups, schedule))


def restored_free(unfinished: Unfinished, schedule: PromptSchedule, *, wanted: int) -> Restored:
    """A free run prompts again what was open, in the order of slots, and then goes on in the stream.

    `wanted`: groups that the steps to come will take. Where fewer steps are asked for than before, that may be less
    than was begun; the rest stays open for who goes on from there.
    Raises CheckpointError where the groups collected are not those of these prompts.
    """
    collected = [_renewed(group, schedule) for group in unfinished.collected]
    if None in collected:
        raise CheckpointError(
            "unfinished.msgpack: a group that was collected has another prompt than the dataset and the tokenizer now "
            "give for its row; restore them"
        )
    there = {_slot(group) for group in unfinished.collected}
    held = [group.slot for group in unfinished.open if group.slot in there][:wanted]
    waiting = [group for group in unfinished.open if group.slot not in there][: wanted - len(held)]
    recorded = _recorded(unfinished.scored, schedule)
    sizes = Counter((g.slot.step, g.slot.attempt) for g in waiting if schedule.gid(g.slot) not in recorded)
    for number in range(unfinished.next, -(-unfinished.next // schedule.batch_size) * schedule.batch_size):
        sizes[number // schedule.batch_size, 0] += 1  # the rest of a step that was begun
    return Restored(
        next=unfinished.next,
        open=unfinished.open,
        prompts=tuple(
            # whoever is scored already does not come to where a round is scored in one call
            schedule.prompt(g.slot, round_size=sizes[g.slot.step, g.slot.attempt] or g.round_size, row=g.row)
            for g in waiting
        ),
        alive={schedule.gid(slot): slot for slot in (*held, *(group.slot for group in waiting))},
        recorded=recorded,
        collected=msgspec.structs.replace(unfinished, collected=tuple(collected)),
    )


def _recorded(groups: Sequence[ScoredGroup], schedule: PromptSchedule) -> dict[int, ScoredGroup]:
    renewed = [_renewed(group, schedule) for group in groups]
    return {group.group.prompt.gid: group for group in renewed if group is not None}


def _renewed(group: ScoredGroup, schedule: PromptSchedule) -> ScoredGroup | None:
    """The group with its whole prompt; None where that has other tokens than it had."""
    before = group.group.prompt
    prompt = schedule.prompt(before.slot, round_size=before.round_size, row=before.row)
    if prompt.prompt_ids != before.prompt_ids:
        return None
    replace = msgspec.structs.replace
    return replace(group, group=replace(group.group, prompt=prompt))


def _slot(group: ScoredGroup) -> Slot:
    return group.group.prompt.slot


def _round(group: ScoredGroup) -> tuple[int, int]:
    return _slot(group).step, _slot(group).attempt


def _is_pinned(group: ScoredGroup, max_staleness: int) -> bool:
    """Whether all of a group is of the version that its step is pinned to."""
    version = max(0, _slot(group).step - max_staleness)
    return all(set(rollout.versions) <= {version} for rollout in group.group.rollouts)
