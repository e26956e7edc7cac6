"""Rows that go on over several turns, their keys and values kept in between.

What a call gives follows from the calls of the session alone, from their rows and tokens: never from when they came.
Where memory is limited, histories are dropped when others need the room, and their rows read anew at their next turn;
what does not fit together is decoded in waves. Both follow from lengths and settings, too.

Penalties look back over all that a row has said and read; stop strings and the repetition cut-off over one turn.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

from troupe.errors import ModelError
from troupe.policy.decode.loaded import LoadedWeights
from troupe.policy.decode.loop import DecodeSetup
from troupe.policy.decode.memory import device_ways, turn_memory_bytes
from troupe.policy.decode.requests import CompletedTurn, TurnRequest
from troupe.policy.decode.rows import Row, row_key
from troupe.policy.decode.shelf import HeldRow, RowName, Shelf
from troupe.policy.decode.stopping import StopWatch
from troupe.policy.decode.turn_batch import Turn, TurnBatch
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.routes import id_type
from troupe.policy.network.tensors import Weights


class Abort:
    """Asks decodes to end at their next token. From any thread."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """Notified when it is asked, for whoever waits."""
        self._is_set = False

    def set(self) -> None:
        """Ask."""
        with self.changed:
            self._is_set = True
            self.changed.notify_all()

    def clear(self) -> None:
        """Forget that it was asked."""
        self._is_set = False

    def is_set(self) -> bool:
        """Whether it was asked."""
        return self._is_set


class TurnSession:
    """Made by `RolloutEngine.session`, and used by the engine's thread; several may be open at once, and what they
    decode may be interleaved."""

    def __init__(
        self,
        setup: DecodeSetup,
        weights: LoadedWeights,
        aborted: Abort,
        tell: Callable[[int], None],
        limit_bytes: float | None = None,
    ) -> None:
        """`weights`: those of the engine. `tell` is told how many tokens the longest turn under way has. `limit_bytes`:
        most memory beside the weights, by the formula of `decode/memory.py`, what rows hold counted in."""
        self._setup, self._aborted, self._tell, self._limit = setup, aborted, tell, limit_bytes
        self._shared = self._weights = weights
        self._rows: dict[RowName, HeldRow] = {}
        self._shelf = Shelf()
        self._is_decoding = False
        self.tokens_read = 0
        """Tokens that were computed before sampling, in all calls, padding not counted."""

    @property
    def held_bytes(self) -> int:
        """What the histories of rows take that wait."""
        return self._shelf.bytes

    def load(self, weights: Weights, version: int, policy: int = 0) -> None:
        """As the engine's, for this session alone: it is the first call that parts them."""
        if self._weights is self._shared:
            self._weights = LoadedWeights(self._setup.config, self._shared.base)
        self._weights.load(weights, version, policy)

    def release(self) -> None:
        """Let go of what `load` has brought; histories are kept."""
        if self._weights is not self._shared:
            self._weights.release()

    def forget(self, rows: Iterable[RowName]) -> None:
        """Let go of rows that do not go on."""
        rows = list(rows)
        self._shelf.drop(rows)
        for name in rows:
            self._rows.pop(name, None)

    def close(self) -> None:
        """Let go of everything."""
        self._rows, self._shelf, self._is_decoding = {}, Shelf(), False
        self.release()

    def decode(self, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
        """Decode a turn of all these rows together; `next` returns the turns that ended at the same token, none when
        what is new has been read. Who leaves before the end loses the rows.

        Raises ModelError at once for ids that are none, are outside the vocabulary, leave no room within
        max_position_embeddings or take more than the memory limit by themselves; ValueError for a row that is named
        twice, that goes on without having begun or has no room, or where policies differ; RuntimeError where no weights
        were loaded or the last decode has not ended.
        """
        if self._is_decoding:
            raise RuntimeError("the decode before has not ended; go through it first, or close it")
        self._check(requests)
        self._aborted.clear()
        turns = [self._begun(request) for request in requests]
        self._is_decoding = bool(turns)
        return self._decode(turns)

    def memory_bytes(self, kept: Sequence[int], new: Sequence[int], room: int) -> int:
        """What a turn of rows takes beside the weights that hold `kept` tokens, read `new` ones and sample `room`."""
        config, dtype = self._setup.config, self._weights.dtype
        ways = device_ways(config, dtype, on_cpu=is_on_cpu())
        filters = self._setup.sampler.is_filtering
        return turn_memory_bytes(config, kept, new, room, dtype, is_filtering=filters, **ways)

    def _decode(self, turns: Sequence[Turn]) -> Iterator[list[CompletedTurn]]:
        left, is_left = list(turns), True
        try:
            while left:
                count = self._make_room(left)
                yield from self._decode_wave(left[:count])
                left = left[count:] if not self._aborted.is_set() else []
            is_left = False
        finally:
            self._is_decoding = False
            self.forget([turn.request.row for turn in turns if is_left or turn.row.finish_reason is None])

    def _decode_wave(
        self, turns: Sequence[Turn], pauses: Callable[[TurnBatch], bool] = lambda _: False
    ) -> Iterator[list[CompletedTurn]]:
        """To the end, or until the batch is to pause."""
        batch = TurnBatch(self._setup, turns, self._shelf, self._weights.current)
        more = batch.advance()
        self.tokens_read += batch.tokens_read
        yield []
        while more:
            self._tell(batch.length)
            if completed := batch.pop_completed():
                yield completed
            if self._aborted.is_set():
                batch.abandon()
                break
            if pauses(batch):
                break
            more = batch.advance()
        batch.finish()
        if completed := batch.pop_completed():
            yield completed

    def _make_room(self, turns: Sequence[Turn]) -> int:
        """How many of the turns, from the first on, are decoded together; what others hold is dropped where it must.
        Groups of a request stay together where they can."""
        if self._limit is None:
            return len(turns)
        count = bisect_right(range(1, len(turns) + 1), self._limit, key=lambda count: self._cost(turns[:count]))
        groups = [turn.request.row[:-1] for turn in turns]
        ends = [end for end in range(1, count + 1) if end == len(turns) or groups[end - 1] != groups[end]]
        chosen = turns[: max(1, ends[-1] if ends else count)]
        self._shelf.make_room([turn.request.row for turn in chosen], self._limit - self._cost(chosen))
        return len(chosen)

    def _cost(self, turns: Sequence[Turn]) -> int:
        """What these turns take, none of them in a batch."""
        kept = self._shelf.lengths()
        before = [kept.get(turn.request.row, 0) for turn in turns]
        new = [len(turn.held.ids) - length for turn, length in zip(turns, before, strict=True)]
        return self.memory_bytes(before, new, max(turn.row.limit - len(turn.row.token_ids) for turn in turns))

    def _begun(self, request: TurnRequest) -> Turn:
        """Take note of what a row reads."""
        before = self._rows.get(request.row)
        if request.fresh or before is None:
            held = self._rows[request.row] = HeldRow(list(request.ids))
            if before is not None:
                self._keep_prefix(request.row, before, held)
            known = 0
        else:
            held, known = before, len(before.experts)
            held.ids += request.ids
        config = self._setup.config
        room = min(request.room, config.max_position_embeddings - len(held.ids))
        key, watch = row_key(request.row[:-1], request.row[-1]), StopWatch(self._setup.stop_rules)
        return Turn(request, held, Row(0, key, room, watch, request.policy, request.start), known)

    def _keep_prefix(self, name: RowName, before: HeldRow, after: HeldRow) -> None:
        """Of a row that begins anew, keep what is as it was, at least its last token left out."""
        length = self._shelf.lengths().get(name, 0)
        same = 0
        while same < min(length, len(after.ids) - 1) and before.ids[same] == after.ids[same]:
            same += 1
        if not same or self._setup.config.delta_layers:
            self._shelf.drop([name])
            return
        self._shelf.shorten(name, same)
        if self._setup.records_experts:
            config = self._setup.config
            each = len(config.sparse_layers) * config.num_experts_per_tok * id_type(config).size
            after.experts += before.experts[: same * each]

    def _check(self, requests: Sequence[TurnRequest], under_way: int = 0) -> None:
        """Of which the first are `under_way`."""
        if not self._weights.policies:
            raise RuntimeError("decode came before load: there are no weights yet")
        names = [request.row for request in requests]
        if len(set(names)) < len(names):
            raise ValueError("a row is named twice in one decode; give each row one turn")
        if len({request.policy for request in requests}) > 1:
            raise ValueError("turns of several policies cannot be decoded together; decode those of each by itself")
        for request in requests[under_way:]:
            self._check_request(request)
            self._check_row(request)

    def _check_request(self, request: TurnRequest) -> None:
        config, name = self._setup.config, f"row {request.row}"
        if request.room < 1 or request.start < 0:
            raise ValueError(f"{name}: room is {request.room} and start {request.start}, but must be at least 1 and 0")
        if not request.ids:
            raise ModelError(f"{name} has nothing to read; give at least one token")
        if bad := [token for token in request.ids if not 0 <= token < config.vocab_size]:
            raise ModelError(f"{name}: id {bad[0]} is not in the model's vocabulary [0, {config.vocab_size})")

    def _check_row(self, request: TurnRequest) -> None:
        config, name = self._setup.config, f"row {request.row}"
        if request.policy not in self._weights.policies:
            raise RuntimeError(f"{name}: policy {request.policy} was not loaded")
        if not request.fresh and request.row not in self._rows:
            raise ValueError(f"{name} goes on, but has not begun in this session; its first turn must be fresh")
        before = [] if request.fresh else self._rows[request.row].ids
        if (length := len(before) + len(request.ids)) >= config.max_position_embeddings:
            raise ModelError(
                f"{name}: {length} tokens leave no room for a turn; the model has {config.max_position_embeddings} "
                "positions (max_position_embeddings), so end the row before, or shorten what it reads"
            )
        room = min(request.room, config.max_position_embeddings - length)
        if self._limit is not None and (needed := self.memory_bytes([0], [length], room)) > self._limit:
            raise ModelError(
                f"{name}: a turn of {room} tokens behind {length} takes {needed / 1e9:.3g} GB, but it may have "
                f"{self._limit / 1e9:.3g} GB; raise memory_limit_gb, or lower max_completion_length"
            )
