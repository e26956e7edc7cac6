"""Stand-ins for an actor's neighbours, small messages, and a run that takes a fraction of a second."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import msgspec

from tests.support.tiny import CONFIG, write_tiny_model
from troupe import RunConfig, load_config
from troupe.messages import FinishReason, Incident, Prompt, Rollout, RolloutGroup, ScoredGroup, Slot, Span
from troupe.policy import CompletedGroup, Completion, RolloutRequest, Weights
from troupe.records.sinks.thread import SinkThread
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

BATCH_SIZE, NUM_GENERATIONS = 2, 3
RAGGED = msgspec.structs.replace(CONFIG, eos_token_id=(256, *range(24)))
"""One of these ids ends a completion after some ten tokens, so that groups are ready at different times."""

OPEN_DEVICES: list[DeviceThread] = []
"""What `device_thread` has given out and nobody has closed."""


def device_thread(name: str) -> DeviceThread:
    """A device thread for an actor that runs alone; closed when the test is done."""
    OPEN_DEVICES.append(DeviceThread(name))
    return OPEN_DEVICES[-1]


async def taken(mailbox: Mailbox) -> list[Any]:
    """Every message that waits in a mailbox now."""
    return [await anext(mailbox) for _ in range(len(mailbox))]


def ended(mailbox: Mailbox) -> bool:
    """Whether every sender has closed its channel."""
    return all(channel.closed or channel.side for channel in mailbox.channels)


class Reports:
    """What actors report: the incidents and spans that a Reporter sent."""

    def __init__(self) -> None:
        self.mailbox = Mailbox("reports")

    def reporter(self, actor: str) -> Reporter:
        """A reporter whose reports arrive here."""
        return Reporter(
            actor,
            self.mailbox.channel("incidents", Incident, bound=99),
            self.mailbox.channel("spans", Span, bound=99, overflow="drop_oldest"),
        )

    async def incidents(self) -> list[Incident]:
        """The incidents that wait; spans among them are dropped."""
        return [message for message in await taken(self.mailbox) if isinstance(message, Incident)]


def make_prompt(
    step: int,
    place: int,
    attempt: int = 0,
    *,
    batch_size: int = BATCH_SIZE,
    round_size: int | None = None,
    **columns: Any,
) -> Prompt:
    """The prompt of a slot, one of a whole step if not told otherwise; its ids tell slots apart."""
    number = step * batch_size + place
    return Prompt(
        gid=number + attempt * 2**48,
        slot=Slot(step=step, place=place, attempt=attempt),
        epoch=0,
        row=number,
        prompt=f"prompt {number}",
        prompt_ids=(65 + step, 66 + place, 67 + attempt)[: 2 + (place + attempt) % 2],
        columns=columns,
        round_size=batch_size if round_size is None else round_size,
    )


def make_rollout(
    ids: Sequence[int],
    *,
    log_probs: Sequence[float] | None = None,
    versions: Sequence[int] | None = None,
    reason: FinishReason = "stop",
    text: str = "",
) -> Rollout:
    """A completion; its log-probs are −1 and its tokens of version 0 if not told otherwise."""
    given = (-1.0,) * len(ids) if log_probs is None else tuple(log_probs)
    return Rollout(
        token_ids=tuple(ids),
        log_probs=given,
        sampling_log_probs=given,
        versions=(0,) * len(ids) if versions is None else tuple(versions),
        finish_reason=reason,
        text=text,
    )


def make_group(prompt: Prompt, *, size: int = NUM_GENERATIONS, version: int = 0) -> RolloutGroup:
    """A group whose completions differ in length and ids, as a function of the gid alone."""
    dice = random.Random(prompt.gid)
    rollouts = []
    for _ in range(size):
        ids = tuple(dice.randrange(100) for _ in range(dice.randrange(2, 6)))
        log_probs = tuple(-5.0 - dice.random() for _ in ids)
        versions, text = (version,) * len(ids), " ".join(map(str, ids))
        rollouts.append(make_rollout(ids, log_probs=log_probs, versions=versions, text=text))
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def make_scored(
    step: int, place: int, scores: Sequence[float | None] = (0.0, 1.0, 0.5), *, version: int = 0, attempt: int = 0
) -> ScoredGroup:
    """A scored group of a slot, by one reward named `r`."""
    group = make_group(make_prompt(step, place, attempt), size=len(scores), version=version)
    return ScoredGroup(group=group, scores={"r": tuple(scores)})


class FakeEngine:
    """An engine whose groups come in a chosen order; it remembers what it was asked for."""

    tokens = 0

    def __init__(self, order: Sequence[int], *, between: Callable[[], None] = lambda: None) -> None:
        self.order = order
        self.between = between
        """Called on the device thread before each group."""
        self.loaded: list[tuple[Weights, int]] = []
        self.requests: list[list[RolloutRequest]] = []
        self.aborted = False
        self.released = 0

    def load(self, weights: Weights, version: int) -> None:
        self.loaded.append((weights, version))

    def abort(self) -> None:
        self.aborted = True

    def release(self) -> None:
        self.released += 1

    def decode_lists(self, requests: Sequence[RolloutRequest]) -> Iterator[list[CompletedGroup]]:
        return ([group] for group in self.decode(requests))

    def decode(self, requests: Sequence[RolloutRequest]) -> Iterator[CompletedGroup]:
        self.requests.append(list(requests))
        version = self.loaded[-1][1]
        for index in self.order:
            self.between()
            ids = (72, 105, 33 + index)
            completion = Completion(
                token_ids=ids,
                log_probs=(-1.0, -2.0, -3.0),
                sampling_log_probs=(-1.5, -2.5, -3.5),
                versions=(version,) * 3,
                finish_reason="length",
            )
            yield CompletedGroup(index=index, completions=(completion, completion))


class FakeSink:
    """A sink that keeps what it gets, and raises for the types of messages in `refuses`."""

    takes: tuple[type, ...] = (object,)

    def __init__(self, name: str = "fake", refuses: tuple[type, ...] = (), *, opens: bool = True) -> None:
        self.name = name
        self.refuses = refuses
        self.opens = opens
        self.got: list[object] = []
        self.attempts = 0
        self.closed = 0

    def open(self) -> None:
        if not self.opens:
            raise OSError("no such device")

    def write(self, message: object) -> None:
        if isinstance(message, self.refuses):
            self.attempts += 1
            raise OSError("disk full")
        self.got.append(message)

    def flush(self) -> None:
        """What it has got is there."""

    def close(self) -> None:
        self.closed += 1


class DirectSinkThread(SinkThread):
    """In the place of `SinkThread`: a sink's work is done at once, by who gives the message."""

    def _start(self) -> None:
        self._open()

    def put(self, message: object) -> None:
        if self._fault is None:
            self._write([message])

    def finish(self, *, abandon: bool = False) -> None:
        if not self.ended.done():
            self._close()


