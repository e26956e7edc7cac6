"""Rows that take a turn together, behind what they hold of earlier turns.

Where all of them are new and as many follow each prompt, prompts are read and lie once, as in any decode. Else each
row lies in a slot of its own, with all that it follows as its prompt. What a row holds when its turn has ended is all
its tokens but the last, which is read with what comes behind it; in a network with gated delta nets, whose states
cannot go back, the last, too, where the device had read it when the row ended.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.decode.cache import join_prompts, prefill_chunks
from troupe.policy.decode.histories import Departure, read_on, reading_portions, split
from troupe.policy.decode.loop import Batch, CurrentWeights, DecodeSetup
from troupe.policy.decode.prompts import ReadPrompts, read_prompts
from troupe.policy.decode.requests import CompletedTurn, TurnRequest
from troupe.policy.decode.rows import Row
from troupe.policy.decode.shelf import HeldRow, Shelf
from troupe.policy.decode.states import joined
from troupe.policy.network.delta import DeltaState
from troupe.policy.network.tensors import Weights


@dataclass
class Turn:
    """A turn under way."""

    request: TurnRequest
    held: HeldRow
    """What is to be read is at its end."""
    row: Row
    before: int = 0
    """Bytes of recorded experts that belong to earlier turns."""
    read: int | None = None
    """Bytes of recorded experts when all was read; None before that."""

    def completed(self) -> CompletedTurn:
        """What it came to, when it has ended."""
        made, experts = self.row.completion(), self.held.experts
        return CompletedTurn(
            row=self.request.row,
            token_ids=made.token_ids,
            log_probs=made.log_probs,
            sampling_log_probs=made.sampling_log_probs,
            versions=made.versions,
            finish_reason=made.finish_reason,
            experts=bytes(experts[self.read :]) + made.experts,
            read_experts=bytes(experts[self.before : self.read]),
        )


class _Ended(NamedTuple):
    """Rows whose turns have ended at the same token, and which still lie in the batch."""

    rows: list[Row]
    places: list[int]
    """In the batch."""
    own: list[int]
    """How many of their own tokens they hold."""
    states: list[DeltaState]
    """Theirs, layer by layer."""


class _Part(NamedTuple):
    """What was read together, and which turns follow each prompt of it."""

    read: ReadPrompts
    turns: Sequence[Sequence[int]]


class TurnBatch(Batch):
    """Turns that are decoded together, in their order."""

    def __init__(
        self, setup: DecodeSetup, turns: Sequence[Turn], shelf: Shelf, current_weights: CurrentWeights
    ) -> None:
        """`shelf`: has the histories of rows that go on, and gets them."""
        self._turns, self._shelf = turns, shelf
        lengths = shelf.lengths()
        self._kept = [lengths.get(turn.request.row, 0) for turn in turns]
        self._groups = prompt_groups(turns, self._kept)
        self._is_shared = max(self._kept) == 0 and len(set(map(len, self._groups))) == 1
        slots = self._groups if self._is_shared else [[place] for place in range(len(turns))]
        for number, slot in enumerate(slots):
            for place in slot:
                turns[place].row.request = number
        super().__init__(setup, [[turns[place].row for place in slot] for slot in slots], current_weights)
        self._recent = self._last_ids([turns[slot[0]].held.ids for slot in slots])
        self._turn_of = {id(turn.row): turn for turn in turns}
        self._waiting = list(turns)
        self._at_end: list[_Ended] = []
        self.tokens_read = 0
        """Tokens that were read before sampling, padding not counted."""

    def pop_completed(self) -> list[CompletedTurn]:
        """The turns that ended since the last call, in their order."""
        ended = [turn for turn in self._waiting if turn.row.finish_reason]
        self._waiting = [turn for turn in self._waiting if not turn.row.finish_reason]
        return [turn.completed() for turn in ended]

    def finish(self) -> None:
        """Put the histories of all rows on the shelf, also of those that have not ended; the batch is used up."""
        self.drain()
        told = {id(row) for ended in self._at_end for row in ended.rows}
        if left := [row for row in dict.fromkeys(self._rows) if id(row) not in told]:
            self._ended(left)
        cache, departure = self._cache, self._departure()
        if cache is not None and departure is not None:
            for layer in range(cache.layers):
                departure.take(layer)
                cache.empty(layer)
        self._cache = None

    def _prefill(self) -> mx.array:
        parts = [*self._read_prompts(), *self._read_on()]
        owners = [turns for part in parts for turns in part.turns]
        for part in parts:
            for turns, experts in zip(part.turns, part.read.experts, strict=False):  # none where they are not recorded
                for place in turns:
                    self._turns[place].held.note(experts, self._kept[place])
        for turn in self._turns:
            turn.read = len(turn.held.experts) if turn.read is None else turn.read
        self.tokens_read = sum(len(self._turns[turns[0]].held.ids) - self._kept[turns[0]] for turns in owners)
        hidden = mx.concatenate([part.read.last for part in parts])
        caches = [part.read.cache for part in parts]
        if self._is_shared:
            self._open(join_prompts(caches))
            return hidden
        place_of = {turn: place for place, turns in enumerate(owners) for turn in turns}
        order = [place_of[turn] for turn in range(len(self._turns))]
        self._open(split(caches, [order])[0])
        return hidden[mx.array(order)]

    def _read_prompts(self) -> Iterator[_Part]:
        """Of rows that hold nothing each prompt once."""
        prompts = [self._turns[group[0]].held.ids for group in self._groups]
        config, records = self._setup.config, self._setup.records_experts
        for portion in prefill_chunks([len(ids) for ids in prompts]) if prompts else ():
            together = [prompts[i] for i in portion]
            read = read_prompts(config, self._policy_weights, together, records_experts=records)
            yield _Part(read, [self._groups[i] for i in portion])

    def _read_on(self) -> Iterator[_Part]:
        """Of rows that hold something what is new."""
        turns = [place for place, kept in enumerate(self._kept) if kept]
        if not turns:
            return
        kept, new = [self._kept[place] for place in turns], [self._turns[p].held.ids[self._kept[p] :] for p in turns]
        config, records = self._setup.config, self._setup.records_experts
        portions = reading_portions(kept, [len(ids) for ids in new], config.num_attention_heads)
        held = self._shelf.take([[self._turns[turns[i]].request.row for i in portion] for portion in portions])
        for portion in portions:
            together = [new[i] for i in portion]
            read = read_on(config, self._policy_weights, held.pop(0), together, records_experts=records)
            yield _Part(read, [[turns[i]] for i in portion])

    @property
    def _policy_weights(self) -> Weights:
        return self._current_weights([self._turns[0].request.policy])[0]

    def _ended(self, rows: Sequence[Row]) -> None:
        """Note what they hold while it lies in the batch."""
        assert self._cache is not None
        place_of = {id(row): place for place, row in reversed(list(enumerate(self._rows)))}
        places = [place_of[id(row)] for row in rows]
        own, states = [max(0, row.made - 1) for row in rows], self._cache.states.of(places)
        if states:
            own = [min(row.made, self._cache.length) for row in rows]
            mx.async_eval(*states)  # type: ignore[no-untyped-call]
        self._at_end.append(_Ended(list(rows), places, own, states))

    def _departure(self) -> Departure | None:
        assert self._cache is not None
        places = [place for ended in self._at_end for place in ended.places]
        own = [count for ended in self._at_end for count in ended.own]
        names, chosen = [], []
        for number, row in enumerate(row for ended in self._at_end for row in ended.rows):
            turn = self._turn_of[id(row)]
            turn.held.ids += row.token_ids[row.begun :]
            turn.held.experts += row.take_experts()
            if not turn.request.last or row.finish_reason is None:
                names.append(turn.request.row)
                chosen.append(number)
        index, departure = mx.array(chosen), None
        if names:
            states = [joined(layer).of(index) for layer in zip(*(ended.states for ended in self._at_end), strict=True)]
            departure = Departure(self._cache, [places[i] for i in chosen], [own[i] for i in chosen], states)
            self._shelf.put(names, departure.history)
        self._at_end = []
        return departure


def prompt_groups(turns: Sequence[Turn], kept: Sequence[int]) -> list[list[int]]:
    """Places of turns that begin with the same prompt: neighbours of one request, of which nothing is kept."""
    new = [place for place, length in enumerate(kept) if not length]
    return [
        list(group)
        for _, group in groupby(new, key=lambda place: (turns[place].request.row[:-1], tuple(turns[place].held.ids)))
    ]
