"""What a trainer tells its daemon besides its steps: incidents, and excerpts of what the policy wrote.

A bounded place between a run, which waits for nobody, and the wire: what is too much is left out, the oldest first.
"""

import re
from collections import deque

import anyio
import msgspec

from troupe.daemon.trainer.frames import EndedGroup, Excerpt, Happened
from troupe.messages import GroupClosed, Incident, ScoredGroup
from troupe.records.conversations import conversation_in, sampled_tokens, shortened
from troupe.records.text import prompt_text

_INCIDENTS, _GROUPS = 16, 8
"""Told at once, at most."""
_MESSAGE_CHARS, _PROMPT_CHARS, _TEXT_CHARS = 1000, 1200, 2000
_SAID, _SAID_CHARS, _CALLS = 24, 600, 8
"""Messages of a conversation, characters of each, and calls in one."""
_ROW = re.compile(r"(?<=^evaluation of )(.+?), row \d+(?=: )")
"""Which row of a set a fault is of: run.sqlite has it, and here hundreds are alike."""


class News:
    """Takes messages at any time, gives what is to be told when somebody asks."""

    def __init__(self) -> None:
        self._incidents: dict[tuple[str, str, str], tuple[Incident, int]] = {}
        self._groups: deque[GroupClosed] = deque(maxlen=_GROUPS)
        self._left_out = 0
        self._came = anyio.Event()

    def add(self, message: Incident | GroupClosed) -> None:
        """One more."""
        if isinstance(message, Incident):
            message = msgspec.structs.replace(message, message=_ROW.sub(r"\1", message.message))
            key = message.actor, message.kind, message.message
            times = self._incidents.pop(key, (message, 0))[1] + 1
            if len(self._incidents) == _INCIDENTS:
                self._left_out += self._incidents.pop(next(iter(self._incidents)))[1]
            self._incidents[key] = message, times
        elif message.scored is not None:
            self._groups.append(message)
        self._came.set()

    async def some(self) -> None:
        """Wait until there is something to be told."""
        await self._came.wait()

    def __bool__(self) -> bool:
        return self._came.is_set()

    def collect(self) -> Happened:
        """What there is; it is not told again."""
        told = Happened(
            incidents=tuple(
                msgspec.structs.replace(incident, message=_cut(incident.message, _MESSAGE_CHARS))
                for incident, _ in self._incidents.values()
            ),
            times=tuple(times for _, times in self._incidents.values()),
            left_out=self._left_out,
            groups=tuple(map(excerpt, self._groups)),
        )
        self._incidents.clear()
        self._groups.clear()
        self._left_out, self._came = 0, anyio.Event()
        return told


def excerpt(closed: GroupClosed) -> EndedGroup:
    """A group that was sampled, with the best and the worst of its completions; where all are alike, the first two."""
    assert closed.scored is not None
    group, rewards = closed.scored.group, closed.rewards or (None,) * len(closed.scored.group.rollouts)
    scored = [sample for sample, reward in enumerate(rewards) if reward is not None]
    value = {sample: rewards[sample] or 0.0 for sample in scored}
    chosen = list(range(min(2, len(rewards))))
    if len(set(value.values())) > 1:
        chosen = [max(scored, key=value.__getitem__), min(scored, key=value.__getitem__)]
    return EndedGroup(
        gid=closed.gid,
        step=closed.version,
        state=closed.state,
        prompt=_cut(prompt_text(group.prompt.prompt), _PROMPT_CHARS),
        rewards=tuple(rewards),
        samples=tuple(_excerpt(closed.scored, sample, rewards[sample]) for sample in chosen),
    )


def _excerpt(scored: ScoredGroup, sample: int, reward: float | None) -> Excerpt:
    rollout = scored.group.rollouts[sample]
    said = shortened(conversation_in(scored.group, sample), _SAID_CHARS, _SAID, most_calls=_CALLS)
    tokens = sampled_tokens(rollout)
    return Excerpt(
        sample=sample,
        text="" if said else _cut(rollout.text, _TEXT_CHARS),
        tokens=tokens,
        finish_reason=rollout.finish_reason,
        reward=reward,
        scores={name: values[sample] for name, values in scored.scores.items()},
        said=said,
        read=len(rollout.token_ids) - tokens,
    )


def _cut(text: str, chars: int) -> str:
    """At most so many characters, the middle left out, as UTF-8 can say them."""
    if len(text) > chars:
        half = chars // 2
        text = f"{text[:half]} […] {text[-half:]}"
    return text.encode(errors="replace").decode()
