"""A row that was completed and scored, as evaluations tell of it."""

from troupe.messages import EvaluatedRow, EvaluatedSample, RolloutGroup
from troupe.records.conversations import sampled_tokens
from troupe.rewards import GroupScores


def evaluated_row(group: RolloutGroup, result: GroupScores | None) -> EvaluatedRow:
    """`result`: None where nothing could score it."""
    samples = tuple(
        EvaluatedSample(
            text=rollout.text,
            tokens=sampled_tokens(rollout),
            finish_reason=rollout.finish_reason,
            score=None if result is None else result.rewards[i],
            scores={} if result is None else {name: column[i] for name, column in result.scores.items()},
        )
        for i, rollout in enumerate(group.rollouts)
    )
    return EvaluatedRow(row=group.prompt.row, prompt=group.prompt.prompt, columns=group.prompt.columns, samples=samples)
