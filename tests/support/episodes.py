"""Small episodes, as the environment actor makes them."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tests.support.fakes import make_prompt, make_rollout
from troupe.messages import Answer, Episode, FinishReason, Rollout, RolloutGroup, RowStart, ScoredGroup, ToolCall, Turn


def acted(
    *parts: int,
    rows: Sequence[tuple[int, tuple[int, ...]]] = (),
    versions: Sequence[int] | None = None,
    first_id: int = 10,
    reason: FinishReason = "stop",
) -> Rollout:
    """A rollout of turns and observations by turns, each of so many tokens; ids count up."""
    T = sum(parts)
    edges = [sum(parts[:index]) for index in range(len(parts) + 1)]
    observed = [(edges[i], edges[i + 1]) for i in range(1, len(parts), 2) if parts[i]]
    log_probs = [-0.5] * T
    for start, stop in observed:
        log_probs[start:stop] = [0.0] * (stop - start)
    made = make_rollout(range(first_id, first_id + T), log_probs=log_probs, versions=versions, reason=reason)
    starts = tuple(RowStart(start=start, prompt_ids=ids) for start, ids in rows)
    return msgspec.structs.replace(made, observed=tuple(observed), rows=starts)


def episode(
    *turns: tuple[int, int],
    rewards: Sequence[float | None] = (),
    states: Sequence[str | None] = (),
    reward: float | None = None,
    failed: str = "",
    environment: str = "Game",
    calls: Sequence[tuple[ToolCall, ...]] = (),
    seconds: float = 0.0,
) -> Episode:
    """One with turns over these tokens. `states`: of the opening and after each turn but the last."""
    named = [*states, *[None] * (len(turns) + 1 - len(states))]
    given = [*rewards, *[None] * (len(turns) - len(rewards))]
    called = [*calls, *[()] * (len(turns) - len(calls))]
    return Episode(
        environment=environment,
        opening=Answer(said={}, state=named[0], seconds=seconds),
        turns=tuple(
            Turn(
                start=start,
                stop=stop,
                answer=Answer(
                    said={"role": "assistant", "content": f"turn {index}"},
                    messages=({"role": "user", "content": f"seen {index}"},) if index < len(turns) - 1 else (),
                    reward=given[index],
                    state=named[index + 1],
                    calls=called[index],
                    seconds=seconds,
                ),
            )
            for index, (start, stop) in enumerate(turns)
        ),
        reward=reward,
        failed=failed,
    )


def played(
    rollouts: Sequence[Rollout],
    episodes: Sequence[Episode] = (),
    scores: Sequence[float | None] = (),
    *,
    step: int = 0,
    place: int = 0,
    attempt: int = 0,
    faulted: Sequence[int] = (),
) -> ScoredGroup:
    """A scored group of them, by one reward named `r`."""
    group = RolloutGroup(prompt=make_prompt(step, place, attempt), rollouts=tuple(rollouts), episodes=tuple(episodes))
    return ScoredGroup(group=group, scores={"r": tuple(scores)}, faulted=tuple(faulted))
