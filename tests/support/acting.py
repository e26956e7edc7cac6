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


class ScriptedSession:
    """Turns end after as many tokens as follow from the row; tokens follow from weights, row and all that was read.
    What decodes together goes into the tokens, too: it has to be the same whenever a run is made again."""

    def __init__(self, engine: Any, *, together: bool = False) -> None:
        self._engine, self._together = engine, together
        self.read: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.calls: list[tuple[tuple[int, ...], ...]] = []

    def decode(self, requests: Sequence[TurnRequest]) -> Iterator[list[CompletedTurn]]:
        rows = tuple(request.row for request in requests)
        self.calls.append(rows)
        lengths: dict[tuple[int, ...], int] = {}
        tokens: dict[tuple[int, ...], list[int]] = {}
        for request in requests:
            before = () if request.fresh else self.read[request.row]
            self.read[request.row] = (*before, *request.ids)
            lengths[request.row] = min(1 + digest(request.row, request.start)[0] % 5, request.room)
            tokens[request.row] = []
        versions: list[int] = []
        yield []
        for t in range(max(lengths.values())):
            weights, version = self._engine.loaded()
            versions.append(version)
            ended = []
            for request in requests:
                row, so_far = request.row, tokens[request.row]
                if t >= lengths[row]:
                    continue
                others = rows if self._together else ()
                so_far.append(digest(weights["w"], self.read[row], so_far, request.start, others)[0] % 64)
                if len(so_far) == lengths[row]:
                    self.read[row] += tuple(so_far)
                    ended.append(_completed(request, so_far, versions))
            if ended:
                yield ended

    def forget(self, rows: Sequence[tuple[int, ...]]) -> None:
        for row in rows:
            del self.read[row]

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
