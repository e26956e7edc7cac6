"""Held-out rows of supervised steps: their loss, and in which part of their tokens the policy is right."""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from troupe.actors.learner.batch import CompletionLogProbs, assemble_given
from troupe.actors.supervised import Example
from troupe.grpo.tallies import tally
from troupe.messages import Prompt, Slot
from troupe.policy import MicroBatch, Weights

MOST_PLACES = 2**13
"""Places, padding included, that the rows of a piece are laid out in; one row may take more."""


class HeldOutRows:
    """Rows that are measured and not learned, in pieces that depend on nothing but the rows."""

    def __init__(
        self, examples: Sequence[Example], *, every: int | None, pad_id: int, most_places: int = MOST_PLACES
    ) -> None:
        """`every`: steps between measurements; None: there is one alone, after the last."""
        self._every, self._pad_id = every, pad_id
        self._pieces = list(_pieces(examples, most_places))

    def is_due(self, step: int, last: int) -> bool:
        """Whether they are measured after a step, from 1; `last`: of the supervised ones."""
        return step == last or (self._every is not None and step % self._every == 0)

    def measure(self, weights: Weights, policy: CompletionLogProbs) -> dict[str, float]:
        """`eval_loss`, the mean of −log π over all tokens that would be learned, in nats, at temperature 1, and
        `eval_mean_token_accuracy`, the part of them that no other token is likelier than (TRL's names)."""
        losses, right, counts = list[float](), list[float](), list[float]()
        for piece in self._pieces:
            groups = [example.group(_prompt(number, example)) for number, example in enumerate(piece)]
            batch = assemble_given(groups, pad_id=self._pad_id).batch
            log_probs, margins = policy.with_margins(weights, batch)
            mask = batch.completion_mask
            tallies = mx.stack([tally(-log_probs, mask), tally(margins >= 0.0, mask)])
            sums: list[list[float]] = tallies.tolist()  # type: ignore[assignment]
            losses.append(sums[0][0])
            right.append(sums[1][0])
            counts.append(sums[0][1])
        tokens = math.fsum(counts)
        return {"eval_loss": math.fsum(losses) / tokens, "eval_mean_token_accuracy": math.fsum(right) / tokens}


def largest_pieces(examples: Sequence[Example]) -> tuple[MicroBatch, ...]:
    """Those that take most memory: with most places, with most tokens after prompts, with the longest row."""
    sizes = {_size_of(piece) for piece in _pieces(examples, MOST_PLACES)}
    if not sizes:
        return ()
    measures: list[Callable[[MicroBatch], int]] = [
        lambda size: size.rows * (size.prompt_length + size.completion_length),
        lambda size: size.rows * size.completion_length,
        lambda size: size.prompt_length + size.completion_length,
    ]
    return tuple(dict.fromkeys(max(sizes, key=measure) for measure in measures))


def _size_of(piece: Sequence[Example]) -> MicroBatch:
    """Rows as long as the longest of a piece, with as much after their prompts as the longest has."""
    rows = sum(1 + len(example.rows) for example in piece)
    completion = max(max(1, example.longest_completion) for example in piece)
    prompt = max(1, max(example.longest_row for example in piece) - completion)
    return MicroBatch(prompts=rows, prompt_length=prompt, rows=rows, completion_length=completion)


def _prompt(number: int, example: Example) -> Prompt:
    return Prompt(
        gid=number,
        slot=Slot(step=0, place=number),
        epoch=0,
        row=number,
        prompt="",
        prompt_ids=example.prompt_ids,
        columns={},
    )


def _pieces(examples: Sequence[Example], most_places: int) -> Iterator[list[Example]]:
    """Neighbours, as many as there is room for where each takes as much as the longest of them."""
    piece: list[Example] = []
    rows = longest = 0
    for example in examples:
        own, grown = 1 + len(example.rows), max(longest, example.longest_row)
        if piece and (rows + own) * grown > most_places:
            yield piece
            piece, rows, grown = [], 0, example.longest_row
        piece.append(example)
        rows, longest = rows + own, grown
    if piece:
        yield piece