async def send_all(channel: Channel[Any], messages: Sequence[Any]) -> None:
    """Send and close: all that the actor will ever get."""
    for message in messages:
        await channel.send(message)
    channel.close()


def same_bits(one: Mapping[str, mx.array], other: Mapping[str, mx.array]) -> bool:
    """Whether both hold the same names with the same values bit for bit."""
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


def weigh_ids(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that differs between completions and is a function of their ids alone."""
    return [sum(ids) % 13 / 13 for ids in completion_ids]


def ones(completions: list[str], **_: Any) -> list[float]:
    """A reward that is the same for everybody, and so teaches nothing."""
    return [1.0] * len(completions)


def often_equal(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that many groups agree on."""
    return [float(sum(ids) % 5 == 0) for ids in completion_ids]


def delayed(seed: int, most_s: float = 0.005, reward: Callable[..., list[float]] = weigh_ids) -> Callable[..., Any]:
    """The same reward, async, each call after a random while of at most `most_s` seconds."""
    dice = random.Random(seed)

    async def later(completion_ids: list[list[int]], **_: Any) -> list[float]:
        await anyio.sleep(dice.random() * most_s)
        return reward(completion_ids)

    later.__name__ = reward.__name__
    return later


def write_prompts(path: Path, rows: int = 5) -> Path:
    """A dataset of short prompts of different lengths with an `answer` column."""
    table = [{"prompt": "abcdefgh"[: 2 + i % 4], "answer": str(i)} for i in range(rows)]
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def write_ragged_model(folder: Path) -> Path:
    """A tiny model of which completions end early."""
    return write_tiny_model(folder, RAGGED)


def tiny_config(model: Path, folder: Path, **settings: Any) -> RunConfig:
    """A run of 4 steps × 2 prompts × 3 completions in `folder`/run; settings as `section__key=value`."""
    folder.mkdir(parents=True, exist_ok=True)
    base: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {"path": str(write_prompts(folder / "prompts.json"))},
        "generation": {"num_generations": NUM_GENERATIONS, "max_completion_length": 12},
        "rewards": {"retries": 0},
        "learner": {"lr": 1e-2, "batch_size": BATCH_SIZE, "max_steps": 4},
        "checkpoint": {"every": 50, "keep": 10},
        "metrics": {"sinks": ["jsonl", "trace"]},
        "schedule": {"generator": "thread"},
    }
    for name, value in settings.items():
        section, _, key = name.rpartition("__")
        if section:
            base.setdefault(section, {})[key] = value
        else:
            base[key] = value
    return load_config(None, [base])
