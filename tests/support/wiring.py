"""Whole runs in virtual time: everything real but what takes time or room.

Supervisor, pipeline, actors, channels, credits and reward manager are the real ones. Faked are the device threads (a
call takes virtual seconds), the engine, the gradient step, the checkpoint files and the sinks. "Weights" are one
number: a hash of all that ever led to them, so two runs that end with equal ones were given the same all along.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import troupe  # noqa: F401 - before MLX
from tests.support.acting import ScriptedSession
from tests.support.fakes import DirectSinkThread
from troupe import RunConfig
from troupe.actors.checkpointer import CheckpointWriter
from troupe.actors.evaluator.conditions import Conditions
from troupe.actors.evaluator.decoding import EvalSet
from troupe.actors.evaluator.settings import EvaluationSet
from troupe.actors.learner.gathering import StepGroups, gid_of
from troupe.actors.learner.train import BatchTrainer, LearnerState
from troupe.actors.schedule import PromptSchedule
from troupe.dataset import PromptDataset
from troupe.grpo import Batch, StepResult
from troupe.messages import (
    GroupClosed,
    Incident,
    Pause,
    Prompt,
    Replace,
    Resume,
    ScoredGroup,
    Slot,
    Snapshot,
    Span,
    Step,
    Update,
)
from troupe.policy import Base, Companions, CompletedGroup, Completion, RolloutRequest
from troupe.rewards import RewardManager
from troupe.run.curriculum import curriculum_for
from troupe.run.inputs import Inputs
from troupe.run.ledgers import Factories
from troupe.run.prepare import Prepared, Start
from troupe.run.resume.newest import Identity, Restored
from troupe.runtime.device import DeviceThread, Turns
from troupe.runtime.mailbox import Channel, Mailbox, Overflow

DATA = ("prompts", "rollouts", "scored", "closed")
"""Channels on the way of a group, which must hold all that are alive."""
SENDERS = {
    "prompts": "prompter",
    "turns": "generator",
    "sampled": "generator",
    "observations": "environment",
    "rollouts": "generator",
    "scored": "scorer",
}
"""Channel → who sends into it, where it is an actor that may fail."""
LONGEST = 5
"""Tokens of a completion, at most."""


def digest(*things: object) -> bytes:
    """32 bytes that follow from the things."""
    return hashlib.sha256(repr(things).encode()).digest()


class Hooks:
    """What may be made to go wrong in a run; each is asked at its moment and may raise."""

    def delay_s(self, who: str) -> float:
        """Virtual seconds of the next call on a device."""
        return 0.0

    def on_step(self, who: str, place: str) -> None:
        """An actor, or its device, has come to a place where it may fail."""

    def on_write(self, snapshot: Snapshot) -> None:
        """A checkpoint is about to be written."""

    def on_sink(self, message: object) -> None:
        """A sink is about to write."""

    def bound(self, channel: str, asked: int) -> int:
        """How many messages a channel holds that should hold as many as asked."""
        return asked

    def is_finite(self, batch: bytes) -> bool:
        """Whether the gradient of the batch of this hash is."""
        return True


class VirtualExecutor:
    """In the place of a device's thread: calls one after the other, each made when its virtual time is over."""

    def __init__(self, name: str, hooks: Hooks) -> None:
        self._name = name
        self._hooks = hooks
        self._free_at_s = 0.0
        self._closed = False
        self._waiting: deque[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = deque()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if self._closed:
            raise RuntimeError("the device is closed")
        loop = asyncio.get_running_loop()
        self._free_at_s = max(loop.time(), self._free_at_s) + self._hooks.delay_s(self._name)
        future: Future[Any] = Future()
        self._waiting.append((future, function, args))
        loop.call_at(self._free_at_s, self._perform)  # timers of one moment come in any order, calls do not
        return future

    def shutdown(self, *, wait: bool) -> None:
        self._closed = True

    def _perform(self) -> None:
        future, function, args = self._waiting.popleft()
        try:
            self._hooks.on_step(self._name, "compute")
            result = function(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)


class VirtualDevice(DeviceThread):
    """The real `run`, on a thread that is none."""

    def __init__(self, name: str, hooks: Hooks) -> None:
        self._executor: Any = VirtualExecutor(name, hooks)
        self.turns = Turns()

    async def close(self) -> None:
        """There is no thread whose streams end with it."""
        self._executor.shutdown(wait=True)


class ScriptedEngine:
    """Its lengths follow from the key, its tokens from weights, key, sample and what came before."""

    tokens = 0

    def __init__(self, generations: int) -> None:
        self._generations = generations
        self._loaded: tuple[Any, int] | None = None
        self._aborted = False

    def load(self, weights: Any, version: int) -> None:
        self._loaded = (weights, version)

    def abort(self) -> None:
        self._aborted = True

    def release(self) -> None:
        self._loaded = None

    def loaded(self) -> tuple[Any, int]:
        assert self._loaded is not None, "decoding without weights"
        return self._loaded

    def session(self, *, sessions: int = 1) -> ScriptedSession:
        return ScriptedSession(self, together=True)

    def open_session(self) -> Any:
        return ScriptedSession(self)

    def decode_lists(self, requests: Sequence[RolloutRequest]) -> Iterator[list[CompletedGroup]]:
        assert self._loaded is not None, "decoding without weights"
        self._aborted = False
        return self._decode(list(requests))

    def _decode(self, requests: Sequence[RolloutRequest]) -> Iterator[list[CompletedGroup]]:
        lengths = [[1 + byte % LONGEST for byte in digest(r.key)[: self._generations]] for r in requests]
        groups: list[list[list[int]]] = [[[] for _ in wanted] for wanted in lengths]
        versions: list[int] = []
        for t in range(max(map(max, lengths))):
            assert self._loaded is not None, "decoding without weights"
            weights, version = self._loaded
            versions.append(version)
            for request, group, wanted in zip(requests, groups, lengths, strict=True):
                noise = digest(weights["w"], request.prompt_ids, request.key, group)
                for sample, length in enumerate(wanted):
                    if t < length:
                        group[sample].append(noise[sample] % 64)
            ends = [
                i for i, wanted in enumerate(lengths) if max(wanted) == t + 1 or (self._aborted and max(wanted) > t)
            ]
            if ends:
                yield [_completed(index, groups[index], versions) for index in ends]
            if self._aborted:
                return


def _completed(index: int, samples: Sequence[Sequence[int]], versions: Sequence[int]) -> CompletedGroup:
    log_probs = [tuple(-0.5 - token / 64 for token in tokens) for tokens in samples]
    completions = [
        Completion(
            token_ids=tuple(tokens),
            log_probs=numbers,
            sampling_log_probs=numbers,
            versions=tuple(versions[: len(tokens)]),
            finish_reason="stop" if len(tokens) < LONGEST else "length",
        )
        for tokens, numbers in zip(samples, log_probs, strict=True)
    ]
    return CompletedGroup(index=index, completions=tuple(completions))


class Ledger:
    """What was seen on the channels, in order, and every rule that was broken on the way."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Most groups that may be alive."""
        self.broken: list[str] = []
        self.issued: dict[int, Slot] = {}
        self.alive: set[int] = set()
        self.most_alive = 0
        self.closed: Counter[int] = Counter()
        self.states: Counter[str] = Counter()
        self.updates: list[Update] = []
        self.incidents: Counter[str] = Counter()
        self.learned: list[bytes] = []
        """A hash for each gradient step, of all that it was given."""
        self.written: list[int] = []
        """Versions of checkpoints, in order."""
        self.final: int | None = None
        self._may_begin: float = math.inf
        """Steps that may begin, as far as the requests go that the prompter has taken."""

    def obey(self, request: object) -> None:
        """Take note of what the prompter was told."""
        if isinstance(request, Pause):
            self._may_begin = 0 if self._may_begin == math.inf else self._may_begin  # what was granted in it stays
        elif isinstance(request, Resume):
            self._may_begin = math.inf
        elif isinstance(request, Step):
            self._may_begin += request.steps

    def see(self, channel: str, message: object) -> None:
        """Take note of a message as it is put into a channel."""
        if isinstance(message, Prompt) and channel == "prompts":
            self._issued(message)
        elif isinstance(message, GroupClosed) and channel == "closed":
            self._left(message.gid, "closed")
        elif isinstance(message, Replace):
            for slot in message.slots:
                self._left(next(gid for gid, issued in self.issued.items() if issued == slot), "replaced")
        elif isinstance(message, GroupClosed) and channel == "closed groups":
            self.closed[message.gid] += 1
            self.states[message.state] += 1
        elif isinstance(message, Update) and channel == "updates":
            self.updates.append(message)
        elif isinstance(message, Incident):
            self.incidents[message.kind] += 1

    def _issued(self, prompt: Prompt) -> None:
        if prompt.gid in self.issued:
            self.broken.append(f"group {prompt.gid} was issued twice")
        if prompt.slot.place == prompt.slot.attempt == 0:
            self._may_begin -= 1
            if self._may_begin < 0:
                self.broken.append(f"step {prompt.slot.step} was begun in a pause")
        self.issued[prompt.gid] = prompt.slot
        self.alive.add(prompt.gid)
        self.most_alive = max(self.most_alive, len(self.alive))
        if len(self.alive) > self.limit:
            self.broken.append(f"{len(self.alive)} groups are alive, {self.limit} may be")

    def _left(self, gid: int, how: str) -> None:
        if gid not in self.alive:
            self.broken.append(f"group {gid} was {how}, but is not alive")
        self.alive.discard(gid)


class SilentSink:
    """Writes nothing."""

    name = "silent"
    takes: tuple[type, ...] = (Update, GroupClosed, Incident, Span)  # no Status: its timer would hide deadlocks

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    def open(self) -> None:
        pass

    def write(self, message: object) -> None:
        self._hooks.on_sink(message)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def prepared_run(config: RunConfig, rewards: RewardManager, rows: int, acting_setup: Any = None) -> Prepared:
    """What `prepare` would give, for weights that are one number. `acting_setup`: where the policy acts."""
    assert config.output is not None
    dataset = PromptDataset.from_rows([{"prompt": f"prompt {i}", "answer": str(i)} for i in range(rows)])
    tokenizer = SimpleNamespace(decode_sampled=lambda ids: " ".join(map(str, ids)), pad_token_id=0)
    policy: Any = SimpleNamespace(
        config=None,
        tokenizer=tokenizer,
        eos_ids=frozenset(),
        pad_id=0,
        weights={"w": b"untrained"},
        base=Base(),
        path=None,
        companions=Companions(),
        notices=[],
        having=lambda weights: policy,
    )
    memory: Any = SimpleNamespace(limit_gb=None)
    sets = _sets(rewards) if config.evaluation.every else ()
    return Prepared(
        config=config,
        folder=Path(config.output),
        inputs=Inputs(
            config=config,
            source=Path(config.output),
            fingerprint="model",
            policy=policy,
            dataset=dataset,
            schedule=PromptSchedule(
                dataset,
                [(1 + i, 2) for i in range(rows)],
                batch_size=config.learner.batch_size,
                seed=config.seed,
                shuffle=True,
                curriculum=curriculum_for(config, dataset, rewards),
            ),
            sets=sets,
            conditions={of.name: Conditions(of, of.settings.generation(config.generation)) for of in sets},
            rewards=rewards,
            longest_prompt=2,
            acting_setup=acting_setup,
            total_steps=config.learner.max_steps or 1,
            description="",
            notices=(),
        ),
        memory=memory,
        start=Start(
            identity=Identity(dataset="", model="", rewards=rewards.names),
            policy=policy,
            reference=None,
            optimizer_state={},
            checkpoint=None,
            restored=Restored(next=0),
        ),
        notices=(),
    )


def _sets(rewards: RewardManager) -> tuple[EvalSet, ...]:
    """A set of three pieces: it asks for so many samples that two rows are one. The engine gives as many as in
    training."""
    settings = EvaluationSet(name="held", path="held.json", num_samples=50, temperature=1.0)
    rows = PromptDataset.from_rows([{"prompt": f"held {i}", "answer": str(i)} for i in range(5)])
    ids = [(63, 1 + i) for i in range(len(rows))]
    return (EvalSet(settings=settings, dataset=rows, prompt_ids=ids, rewards=rewards),)


class WatchedChannel(Channel[Any]):
    """Tells hooks and ledger of every message that it delivers."""

    def __init__(self, *given: Any, hooks: Hooks, ledger: Ledger, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._hooks, self._ledger = hooks, ledger

    def _put(self, message: Any) -> None:
        if self.name in SENDERS:
            self._hooks.on_step(SENDERS[self.name], "send")
        self._ledger.see(self.name, message)
        super()._put(message)


class WatchedMailbox(Mailbox):
    """Its channels are watched, and as long as the hooks say."""

    def __init__(self, name: str, hooks: Hooks, ledger: Ledger) -> None:
        super().__init__(name, clock=lambda: time.perf_counter())
        self._hooks, self._ledger = hooks, ledger

    def channel(
        self, name: str, *types: type, bound: int, overflow: Overflow = "block", side: bool = False
    ) -> Channel[Any]:
        bound = self._hooks.bound(name, bound)
        channel = WatchedChannel(self, name, types, bound, overflow, side=side, hooks=self._hooks, ledger=self._ledger)
        self.channels.append(channel)
        return channel

    async def take(self) -> Any:
        message = await super().take()
        self._hooks.on_step(self.name, "take")
        if self.name == "prompter":
            self._ledger.obey(message)
        return message


class WatchedWriter(CheckpointWriter):
    """Writes nothing."""

    def __init__(self, *given: Any, hooks: Hooks, seen: Ledger, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._hooks, self._seen = hooks, seen

    def write(self, snapshot: Snapshot, give_way: Callable[[], None] = lambda: None) -> None:
        self._hooks.on_write(snapshot)
        self._seen.written.append(snapshot.version)
        if snapshot.final:
            self._seen.final = snapshot.version


def virtual_factories(prepared: Prepared, hooks: Hooks, ledger: Ledger, *, real_statistics: bool = False) -> Factories:
    """What takes time or room, faked."""
    generations = prepared.config.generation.num_generations
    engine: Any = lambda *_, **__: ScriptedEngine(generations)  # noqa: E731
    return Factories(
        prepare=lambda *_, **__: prepared,
        device=partial(VirtualDevice, hooks=hooks),
        mailbox=partial(WatchedMailbox, hooks=hooks, ledger=ledger),
        trainer=partial(ScriptedTrainer, hooks=hooks, ledger=ledger, real_statistics=real_statistics),
        engine=engine,
        writer=partial(WatchedWriter, hooks=hooks, seen=ledger),
        sinks=lambda _: [SilentSink(hooks)],
        sink_thread=DirectSinkThread,
    )


class ScriptedTrainer(BatchTrainer):
    """Learns by hashing, and says nothing of groups.

    `real_statistics`: what is computed of scores with small arrays is not faked; it takes most of the time of a run.
    """

    def __init__(self, *given: Any, hooks: Hooks, ledger: Ledger, real_statistics: bool, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._hooks, self._ledger, self._real = hooks, ledger, real_statistics

    def learn(self, state: LearnerState, batch: Any, on_part: Callable[[str], None]) -> StepResult:
        weights: Any = state.weights
        given = _digest_of_batch(batch)
        self._ledger.learned.append(digest(weights["w"], given, self.learning_rates(state.version)))
        finite = self._hooks.is_finite(given)
        trained: Any = {"w": self._ledger.learned[-1]} if finite else weights
        return StepResult(weights=trained, optimizer_state={}, metrics={"loss": 0.0}, updated=finite)

    def describe(self, step: StepGroups) -> dict[str, float]:
        return super().describe(step) if self._real else {"reward": 0.0}

    def assemble(self, groups: Sequence[ScoredGroup], oldest: int | None) -> Any:
        if self._real:
            return super().assemble(groups, oldest)
        batch = ScriptedBatch((g.group.prompt, g.group.rollouts, g.scores) for g in groups)
        return SimpleNamespace(batch=batch, metrics={}, advantages=[(0.0,) * len(g.group.rollouts) for g in groups])

    def without_signal(self, groups: Sequence[ScoredGroup]) -> set[int]:
        return super().without_signal(groups) if self._real else {gid_of(g) for g in groups if not _has_signal(g)}


class ScriptedBatch(list[Any]):
    """What is hashed, in the place of arrays."""

    completion_mask = SimpleNamespace(sum=lambda: 0.0)


def _digest_of_batch(batch: Any) -> bytes:
    if isinstance(batch, Batch):
        return digest(batch.prompts, batch.completions, batch.advantages.tolist(), batch.completion_mask.tolist())
    return digest(batch)


def _has_signal(group: ScoredGroup) -> bool:
    rewards = [
        sum(score for score in scores if score is not None)
        for scores in zip(*group.scores.values(), strict=True)
        if any(score is not None for score in scores)
    ]
    return len(set(rewards)) > 1
