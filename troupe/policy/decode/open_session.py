"""A session without rounds: turns join a decode that goes on, and leave it when they end.

Turns that join come in at a token position that JOIN_EVERY divides, or at once where nothing is under way. The batch is
then laid anew: what rows under way have said becomes part of what they hold, and what the others bring is read. So
rows are copied once in so many tokens at the most. What is decoded together depends on when turns come; what a row
draws by does not.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from troupe.policy.decode.loaded import LoadedWeights
from troupe.policy.decode.loop import DecodeSetup
from troupe.policy.decode.requests import CompletedTurn, TurnRequest
from troupe.policy.decode.session import Abort, TurnSession
from troupe.policy.decode.turn_batch import Turn, TurnBatch

JOIN_EVERY = 32
"""Turns join a decode under way only at token positions that this divides."""


class OpenSession(TurnSession):
    """Made by `RolloutEngine.open_session`. `join` and `end` may be called from any thread, all else from the one that
    decodes."""

    def __init__(
        self,
        setup: DecodeSetup,
        weights: LoadedWeights,
        aborted: Abort,
        tell: Callable[[int], None],
        limit_bytes: float | None = None,
    ) -> None:
        """As for `TurnSession`."""
        super().__init__(setup, weights, aborted, tell, limit_bytes)
        self._queue: deque[TurnRequest] = deque()
        self._is_ending = False

    def join(self, requests: Sequence[TurnRequest]) -> None:
        """Have these turns decoded, in their order, as soon as there is room. Raises at once what `decode` does for ids
        and numbers that are none; for all else `serve` raises it."""
        for request in requests:
            self._check_request(request)
        with self._aborted.changed:
            self._queue.extend(requests)
            self._aborted.changed.notify_all()

    def end(self) -> None:
        """Let `serve` end when all turns that have joined have ended."""
        with self._aborted.changed:
            self._is_ending = True
            self._aborted.changed.notify_all()

    def serve(self) -> Iterator[list[CompletedTurn]]:
        """Decode what joins; `next` returns the turns that ended at the same token, none when others have come in, and
        waits while there is nothing to do. An abort ends it, and turns that wait are forgotten. Who leaves before the
        end loses the rows under way."""
        if self._is_decoding:
            raise RuntimeError("the decode before has not ended; go through it first, or close it")
        self._aborted.clear()
        self._is_decoding = True
        return self._serve()

    def _serve(self) -> Iterator[list[CompletedTurn]]:
        turns: list[Turn] = []

        def pauses(batch: TurnBatch) -> bool:
            """Whether the batch is to be laid anew before its next token."""
            return batch.length % JOIN_EVERY == 0 and self._joining(_live(turns)) > 0

        try:
            while self._has_work(turns):
                turns += self._joined(turns)
                yield from self._decode_wave(turns, pauses)
                turns = _live(turns)  # those that are left when somebody leaves are lost
        finally:
            with self._aborted.changed:
                self._is_decoding = self._is_ending = False
                self._queue.clear()
            self.forget([turn.request.row for turn in turns])

    def _has_work(self, turns: Sequence[Turn]) -> bool:
        """Wait until there is something to do → whether there is, or all has ended."""
        with self._aborted.changed:
            while not (turns or self._queue or self._is_ending or self._aborted.is_set()):
                self._aborted.changed.wait()
            return bool(turns or self._queue) and not self._aborted.is_set()

    def _joined(self, live: Sequence[Turn]) -> list[Turn]:
        """Those that come in now; others make room for them."""
        requests = [self._queue.popleft() for _ in range(self._joining(live) or (0 if live else 1))]
        self._check([*(turn.request for turn in live), *requests], under_way=len(live))
        joined = [self._begun(request) for request in requests]
        if self._limit is not None:
            together = [*live, *joined]
            self._shelf.make_room([turn.request.row for turn in together], self._limit - self._cost(together))
        return joined

    def _joining(self, live: Sequence[Turn]) -> int:
        """How many of those that wait, from the first on, have room beside the live ones."""
        with self._aborted.changed:
            waiting = list(self._queue)
        if self._limit is None:
            return len(waiting)
        kept = self._shelf.lengths()
        before = [len(turn.held.ids) + turn.row.made - 1 for turn in live]
        new, room = [1] * len(live), max((turn.row.limit - len(turn.row.token_ids) for turn in live), default=0)
        for count, request in enumerate(waiting):
            held = 0 if request.fresh or request.row not in self._rows else len(self._rows[request.row].ids)
            before.append(min(held, kept.get(request.row, held)))
            new.append(held + len(request.ids) - before[-1])
            room = max(room, request.room)
            if self.memory_bytes(before, new, room) > self._limit:
                return count
        return len(waiting)


def _live(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.row.finish_reason is None]
