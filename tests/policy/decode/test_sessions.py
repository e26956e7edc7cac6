"""Rows that go on over several turns: against whole-row forwards, against the plain decode, and against their calls alone.
On a machine with an NVIDIA card all of it runs there."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import small_network
from troupe.errors import ModelError
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.requests import CompletedTurn, GenerationConfig, RolloutRequest, TurnRequest
from troupe.policy.decode.session import TurnSession
from troupe.policy.model import Policy, random_policy

SIZES: dict[str, Any] = {"hidden_size": 32, "max_position_embeddings": 160, "num_hidden_layers": 3}
POLICIES = {name: shaken_policy(config, seed=5) for name, config in family_configs(**SIZES).items()}
PLAIN = random_policy(small_network(vocab_size=61, max_position_embeddings=160, initializer_range=0.25), seed=5)
STOP = frozenset({7, 8, 9, 10})
TOLERANCE = 2e-5 if mx.default_device() == mx.Device(mx.cpu) else 2e-2
PROMPTS = [tuple((5 * i + n) % 61 for i in range(n)) for n in (4, 19, 1)]


def engine_of(policy: Policy = PLAIN, stop_ids: frozenset[int] = STOP, **settings: Any) -> RolloutEngine:
    settings = {"num_generations": 3, "max_completion_length": 20} | settings
    engine = RolloutEngine(policy.config, GenerationConfig(**settings), stop_ids=stop_ids)
    engine.load(policy.weights, 0)
    return engine


def first_turns(prompts: Sequence[tuple[int, ...]] = PROMPTS, G: int = 3, room: int = 20) -> list[TurnRequest]:
    return [
        TurnRequest(row=(1, place, sample), ids=ids, start=0, room=room, fresh=True)
        for place, ids in enumerate(prompts)
        for sample in range(G)
    ]


class Talk:
    """Conversations of a session: what each row has said and read, and what all of its calls gave."""

    def __init__(self, session: TurnSession, observe: Callable[[random.Random], int] = lambda dice: dice.randint(1, 9)):
        self.session, self.dice, self.observe = session, random.Random(3), observe
        self.history: dict[tuple[int, ...], list[int]] = {}
        self.said: dict[tuple[int, ...], int] = {}
        self.turns: list[tuple[int, CompletedTurn]] = []
        """Where the turn begins in its row's history, and the turn."""

    def take(self, requests: Sequence[TurnRequest]) -> list[CompletedTurn]:
        for request in requests:
            self.history[request.row] = (
                list(request.ids) if request.fresh else [*self.history[request.row], *request.ids]
            )
        found = [turn for turns in self.session.decode(requests) for turn in turns]
        assert {turn.row for turn in found} == {request.row for request in requests}
        for turn in found:
            self.turns.append((len(self.history[turn.row]), turn))
            self.history[turn.row] += turn.token_ids
        return found

    def next(self, rows: Iterable[tuple[int, ...]], room: int = 20) -> list[TurnRequest]:
        return [
            TurnRequest(
                row=row,
                ids=tuple(self.dice.randrange(61) for _ in range(self.observe(self.dice))),
                start=1000,
                room=room,
            )
            for row in rows
        ]


def whole_log_probs(policy: Policy, history: Sequence[int]) -> np.ndarray:
    """(T, V) of every token of a row but the first, from one forward over all of it, in float64."""
    logits = np.array(policy.model(mx.array([list(history)])).astype(mx.float32))[0, :-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    normalized: np.ndarray = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return normalized


def largest_gap(policy: Policy, talk: Talk, temperature: float = 1.0) -> float:
    worst = 0.0
    tables = {row: whole_log_probs(policy, history) for row, history in talk.history.items()}
    for start, turn in talk.turns:
        table = tables[turn.row][start - 1 : start - 1 + len(turn.token_ids)]
        theirs = table[np.arange(len(table)), list(turn.token_ids)]
        worst = max(worst, float(np.abs(theirs - np.array(turn.log_probs)).max()))
    return worst


@pytest.mark.parametrize("family", POLICIES)
def test_turns_are_those_of_whole_rows(family: str) -> None:
    """Rows of several prompts and turns of several lengths, of which some end early."""
    policy = POLICIES[family]
    talk = Talk(engine_of(policy).session())
    rows = [turn.row for turn in sorted(talk.take(first_turns()), key=lambda turn: turn.row)]
    for count in (9, 7, 4, 1):
        rows = talk.dice.sample(rows, count)
        talk.take(talk.next(rows))
    assert len({len(turn.token_ids) for _, turn in talk.turns}) > 4
    assert largest_gap(policy, talk) < TOLERANCE
