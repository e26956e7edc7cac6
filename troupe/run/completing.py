"""Completions of rows without actors, by the same engine as in a run."""

from collections.abc import Iterable, Sequence

from troupe.actors.learner.batch import as_rollouts
from troupe.dataset import PromptDataset
from troupe.messages import Prompt, RolloutGroup, Slot
from troupe.policy import CompletedGroup, GenerationConfig, Policy, RolloutRequest, opened_thought
from troupe.run.status import Progress
from troupe.runtime.device import DeviceThread


async def complete(
    policy: Policy,
    dataset: PromptDataset,
    prompt_ids: Sequence[tuple[int, ...]],
    places: range,
    generation: GenerationConfig,
    device: DeviceThread,
    key: tuple[int, int],
    progress: Progress | None = None,
) -> list[RolloutGroup]:
    """Complete the rows at `places` together, as places of one step; `key` is (seed, step).

    A cancelled caller waits for one token, not for the longest completion.
    """
    seed, step = key
    engine = policy.engine(generation)
    requests = [RolloutRequest(prompt_ids=prompt_ids[i], key=(seed, step, i, 0)) for i in places]
    decoding = await device.run(engine.decode, requests)
    completed = await device.run(_in_order, decoding, progress, on_cancel=engine.abort)
    groups = []
    for place, group in zip(places, completed, strict=True):
        prompt = prompt_of(policy, dataset, prompt_ids, place, place, step)
        rollouts = as_rollouts(group, policy.tokenizer.decode_sampled)
        groups.append(RolloutGroup(prompt=prompt, rollouts=rollouts))
    return groups


def prompt_of(
    policy: Policy, dataset: PromptDataset, prompt_ids: Sequence[tuple[int, ...]], place: int, gid: int, step: int = 0
) -> Prompt:
    row = dataset[place]
    return Prompt(
        gid=gid,
        slot=Slot(step=step, place=place),
        epoch=0,
        row=place,
        prompt=row.prompt,
        prompt_ids=prompt_ids[place],
        columns=row.columns,
        opened=opened_thought(policy.tokenizer, row.prompt, prompt_ids[place]),
    )


def _in_order(groups: Iterable[CompletedGroup], progress: Progress | None) -> list[CompletedGroup]:
    """All of them, counted as they come."""
    completed = []
    for group in groups:
        completed.append(group)
        if progress is not None:
            progress.done += len(group.completions)
    return sorted(completed, key=lambda group: group.index)
