"""Episodes as the generator sees them, in token ids: which samples wait, what is to be decoded next, and the rollouts
that come of it.

Nothing here decodes, asks or waits. Whoever runs them sends the turns that are to be answered, tells what came back,
and decodes the requests; so a run, an evaluation and a test run them in the same way.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from troupe.actors.generator.parts import key_of
from troupe.messages import FinishReason, Observation, Prompt, Rollout, RolloutGroup, RowStart, TurnTaken
from troupe.policy import CompletedTurn, TurnRequest


class EpisodeLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many episodes a prompt has, and how long they may get."""

    num_generations: int
    max_completion_length: int
    """Most tokens of a row behind its prompt, observations included."""
    context: int
    """Most tokens of a row, its prompt included."""
    max_turns: int | None = None
    """Most turns of an episode; None: no limit."""

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that a row may have behind this prompt."""
        return min(self.max_completion_length, self.context - len(prompt_ids))


class _Sample:
    """One episode so far."""

    def __init__(self, prompt: Prompt, number: int, row: tuple[int, ...], room: int) -> None:
        self.prompt, self.number, self.row = prompt, number, row
        self.state: Literal["waiting", "ready", "decoding", "ended"] = "waiting"
        self.turn = 0
        """Which was asked about last."""
        self.read: tuple[int, ...] = prompt.prompt_ids
        """Ids to be read before the next turn is sampled."""
        self.fresh = True
        self.end = room
        """Number of tokens at which the row is full."""
        self.token_ids: list[int] = []
        self.log_probs: list[float] = []
        self.sampling_log_probs: list[float] = []
        self.versions: list[int] = []
        self.experts: list[bytes] = []
        self.prompt_experts = b""
        """Of the group's prompt, where the first row follows it."""
        self.observed: list[tuple[int, int]] = []
        self.rows: list[RowStart] = []
        self.finish_reason: FinishReason = "aborted"

    @property
    def room(self) -> int:
        return self.end - len(self.token_ids)

    def begin_row(self, prompt_ids: tuple[int, ...], room: int) -> None:
        """What comes follows another prompt."""
        self.rows.append(RowStart(start=len(self.token_ids), prompt_ids=prompt_ids))
        self.read, self.fresh = prompt_ids, True
        self.end = len(self.token_ids) + room

    def observe(self, ids: tuple[int, ...]) -> None:
        """The row goes on behind these, which nobody has sampled."""
        self.read = (*self.read, *ids) if self.fresh else ids
        if ids:
            start = len(self.token_ids)
            self.observed.append((start, start + len(ids)))
            self.token_ids += ids
            self.log_probs += [0.0] * len(ids)
            self.sampling_log_probs += [0.0] * len(ids)

    def add(self, turn: CompletedTurn) -> TurnTaken:
        """Take what was sampled; what is to be asked about it."""
        start = len(self.token_ids)
        read_by = turn.versions[0] if turn.versions else 0
        self.versions += [read_by] * (start - len(self.versions))
        self.token_ids += turn.token_ids
        self.log_probs += turn.log_probs
        self.sampling_log_probs += turn.sampling_log_probs
        self.versions += turn.versions
        self._keep_experts(turn)
        self.finish_reason = turn.finish_reason
        self.state, self.fresh = "waiting", False
        self.turn += 1
        return self.taken(turn.token_ids, start)

    def _keep_experts(self, turn: CompletedTurn) -> None:
        if self.fresh and not self.rows:
            self.prompt_experts = turn.read_experts
        elif self.fresh:
            self.rows[-1] = begun = msgspec.structs.replace(self.rows[-1], prompt_experts=turn.read_experts)
            each = len(turn.read_experts) // len(begun.prompt_ids)
            self.experts.append(bytes(each if begun.start else 0))
        else:
            self.experts.append(turn.read_experts)
        self.experts.append(turn.experts)

    def taken(self, token_ids: tuple[int, ...], start: int) -> TurnTaken:
        return TurnTaken(
            prompt=self.prompt,
            sample=self.number,
            turn=self.turn,
            token_ids=token_ids,
            finish_reason=self.finish_reason if self.turn else "stop",
            start=start,
            room=self.room,
        )

    def rollout(self, decode_text: Callable[[Sequence[int]], str]) -> Rollout:
        return Rollout(
            token_ids=tuple(self.token_ids),
            log_probs=tuple(self.log_probs),
            sampling_log_probs=tuple(self.sampling_log_probs),
            versions=tuple(self.versions),
            finish_reason=self.finish_reason,
            text=decode_text(self.token_ids),
            experts=b"".join(self.experts),
            observed=tuple(self.observed),
            rows=tuple(self.rows),
        )


