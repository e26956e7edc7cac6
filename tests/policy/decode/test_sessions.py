"""Rows that go on over several turns: against whole-row forwards, against the plain decode, and against their calls.
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

from tests.support.devices import compute_on
from tests.support.families import family_configs, shaken_policy
from tests.support.tiny import small_network
from troupe.errors import ModelError
from troupe.policy.decode import cuda_kernels, open_session
from troupe.policy.decode.engine import RolloutEngine
from troupe.policy.decode.open_session import OpenSession
from troupe.policy.decode.requests import CompletedTurn, Completion, GenerationConfig, RolloutRequest, TurnRequest
from troupe.policy.decode.session import TurnSession
from troupe.policy.model import Policy, random_policy

SIZES: dict[str, Any] = {"hidden_size": 32, "max_position_embeddings": 160, "num_hidden_layers": 2}
POLICIES = {name: shaken_policy(config, seed=5) for name, config in family_configs(**SIZES).items()}
WIDE = family_configs(**SIZES, head_dim=64)
"""Of the kind that the kernels for NVIDIA cards serve."""
POLICIES |= {f"{name}-wide": shaken_policy(WIDE[name], seed=5) for name in ("qwen3", "gemma3-untied")}
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


@pytest.mark.parametrize(
    ("family", "elsewhere"),
    [*((family, False) for family in POLICIES), *((name, True) for name in ("qwen3", "gemma3", "mistral-window"))],
)
def test_turns_are_those_of_whole_rows(family: str, elsewhere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several prompts and turns of several lengths, of which some end early. `elsewhere`: as on a GPU."""
    if elsewhere:
        compute_on(monkeypatch, cpu=False)
    policy = POLICIES[family]
    talk = Talk(engine_of(policy).session())
    rows = sorted(turn.row for turn in talk.take(first_turns()))
    for count in (9, 5, 1):
        rows = talk.dice.sample(rows, count)
        talk.take(talk.next(rows))
    assert len({len(turn.token_ids) for _, turn in talk.turns}) > 4
    assert largest_gap(policy, talk) < (TOLERANCE if family != "qwen3_5" else 4 * TOLERANCE)  # so are its plain decodes


@pytest.mark.skipif(not cuda_kernels.are_available(), reason="MLX has no NVIDIA card here")
@pytest.mark.parametrize("family", ["qwen3", "gemma3-untied"])
def test_turns_in_16_bits_are_those_of_whole_rows(family: str) -> None:
    policy = shaken_policy(WIDE[family], seed=5, dtype="bfloat16")
    talk = Talk(engine_of(policy).session())
    talk.take(first_turns())
    for _ in range(2):
        talk.take(talk.next(sorted(talk.history)))
    assert largest_gap(policy, talk) < 0.5


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "repetition_penalty": 1.3, "xtc_probability": 0.5}])
def test_first_turns_are_a_plain_decode_bit_for_bit(settings: dict[str, Any]) -> None:
    engine = engine_of(**settings)
    plain = engine.decode([RolloutRequest(prompt_ids=ids, key=(1, i)) for i, ids in enumerate(PROMPTS)])
    theirs: dict[tuple[int, ...], Completion]
    theirs = {(1, group.index, i): made for group in plain for i, made in enumerate(group.completions)}
    session = engine.session()
    lists = list(session.decode(first_turns()))
    assert lists[0] == []
    for turn in (turn for turns in lists for turn in turns):
        made = theirs.pop(turn.row)
        for name in ("token_ids", "log_probs", "sampling_log_probs", "versions", "finish_reason"):
            assert getattr(turn, name) == getattr(made, name)
    assert not theirs
    assert session.tokens_read == sum(map(len, PROMPTS))


def test_turns_come_as_they_end_and_repeat_bit_for_bit_whatever_is_decoded_between() -> None:
    def conversation(session: TurnSession, between: Callable[[], object]) -> list[CompletedTurn]:
        talk = Talk(session)
        rows = [request.row for request in first_turns()]
        talk.take(first_turns())
        for _ in range(3):
            between()
            rows = rows[1:]
            lengths = [min(len(turn.token_ids), 19) for turn in talk.take(talk.next(rows))]  # the last two come at once
            assert lengths == sorted(lengths)
        return [turn for _, turn in talk.turns]

    engine = engine_of()
    alone = conversation(engine.session(), lambda: None)
    others = Talk(engine.session())
    others.take(first_turns([(3, 4)], G=2))
    mixed = conversation(engine.session(), lambda: others.take(others.next([(1, 0, 1)])))
    assert mixed == alone


