"""Episodes in token ids: what is asked, what is decoded when, and the rollouts that come of it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.support.fakes import make_prompt
from troupe.actors.generator.episodes import EpisodeLimits, Episodes
from troupe.messages import FinishReason, Observation, Rollout, RowStart
from troupe.policy import CompletedTurn, TurnRequest

LIMITS = EpisodeLimits(num_generations=2, max_completion_length=10, context=14, max_turns=3)
PROMPT = make_prompt(3, 1)


def begun(limits: EpisodeLimits = LIMITS) -> Episodes:
    return Episodes([PROMPT], limits, seed=5, decode_text=lambda ids: " ".join(map(str, ids)))


def observed(sample: int, turn: int, *ids: int, done: bool = False, prompt: Sequence[int] | None = None) -> Observation:
    prompt_ids = None if prompt is None else tuple(prompt)
    return Observation(gid=PROMPT.gid, sample=sample, turn=turn, ids=ids, prompt_ids=prompt_ids, done=done)


def sampled(request: TurnRequest, *ids: int, version: int = 2, reason: FinishReason = "stop") -> CompletedTurn:
    return CompletedTurn(
        row=request.row,
        token_ids=ids,
        log_probs=(-1.0,) * len(ids),
        sampling_log_probs=(-2.0,) * len(ids),
        versions=(version,) * len(ids),
        finish_reason=reason,
        experts=bytes(2 * (len(ids) - 1)),
        read_experts=b"\x01" * 2 * (len(request.ids) + (not request.fresh)),
    )


def only(episodes: Episodes) -> list[Rollout]:
    [group] = episodes.pop_finished()
    return list(group.rollouts)


def test_an_episode_of_two_turns_is_one_rollout() -> None:
    episodes = begun()
    assert [(turn.sample, turn.turn, turn.room) for turn in episodes.openings] == [(0, 0, 10), (1, 0, 10)]
    episodes.observe(observed(0, 0))
    assert (episodes.waiting, episodes.ready) == (True, True)
    assert episodes.observe(observed(1, 0, done=True)) is None, "there is nothing to be forgotten"
    assert (episodes.waiting, episodes.ready) == (False, True)
    [first] = episodes.requests()
    assert first == TurnRequest(row=(5, 3, 1, 0, 0), ids=PROMPT.prompt_ids, start=0, room=10, fresh=True, last=False)
    assert not episodes.ready
    taken = episodes.add(sampled(first, 7, 8))
    assert (taken.turn, taken.token_ids, taken.start, taken.room) == (1, (7, 8), 0, 8)
    episodes.observe(observed(0, 1, 20, 21, 22))
    [second] = episodes.requests()
    assert (second.ids, second.start, second.room, second.fresh) == ((20, 21, 22), 5, 5, False)
    taken = episodes.add(sampled(second, 9, version=3, reason="length"))
    assert (taken.turn, taken.start, taken.room) == (2, 5, 4)
    assert episodes.observe(observed(0, 2, done=True)) == first.row
    assert episodes.ended
    done, failed = only(episodes)
    assert done == Rollout(
        token_ids=(7, 8, 20, 21, 22, 9),
        log_probs=(-1.0, -1.0, 0.0, 0.0, 0.0, -1.0),
        sampling_log_probs=(-2.0, -2.0, 0.0, 0.0, 0.0, -2.0),
        versions=(2, 2, 3, 3, 3, 3),
        finish_reason="length",
        text="7 8 20 21 22 9",
        experts=bytes(2) + b"\x01" * 8,
        observed=((2, 5),),
    )
    assert (failed.token_ids, failed.finish_reason) == ((), "aborted")


def test_a_history_that_is_told_anew_begins_a_row() -> None:
    episodes = begun()
    episodes.observe(observed(1, 0, done=True))
    episodes.observe(observed(0, 0, prompt=(1, 2, 3)))
    [first] = episodes.requests()
    assert (first.ids, first.start, first.room) == ((1, 2, 3), 0, 10)
    episodes.add(sampled(first, 7, 8, 9))
    episodes.observe(observed(0, 1, prompt=(1, 2, 3, 4, 5)))
    [second] = episodes.requests()
    assert (second.ids, second.start, second.room, second.fresh) == ((1, 2, 3, 4, 5), 3, 9, True), "of 14 in all"
    episodes.add(sampled(second, 6))
    episodes.observe(observed(0, 2, 30))
    [third] = episodes.requests()
    assert (third.start, third.room, third.fresh, third.last) == (5, 7, False, True)
    episodes.add(sampled(third, 4))
    episodes.observe(observed(0, 3, done=True))
    rollout, _ = only(episodes)
    assert rollout.token_ids == (7, 8, 9, 6, 30, 4)
    assert rollout.observed == ((4, 5),)
    read = b"\x01" * 2
    assert rollout.rows == (
        RowStart(start=0, prompt_ids=(1, 2, 3), prompt_experts=read * 3),
        RowStart(start=3, prompt_ids=(1, 2, 3, 4, 5), prompt_experts=read * 5),
    )
    assert len(rollout.experts) == 2 * (len(rollout.token_ids) - 1), "one for each token but the last"


def test_what_leaves_no_room_ends_the_episode_and_is_not_read() -> None:
    episodes = begun(msgspec.structs.replace(LIMITS, num_generations=1))
    episodes.observe(observed(0, 0))
    [first] = episodes.requests()
    episodes.add(sampled(first, 1, 2, 3, 4))
    episodes.observe(observed(0, 1, *range(6)))
    [rollout] = only(episodes)
    assert rollout.token_ids == (1, 2, 3, 4)
    assert not rollout.observed


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    episodes = begun(msgspec.structs.replace(LIMITS, num_generations=1))
    episodes.observe(observed(0, 1, done=True))
    episodes.observe(observed(0, 0))
    episodes.observe(observed(0, 0, done=True))
    assert episodes.ready
    [first] = episodes.requests()
    episodes.observe(observed(0, 0, done=True))
    assert episodes.add(sampled(first, 1)).turn == 1