class Episodes:
    """All samples of some prompts, in slot order.

    An episode begins with its opening, turn 0, in which nothing is sampled. Each turn is then sampled, asked about and
    answered; what leaves no room for another turn ends the episode. A group is finished when its last sample has ended.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        limits: EpisodeLimits,
        *,
        seed: int,
        decode_text: Callable[[Sequence[int]], str],
    ) -> None:
        self.prompts = tuple(prompts)
        self._limits, self._decode_text = limits, decode_text
        self._samples = {
            prompt.gid: [
                _Sample(prompt, number, (*key_of(seed, prompt.slot), number), limits.room(prompt.prompt_ids))
                for number in range(limits.num_generations)
            ]
            for prompt in self.prompts
        }
        self._by_row = {sample.row: sample for samples in self._samples.values() for sample in samples}
        self._finished: deque[RolloutGroup] = deque()

    @property
    def openings(self) -> list[TurnTaken]:
        """What is asked first of all: turn 0 of every sample."""
        return [sample.taken((), 0) for sample in self._by_row.values()]

    @property
    def waiting(self) -> bool:
        """Whether an answer is still to come to something that was asked."""
        return any(sample.state == "waiting" for sample in self._by_row.values())

    @property
    def ready(self) -> bool:
        """Whether there is something to decode."""
        return any(sample.state == "ready" for sample in self._by_row.values())

    @property
    def ended(self) -> bool:
        """Whether no sample goes on."""
        return all(sample.state == "ended" for sample in self._by_row.values())

    def observe(self, observation: Observation) -> tuple[int, ...] | None:
        """Take an answer. The name of the row that was decoded and has ended by it, if one has; an answer that nobody
        waits for any more changes nothing."""
        samples = self._samples[observation.gid]
        sample = samples[observation.sample]
        if sample.state != "waiting" or sample.turn != observation.turn:
            return None
        begins = observation.prompt_ids
        room = sample.room if begins is None else self._limits.room(begins)
        if not observation.done and len(observation.ids) < room:
            if begins is not None:
                sample.begin_row(begins, room)
            sample.observe(observation.ids)
            sample.state = "ready"
            return None
        sample.state = "ended"
        if all(each.state == "ended" for each in samples):
            rollouts = tuple(each.rollout(self._decode_text) for each in samples)
            read = next((each.prompt_experts for each in samples if each.prompt_experts), b"")
            self._finished.append(RolloutGroup(prompt=sample.prompt, rollouts=rollouts, prompt_experts=read))
        return sample.row if sample.turn else None

    def requests(self) -> list[TurnRequest]:
        """What is to be decoded now, in slot order: all that is ready, which is under way from then on."""
        requests = []
        for sample in self._by_row.values():
            if sample.state == "ready":
                sample.state = "decoding"
                requests.append(
                    TurnRequest(
                        row=sample.row,
                        ids=sample.read,
                        start=len(sample.token_ids),
                        room=sample.room,
                        fresh=sample.fresh,
                        last=sample.turn + 1 == self._limits.max_turns,
                    )
                )
        return requests

    def add(self, turn: CompletedTurn) -> TurnTaken:
        """Take what was sampled in a turn; what is to be asked about it."""
        return self._by_row[turn.row].add(turn)

    def pop_finished(self) -> list[RolloutGroup]:
        """The groups whose last sample has ended since the last call, without what became of them outside."""
        return [self._finished.popleft() for _ in range(len(self._finished))]
