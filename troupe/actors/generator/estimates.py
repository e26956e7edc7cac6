"""Estimates: in the free schedule, whether the log-probs that a worker tells can be those of the policy.

Bits differ there between machines, and weights change while a completion is sampled, so that no answer can be decoded
anew and compared. But the policy of this moment gives the same tokens nearly the same log-probs, and a lie does not.
"""

from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from troupe.actors.generator.audits import drawn
from troupe.actors.generator.parts import Part
from troupe.messages import RolloutGroup

_FEWEST_TOKENS = 256
"""Of a worker, before anything is said about it."""
_TOKENS = 4096
"""Of late, that count."""

LogProbs: TypeAlias = Callable[[RolloutGroup], Awaitable[Sequence[Sequence[float]]]]
"""A group → the log-probs of its tokens under the newest weights, a row a completion."""


class Estimates:
    """What was seen of each worker's log-probs."""

    def __init__(self, log_probs: LogProbs, *, share: float, bound: float, seed: int = 0) -> None:
        """`share`: of all parts that are looked at, 0 to 1. `bound`: of the mean difference, in nats a token."""
        self._log_probs, self._share, self._bound, self._seed = log_probs, share, bound, seed
        self._seen: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_TOKENS))

    def chooses(self, part: Part) -> bool:
        """Whether a part is one to be looked at; one of an evaluation is of other weights than the newest, and not."""
        return part.set is None and drawn(self._seed, part.name) < self._share

    async def of(self, name: str, group: RolloutGroup) -> float | None:
        """The mean difference of a worker's log-probs from the policy's, where it is over the bound."""
        own = await self._log_probs(group)
        seen = self._seen[name]
        for rollout, row in zip(group.rollouts, own, strict=True):
            seen.extend(abs(told - true) for told, true in zip(rollout.log_probs, row, strict=False))
        mean = sum(seen) / max(1, len(seen))
        return mean if len(seen) >= _FEWEST_TOKENS and mean > self._bound else None

    def forget(self, name: str) -> None:
        """A worker begins anew."""
        self._seen.pop(name, None)
