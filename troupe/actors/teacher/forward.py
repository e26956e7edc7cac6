"""The teacher's log-probs of a group: functions of the group and of the teacher's weights alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from troupe.actors.learner.rows import Row, rows_of
from troupe.messages import RolloutGroup
from troupe.policy import Base, NetworkConfig, Weights, completion_statistics

MOST_PLACES = 2**14
"""Places, prompts and padding included, that the rows of a piece are laid out in; one row may take more."""


@dataclass(frozen=True)
class TeacherForward:
    """A network that says how likely it finds completions, under softmax(logits / temperature)."""

    config: NetworkConfig
    weights: Weights
    base: Base
    """What the weights complete; empty: they are the whole network."""
    temperature: float
    most_places: int = MOST_PLACES

    def taught(self, group: RolloutGroup) -> RolloutGroup:
        """The group with `teacher_log_probs` in each of its rollouts."""
        network = self.base.completed(self.config, self.weights)
        found = [list(rollout.log_probs) for rollout in group.rollouts]
        rows = [(row, known) for row in rows_of([group]) if (known := self._known(row))]
        for piece in _pieces(rows, self.most_places):
            log_probs, _ = completion_statistics(
                self.config,
                network,
                [row.prompt_ids for row, _ in piece],
                [known for _, known in piece],
                self.temperature,
            )
            values: list[list[float]] = log_probs.tolist()  # type: ignore[assignment]
            for (row, known), numbers in zip(piece, values, strict=True):
                own = found[row.sample]
                for place in range(len(known)):
                    if row.sampled[place]:
                        own[row.start + place] = numbers[place]
        return with_log_probs(group, [tuple(own) for own in found])

    def _known(self, row: Row) -> tuple[int, ...]:
        """The tokens of a row up to the first that the teacher has no id for; none where the prompt has such a one."""
        if any(id_ >= self.config.vocab_size for id_ in row.prompt_ids):
            return ()
        ids = row.token_ids
        first = next((place for place, id_ in enumerate(ids) if id_ >= self.config.vocab_size), len(ids))
        return ids[:first]


@dataclass(frozen=True)
class Teachers:
    """Several of them, by the name that a row has in a column; "" is for rows that name none."""

    by_name: Mapping[str, TeacherForward]
    column: str

    def taught(self, group: RolloutGroup) -> RolloutGroup:
        """The group with `teacher_log_probs` of its own teacher."""
        return self.by_name[named_in(group.prompt.columns, self.column)].taught(group)


def named_in(columns: Mapping[str, Any], column: str) -> str:
    """The teacher that a row names; "" where it names none."""
    name = columns.get(column)
    return "" if name is None else str(name)


def with_log_probs(group: RolloutGroup, log_probs: Sequence[tuple[float, ...]]) -> RolloutGroup:
    """The group with these of the teacher, one tuple a sample."""
    replace = msgspec.structs.replace
    rollouts = tuple(
        replace(rollout, teacher_log_probs=own) for rollout, own in zip(group.rollouts, log_probs, strict=True)
    )
    return replace(group, rollouts=rollouts)


def is_taught(group: RolloutGroup) -> bool:
    """Whether the teacher has been asked about a group."""
    return all(len(rollout.teacher_log_probs) == len(rollout.token_ids) for rollout in group.rollouts)


def _pieces(rows: Sequence[tuple[Row, tuple[int, ...]]], most: int) -> Iterator[list[tuple[Row, tuple[int, ...]]]]:
    """Neighbouring rows that are computed together: as many as `most` places have room for, each as long as the longest
    prompt and the longest completion of them, at least one."""
    piece: list[tuple[Row, tuple[int, ...]]] = []
    prompt = completion = 0
    for row, known in rows:
        grown = max(prompt, len(row.prompt_ids)), max(completion, len(known))
        if piece and (len(piece) + 1) * sum(grown) > most:
            yield piece
            piece, grown = [], (len(row.prompt_ids), len(known))
        piece.append((row, known))
        prompt, completion = grown
    if piece:
        yield piece