def test_only_what_is_new_is_read() -> None:
    talk = Talk(engine_of().session(), observe=lambda _: 5)
    talk.take(first_turns())
    rows = [request.row for request in first_turns()]
    for turn in range(4):
        before = talk.session.tokens_read
        talk.take(talk.next(rows, room=8 + turn))
        assert talk.session.tokens_read - before == len(rows) * (5 + 1)  # the last that was sampled is read, too


def test_a_turn_draws_the_numbers_that_come_after_its_start() -> None:
    """A row that reads anew what it has said goes on with what it would have said."""
    engine = engine_of(stop_ids=frozenset())
    [whole] = next(
        iter(
            engine_of(stop_ids=frozenset(), num_generations=1).decode([RolloutRequest(prompt_ids=PROMPTS[1], key=(4,))])
        )
    ).completions
    for cut in (3, 16):
        request = TurnRequest(
            row=(4, 0), ids=(*PROMPTS[1], *whole.token_ids[:cut]), start=cut, room=20 - cut, fresh=True
        )
        [turn] = Talk(engine.session()).take([request])
        assert turn.token_ids == whole.token_ids[cut:]


def test_a_new_row_keeps_what_is_as_it_was_and_no_more() -> None:
    """Its prompt, and not what it said since; a network with gated delta nets reads all anew."""
    for name, read in (("qwen3", 4), ("qwen3_5", 19 + 4)):
        talk = Talk(engine_of(POLICIES[name]).session())
        talk.take(first_turns([PROMPTS[1]], G=2))
        before = talk.session.tokens_read
        anew = TurnRequest(row=(1, 0, 1), ids=(*PROMPTS[1], 60, 59, 58, 57), start=30, room=9, fresh=True)
        talk.turns.clear()
        talk.take([anew])
        assert talk.session.tokens_read - before == read
        talk.take(talk.next([(1, 0, 1)]))
        del talk.history[(1, 0, 0)]
        assert largest_gap(POLICIES[name], talk) < 4 * TOLERANCE


def test_new_rows_and_old_ones_take_a_turn_together() -> None:
    talk = Talk(engine_of(POLICIES["gemma3-untied"]).session())
    talk.take(first_turns())
    others = [msgspec.structs.replace(request, row=(2, *request.row[1:])) for request in first_turns(G=2)]
    talk.take([*talk.next([(1, 0, 0), (1, 2, 1)]), *others])
    talk.take(talk.next([(2, 1, 1), (1, 2, 1), (2, 0, 0), (1, 1, 1)]))
    assert largest_gap(POLICIES["gemma3-untied"], talk) < TOLERANCE


def test_penalties_look_back_over_what_was_read_and_stop_strings_begin_anew() -> None:
    """A penalty that bans whatever was there: nothing read or said in the last 30 tokens comes."""
    engine = engine_of(stop_ids=frozenset(), presence_penalty=1e4, presence_context_size=30)
    talk = Talk(engine.session())
    talk.take(first_turns(room=10))
    talk.take(talk.next([request.row for request in first_turns()], room=10))
    for start, turn in talk.turns:
        for place in range(start, start + len(turn.token_ids)):
            history = talk.history[turn.row]
            assert history[place] not in history[max(0, place - 30) : place]


def test_recorded_experts_are_those_of_the_whole_row() -> None:
    policy = POLICIES["qwen3-moe"]
    engine = RolloutEngine(policy.config, GenerationConfig(num_generations=3), stop_ids=STOP, records_experts=True)
    engine.load(policy.weights, 0)
    talk = Talk(engine.session())
    talk.take(first_turns())
    rows = [(1, 1, 1), (1, 2, 0)]
    talk.take(talk.next(rows))
    talk.take(talk.next(rows))
    for row in rows:
        told = b"".join(turn.read_experts + turn.experts for _, turn in talk.turns if turn.row == row)
        whole = TurnRequest(row=(9, 9), ids=tuple(talk.history[row]), start=0, room=1, fresh=True)
        [turn] = Talk(engine.session()).take([whole])
        each = len(turn.read_experts) // len(talk.history[row])
        assert told == turn.read_experts[:-each]  # the last token was not read yet


