"""A worker that generates without a generator: what it answers follows from gid and sample. It may lie and die."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import count
from typing import Any

import anyio
import msgspec

from troupe.actors.generator.checks import bits_of
from troupe.actors.generator.cluster_wire import (
    Done,
    KinAnswer,
    PartFrame,
    Pull,
    decode_accepted,
    decode_kin_verdict,
    decode_pulled,
    decode_terms,
)
from troupe.actors.generator.wire import Completed, pack_rollout, unpack_prompt
from troupe.cluster.bus import Bus, NoAnswer, hub_subject
from troupe.cluster.wire import (
    BEAT_S,
    Admitted,
    Ask,
    Beat,
    Declined,
    Hello,
    Incomplete,
    Over,
    Unknown,
    Whole,
    Wrong,
    decode_admitted,
    decode_answer,
    decode_pulse,
    pieces_of,
)
from troupe.messages import Prompt, Rollout, RolloutGroup
from troupe.runtime.frames import encode

G = 2
VOCABULARY = 50
_INSTANCES = count(1)


def completions(prompt: Prompt, version: int) -> RolloutGroup:
    """What everybody answers who is honest."""
    rollouts = []
    for sample in range(G):
        seed = hashlib.sha256(f"{prompt.gid} {sample} {version}".encode()).digest()
        ids = tuple(2 + each % (VOCABULARY - 2) for each in seed[: 1 + seed[0] % 4])
        rollouts.append(
            Rollout(
                token_ids=(*ids, 1),
                log_probs=(*(-each / 64 for each in ids), -0.5),
                sampling_log_probs=(*(-each / 64 for each in ids), -0.5),
                versions=(version,) * (len(ids) + 1),
                finish_reason="stop",
                text=text_of((*ids, 1)),
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def text_of(ids: Any) -> str:
    """Stands for a tokenizer."""
    return " ".join(map(str, ids))


def other_log_probs(group: RolloutGroup) -> RolloutGroup:
    """A lie that only bits tell."""
    first = group.rollouts[0]
    changed = (first.log_probs[0] - 2**-20, *first.log_probs[1:])
    lie = msgspec.structs.replace(first, log_probs=changed, sampling_log_probs=changed)
    return msgspec.structs.replace(group, rollouts=(lie, *group.rollouts[1:]))


def other_tokens(group: RolloutGroup) -> RolloutGroup:
    """A lie that looks like another draw."""
    first = group.rollouts[0]
    ids = (first.token_ids[0] % (VOCABULARY - 2) + 2, *first.token_ids[1:])
    lie = msgspec.structs.replace(first, token_ids=ids, text=text_of(ids))
    return msgspec.structs.replace(group, rollouts=(lie, *group.rollouts[1:]))


class Ended(Exception):  # noqa: N818 - how a worker's life ends
    """The hub has said why."""


class FakeWorker:
    """`run` asks for work until the hub says that it is over."""

    def __init__(
        self,
        bus: Bus,
        run: str,
        *,
        seconds: Callable[[PartFrame], float] = lambda part: 1.0,
        answers: Callable[[RolloutGroup], RolloutGroup] = lambda group: group,
        kin: Callable[[RolloutGroup], RolloutGroup] | None = None,
        most: int = 1,
    ) -> None:
        """`seconds`: that a part takes. `answers`: what it makes of the honest answer; `kin`: of the probe's."""
        self.bus, self.name, self._run = bus, bus.name, run
        self.seconds, self.answers, self.kin, self.most = seconds, answers, kin or (lambda group: group), most
        self.instance = f"i{next(_INSTANCES)}"
        self.session = ""
        self.held: dict[str, PartFrame] = {}
        self.version = 0
        self.number = 0
        self.decoded: list[str] = []
        self.verdicts: list[str] = []
        self.why = ""
        self._message = 0

    async def ask(self, verb: str, body: bytes) -> bytes:
        """Asked until it is answered."""
        self._message += 1
        frames = pieces_of(body, session="" if verb == "hello" else self.session, message=self._message)
        due = list(range(len(frames)))
        while True:
            for number in due:
                answer = await self.ask_once(verb, frames[number])
            match answer:
                case Whole(body=reply):
                    return reply
                case Incomplete(missing=missing):
                    due = list(missing)
                case Unknown():
                    raise LookupError
                case Declined(reason=reason, later=later):
                    if not later:
                        raise Ended(reason)
                    await anyio.sleep(1.0)
                case Wrong(reason=reason):
                    raise Ended(f"wrong: {reason}")
                case Over():
                    raise Ended("over")

    async def ask_once(self, verb: str, frame: Ask) -> Any:
        """One frame, until some answer comes."""
        while True:
            try:
                data = await self.bus.request(hub_subject(self._run, self.name, verb), encode(frame), timeout_s=25.0)
                return decode_answer(data)
            except NoAnswer:
                await anyio.sleep(0.5)

    async def run(self) -> None:
        """Until the hub ends it; `why` says how."""
        try:
            while True:
                try:
                    await self.hello()
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(self._beat)
                        await self._work()
                except* LookupError:
                    self.held.clear()
        except* Ended as ended:
            self.why = str(ended.exceptions[0])

    async def hello(self) -> Admitted:
        """Join, and show that it is kin."""
        admitted = decode_admitted(await self.ask("hello", encode(Hello(instance=self.instance))))
        self.session, self.number = admitted.session, 0
        probe = decode_terms(admitted.details["generate"]).probe
        while probe is not None:
            groups = [self.kin(completions(unpack_prompt(p), probe.part.version or 0)) for p in probe.part.prompts]
            ids, log_probs = bits_of(groups)
            answer = KinAnswer(version=probe.part.version or 0, token_ids=ids, log_probs=log_probs)
            verdict = decode_kin_verdict(await self.ask("kin", encode(answer)))
            probe = None if verdict.admitted else verdict.probe
        return admitted

    async def pull(self) -> tuple[PartFrame, ...]:
        """What there is to do."""
        self.number += 1
        pulled = decode_pulled(await self.ask("pull", encode(Pull(number=self.number, most=self.most))))
        self.held |= {part.name: part for part in pulled.parts}
        return pulled.parts

    async def complete(self, part: PartFrame, version: int) -> None:
        """Decode a part and tell of it."""
        for packed in part.prompts:
            group = self.answers(completions(unpack_prompt(packed), version))
            self.verdicts.append(await self.tell(part.name, group))
            self.decoded.append(f"{part.name}:{group.prompt.gid}")

    async def tell(self, part: str, group: RolloutGroup) -> str:
        """One group."""
        completed = Completed(gid=group.prompt.gid, rollouts=tuple(map(pack_rollout, group.rollouts)))
        return decode_accepted(await self.ask("done", encode(Done(part=part, completed=completed)))).verdict

    async def _work(self) -> None:
        while True:
            for part in await self.pull():
                await anyio.sleep(self.seconds(part))
                if part.name in self.held:
                    await self.complete(part, self.version if part.version is None else part.version)
                    self.held.pop(part.name, None)

    async def _beat(self) -> None:
        while True:
            now_s = anyio.current_time()
            beat = Beat(clock_s=now_s, held={"generate": tuple(self.held)}, pulled={"generate": self.number})
            if self.held or not self.number:
                beat = msgspec.structs.replace(beat, pulled={"generate": self.number})
            else:  # the newest pull may have been answered and its answer be on the way
                beat = msgspec.structs.replace(beat, pulled={"generate": self.number - 1})
            pulse = decode_pulse(await self.ask("beat", encode(beat)))
            for name in pulse.drop.get("generate", ()):
                self.held.pop(name, None)
            await anyio.sleep(BEAT_S)
