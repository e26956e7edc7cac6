"""Environments, words and an engine of turns that compute nothing and are functions of what they are given."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import anyio

from troupe.actors.conversations import Conversations, Rules
from troupe.actors.generator.episodes import EpisodeLimits
from troupe.environments.convention import EnvironmentSpec, Said, World
from troupe.environments.events import Ending
from troupe.messages import Answer, Incident, PromptText
from troupe.policy import CompletedTurn, TurnRequest

TURNS, LONGEST, CONTEXT = 4, 40, 60
LIMITS = EpisodeLimits(num_generations=3, max_completion_length=LONGEST, context=CONTEXT)
WORLD = World(environments={"game": EnvironmentSpec(name="game", label="Game", has_step=True)}, factories={})


def digest(*things: object) -> bytes:
    """32 bytes that follow from the things."""
    return hashlib.sha256(repr(things).encode()).digest()


class Follows(NamedTuple):
    ids: tuple[int, ...]
    prompt_ids: tuple[int, ...] | None = None


class FakeWords:
    """Ids follow from the messages; some conversations begin a new row."""

    def opening(self, messages: Any) -> tuple[int, ...]:
        return tuple(digest("opening", messages)[:3])

    def following(self, messages: Any, said: Any, sampled_ids: Any, new: Any, *, given: int | None = None) -> Follows:
        noise = digest("following", messages, said, new)
        if noise[0] % 5 == 0:
            return Follows((), tuple(noise[1 : 4 + noise[1] % 5]))
        return Follows(tuple(noise[1 : 2 + noise[1] % 6]))


class FakeAnswers:
    """Answers follow from episode and tokens; each takes as long as `delay_s` says. Counts what it is asked."""

    def __init__(self, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        self.delay_s = delay_s
        self.asked: Counter[tuple[Any, ...]] = Counter()
        self.known: dict[tuple[Any, ...], Answer] = {}
        self.down: Mapping[str, str] = {}
        self.forgotten: set[int] = set()

    async def open(self, name: Any, prompt: PromptText, columns: Mapping[str, Any]) -> Answer:
        messages = ({"role": "user", "content": f"{prompt} {tuple(name)}"},) if digest(name)[0] % 2 else ()
        return await self._once((*name, 0, ()), Answer(said={}, messages=messages, failed=self._failure(name, 0)))

    async def answer(self, name: Any, turn: int, token_ids: Sequence[int], said: Said) -> Answer:
        noise = digest(name, turn, tuple(token_ids))
        answer = Answer(
            said=said.message,
            messages=({"role": "user", "content": noise.hex()[:4]},),
            done=noise[0] % TURNS == 0,
            reward=noise[1] / 256,
            failed=self._failure(name, turn),
        )
        return await self._once((*name, turn, tuple(token_ids)), answer)

    async def close(self, name: Any, turns: int) -> Ending:
        return Ending(attributes={"turns": turns})

    @property
    def ledger(self) -> Any:
        return self

    def forget(self, gid: int) -> None:
        self.forgotten.add(gid)

    def settled(self, gid: int) -> None:
        pass

    def listen(self, told: Callable[[Incident], None] | None) -> None:
        pass

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def trust(self) -> None:
        pass

    def _failure(self, name: Any, turn: int) -> str:
        return "it fell over" if digest("failure", name, turn)[0] < 8 else ""

    async def _once(self, key: tuple[Any, ...], answer: Answer) -> Answer:
        if key not in self.known:
            self.asked[key] += 1
            await anyio.sleep(self.delay_s())
            self.known[key] = answer
        return self.known[key]


def understand(ids: Sequence[int], read: Sequence[int], spec: EnvironmentSpec) -> Said:
    return Said(message={"role": "assistant", "content": " ".join(map(str, ids))})


def conversations_of(answers: Any, max_turns: int | None = 6) -> Conversations:
    """Over fake environments and words."""
    rules = Rules(max_turns=max_turns, context=CONTEXT)
    return Conversations(answers, WORLD, {"game": FakeWords()}, understand=understand, rules=rules)


class _Live(NamedTuple):
    """A turn under way."""

    request: TurnRequest
    length: int
    tokens: list[int]
    versions: list[int]


class ScriptedSession:
    """Turns end after as many tokens as follow from the row; tokens follow from weights, row and all that was read.
    What decodes together goes into the tokens, too: it has to be the same whenever a run is made again."""

    def __init__(self, engine: Any, *, together: bool = False) -> None:
        self._engine, self._together = engine, together
        self.read: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.calls: list[tuple[tuple[int, ...], ...]] = []
        self._queue: list[TurnRequest] = []

    def decode(self, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
        rows = tuple(request.row for request in requests)
        self.calls.append(rows)
        live = [self._begun(request) for request in requests]
        yield []
        while live:
            if ended := self._advance(live, rows):
                yield ended

    def join(self, requests: Sequence[TurnRequest]) -> None:
        self._queue += requests

    def end(self) -> None:
        """It ends whenever there is nothing to do: in virtual time nobody can wait in a thread."""

    def serve(self) -> Iterator[list[CompletedTurn]]:
        live: list[_Live] = []
        while live or self._queue:
            live += [self._begun(request) for request in self._queue]
            self._queue = []
            if ended := self._advance(live, ()):
                yield ended

    def _begun(self, request: TurnRequest) -> _Live:
        before = () if request.fresh else self.read[request.row]
        self.read[request.row] = (*before, *request.ids)
        return _Live(request, min(1 + digest(request.row, request.start)[0] % 5, request.room), [], [])

    def _advance(self, live: list[_Live], rows: tuple[Any, ...]) -> list[CompletedTurn]:
        """One token more of each → the turns that ended with it."""
        weights, version = self._engine.loaded()
        ended = []
        for turn in tuple(live):
            row = turn.request.row
            others = rows if self._together else ()
            noise = digest(weights["w"], self.read[row], turn.tokens, turn.request.start, others)
            turn.tokens.append(noise[0] % 64)
            turn.versions.append(version)
            if len(turn.tokens) == turn.length:
                live.remove(turn)
                self.read[row] += tuple(turn.tokens)
                ended.append(_completed(turn.request, turn.tokens, turn.versions))
        return ended

    def forget(self, rows: Sequence[tuple[int, ...]]) -> None:
        for row in rows:
            self.read.pop(row, None)

    def close(self) -> None:
        self.read = {}


def _completed(request: TurnRequest, tokens: Sequence[int], versions: Sequence[int]) -> CompletedTurn:
    log_probs = tuple(-0.5 - token / 64 for token in tokens)
    return CompletedTurn(
        row=request.row,
        token_ids=tuple(tokens),
        log_probs=log_probs,
        sampling_log_probs=log_probs,
        versions=tuple(versions),
        finish_reason="length" if len(tokens) == request.room else "stop",
    )