def test_rows_that_are_forgotten_or_take_their_last_turn_hold_nothing() -> None:
    session = engine_of().session()
    talk = Talk(session)
    talk.take(first_turns())
    assert session.held_bytes > 0
    rows = [request.row for request in first_turns()]
    session.forget(rows[1:])
    held = session.held_bytes
    talk.take([msgspec.structs.replace(request, last=True) for request in talk.next(rows[:1])])
    assert held > 0
    assert session.held_bytes == 0
    session.close()


@pytest.mark.parametrize("family", [pytest.param("gemma3", marks=pytest.mark.slow), "qwen3_5"])
def test_within_a_memory_limit_histories_are_dropped_and_read_anew(family: str) -> None:
    """For one long row, or some of many short ones: in waves, for which others have to make room."""
    policy = POLICIES[family]
    limit = engine_of(policy).session().memory_bytes([0], [45], 8) / 1e9

    def conversation() -> tuple[list[CompletedTurn], int]:
        talk = Talk(engine_of(policy, memory_limit_gb=2 * limit).session(sessions=2), observe=lambda _: 5)
        talk.take(first_turns(G=8, room=8))
        for _ in range(2):
            talk.take(talk.next(sorted(talk.history), room=8))
            assert talk.session.held_bytes <= limit * 1e9
        assert largest_gap(policy, talk) < 4 * TOLERANCE
        return [turn for _, turn in talk.turns], talk.session.tokens_read

    turns, tokens_read = conversation()
    assert tokens_read > 8 * sum(map(len, PROMPTS)) + 48 * 6
    assert conversation() == (turns, tokens_read)


def test_a_turn_beyond_the_memory_limit_is_refused_before_decoding() -> None:
    session = engine_of(memory_limit_gb=1e-6).session()
    with pytest.raises(ModelError, match=r"a turn of 20 tokens behind 4 takes .* GB, but it may have 1e-06 GB"):
        session.decode(first_turns())


def test_an_abort_ends_the_decode_and_rows_go_on_from_there() -> None:
    engine = engine_of(stop_ids=frozenset())
    talk = Talk(engine.session())
    talk.take(first_turns())
    requests = talk.next([request.row for request in first_turns()])
    decoding = talk.session.decode(requests)
    assert next(decoding) == []
    engine.abort()
    turns = [turn for turns in decoding for turn in turns]
    assert {turn.finish_reason for turn in turns} == {"aborted"}
    for request in requests:
        talk.history[request.row] += request.ids
    for turn in turns:
        talk.history[turn.row] += turn.token_ids
    talk.take(talk.next([request.row for request in first_turns()]))
    assert largest_gap(PLAIN, talk) < TOLERANCE


def test_a_decode_that_is_left_loses_its_rows_and_no_others() -> None:
    talk = Talk(engine_of(stop_ids=frozenset()).session())
    talk.take(first_turns())
    short, long = talk.next([(1, 0, 0)], room=1), talk.next([(1, 0, 1)])
    decoding = talk.session.decode([*short, *long])
    assert next(decoding) == []
    assert [turn.row for turn in next(decoding)] == [(1, 0, 0)]
    with pytest.raises(RuntimeError, match="has not ended"):
        talk.session.decode(talk.next([(1, 1, 0)]))
    decoding.close()  # type: ignore[attr-defined]
    for row in ((1, 0, 0), (1, 0, 1)):
        with pytest.raises(ValueError, match="must be fresh"):
            talk.session.decode(talk.next([row]))
    talk.take(talk.next([(1, 1, 0)]))


