"""Messages that a sink gets, made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from tests.support.fakes import make_rollout
from troupe.messages import (
    NOT_STARTED,
    Evaluated,
    EvaluatedRow,
    EvaluatedSample,
    GroupClosed,
    Phase,
    Prompt,
    PromptText,
    RolloutGroup,
    ScoredGroup,
    Slot,
    Status,
    Update,
)
from troupe.records.sinks.base import Sink


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def feed(sink: Sink, *messages: object) -> None:
    """All that a sink gets in a run of these messages."""
    sink.open()
    for message in messages:
        sink.write(message)
    sink.flush()
    sink.close()


def update(step: int, told: Mapping[str, float] | None = None, *, total_steps: int = 4, **metrics: float) -> Update:
    """The end of a step."""
    return Update(step=step, version=step, total_steps=total_steps, metrics={**(told or {}), **metrics})


def closed(
    step: int,
    *,
    texts: Sequence[str] = ("46", "45"),
    rewards: Sequence[float | None] = (1.0, 0.5, 0.0),
    prompt: PromptText = "12+34=",
    place: int = 0,
) -> GroupClosed:
    """A group that ended with step `step`; its n-th completion has n tokens, and the n-th of the rewards."""
    slot = Slot(step=step - 1, place=place)
    rollouts = tuple(make_rollout((7,) * n, log_probs=(0.0,) * n, text=text) for n, text in enumerate(texts, 1))
    asked = Prompt(gid=step, slot=slot, epoch=0, row=0, prompt=prompt, prompt_ids=(1,), columns={})
    told = tuple(rewards[: len(texts)])
    scored = ScoredGroup(group=RolloutGroup(prompt=asked, rollouts=rollouts), scores={"exact": told})
    return GroupClosed(gid=step, slot=slot, state="trained", version=step, scored=scored, rewards=told)


def status(phase: Phase = "running", **fields: object) -> Status:
    """What a run is doing."""
    return msgspec.structs.replace(NOT_STARTED, phase=phase, **fields)


def evaluated(version: int, value: float = 0.5, name: str = "held_out") -> Evaluated:
    """A version was evaluated on a set of two rows with a sample each."""
    rows = tuple(
        EvaluatedRow(
            row=row,
            prompt=f"{row}+1=",
            columns={"answer": str(row + 1)},
            samples=(
                EvaluatedSample(text="1", tokens=1, finish_reason="stop", score=1.0 - row, scores={"exact": 1.0 - row}),
            ),
        )
        for row in range(2)
    )
    metrics = {f"eval/{name}/avg@1": value, f"eval/{name}/avg@1_se": 0.1}
    return Evaluated(version=version, name=name, metrics=metrics, rows=rows, seconds=2.0)