def test_weights_of_a_session_are_its_own() -> None:
    engine, other = engine_of(), shaken_policy(PLAIN.config, seed=77)
    session = engine.session()
    session.load(other.weights, 5)
    theirs, ours = (Talk(one).take(first_turns()) for one in (session, engine.session()))
    assert {version for turn in theirs for version in turn.versions} == {5}
    assert {version for turn in ours for version in turn.versions} == {0}
    assert [turn.log_probs for turn in theirs] != [turn.log_probs for turn in ours]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fresh": False}, ValueError, "must be fresh"),
        ({"ids": ()}, ModelError, "nothing to read"),
        ({"ids": (1, 61)}, ModelError, "id 61 is not in"),
        ({"ids": (1,) * 160}, ModelError, "160 tokens leave no room"),
        ({"room": 0}, ValueError, "room is 0"),
        ({"row": (1, 0, 1)}, ValueError, "named twice"),
        ({"policy": 1}, ValueError, "several policies"),
    ],
)
def test_unusable_turns_are_refused_before_decoding(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    first, second = first_turns([(1, 2)], G=2)
    with pytest.raises(error, match=message):
        engine_of().session().decode([msgspec.structs.replace(first, **changes), second])


def serve(session: OpenSession, talk: Talk, turns: int) -> None:
    """Conversations of so many turns, each of which joins when the one before has ended."""
    taken = {request.row: 1 for request in first_turns()}

    def note(requests: Sequence[TurnRequest]) -> None:
        for request in requests:
            talk.history[request.row] = [*([] if request.fresh else talk.history[request.row]), *request.ids]
        session.join(requests)

    note(first_turns())
    for completed in session.serve():
        for turn in completed:
            talk.turns.append((len(talk.history[turn.row]), turn))
            talk.history[turn.row] += turn.token_ids
            if taken[turn.row] < turns:
                note(talk.next([turn.row]))
            taken[turn.row] += 1
        if min(taken.values()) > turns:
            session.end()


@pytest.mark.parametrize("family", ["qwen3", "gemma3-untied", "qwen3_5"])
def test_turns_join_a_decode_under_way(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And draw what they draw in rounds."""
    monkeypatch.setattr(open_session, "JOIN_EVERY", 4)
    policy = POLICIES[family]
    talk = Talk(session := engine_of(policy).open_session())
    serve(session, talk, turns=3)
    assert len(talk.turns) == 27
    assert largest_gap(policy, talk) < 4 * TOLERANCE
    rounds = Talk(engine_of(policy).session())
    rounds.take(first_turns())
    for row in talk.history:
        first, second = (next(turn for _, turn in one.turns if turn.row == row) for one in (talk, rounds))
        assert first.token_ids == second.token_ids


def test_turns_that_do_not_fit_wait_for_others_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_session, "JOIN_EVERY", 4)
    limit = engine_of().session().memory_bytes([0], [100], 20) / 1e9
    session = engine_of(memory_limit_gb=limit).open_session()
    talk = Talk(session, observe=lambda _: 5)
    serve(session, talk, turns=3)
    assert largest_gap(PLAIN, talk) < TOLERANCE
    assert session.held_bytes <= limit * 1e9


def test_an_open_session_waits_until_turns_come_or_an_abort() -> None:
    engine = engine_of()
    session = engine.open_session()
    later = threading.Timer(0.05, session.join, [first_turns()])
    later.start()
    serving = session.serve()
    assert next(serving) == []
    assert next(serving)
    aborts = threading.Timer(0.05, engine.abort)
    aborts.start()
    rest = [turn for turns in serving for turn in turns]  # ends by the abort, after all turns or amid them
    assert len(rest) < len(first_turns())
    aborts.join()
    session.end()
    assert list(session.serve()) == []


def test_experts_of_a_turn_that_others_joined_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_session, "JOIN_EVERY", 4)
    policy = POLICIES["qwen3-moe"]
    engine = RolloutEngine(policy.config, GenerationConfig(), stop_ids=STOP, records_experts=True)
    engine.load(policy.weights, 0)
    talk = Talk(session := engine.open_session())
    serve(session, talk, turns=2)
    for row, history in talk.history.items():
        told = b"".join(turn.read_experts + turn.experts for _, turn in talk.turns if turn.row == row)
        whole = TurnRequest(row=(9, 9), ids=tuple(history), start=0, room=1, fresh=True)
        [turn] = Talk(engine.session()).take([whole])
        assert told == turn.read_experts[: -(len(turn.read_experts) // len(history))]
