"""RemoteGenerator: prompts go out and completions come back, whoever is at the other end."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import mlx.core as mx
import msgspec
import pytest

from tests.actors.generator.child_generator import OF_EVERY
from tests.support.fakes import Reports, device_thread, ended, make_prompt, taken
from tests.support.tiny import CONFIG
from troupe.actors.generator import process as generator_process
from troupe.actors.generator.child import GeneratorChild
from troupe.actors.generator.local import LocalProcesses
from troupe.actors.generator.remote import RemoteGenerator
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import (
    Made,
    NewWeights,
    Setup,
    ToProcess,
    decode_from_process,
)
from troupe.errors import ModelError, RunError
from troupe.messages import Incident, Prompt, RolloutGroup, Span
from troupe.policy import GenerationConfig
from troupe.runtime.board import PolicyBoard
from troupe.runtime.frames import FrameError, MessageError
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.process import ChildEnded
from troupe.runtime.roles import Restarts, Role, run_roles

pytestmark = pytest.mark.anyio
CHILD = "tests.actors.generator.child_generator"
SETUP = Setup(
    name="generator",
    policy=CONFIG,
    generation=GenerationConfig(),
    stop_ids=(),
    tokenizer="/nowhere",
    seed=7,
    max_staleness=1,
    most_at_once=None,
    live=9,
    on_cpu=True,
)


class Rig:
    """A remote generator; version 0 is on the board."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        does: str = "",
        *,
        setups: Sequence[Setup] = (SETUP,),
        module: str = CHILD,
    ) -> None:
        monkeypatch.setenv("CHILD_DOES", does)
        self.reports, self.inbox, self.scorer = Reports(), Mailbox("generator"), Mailbox("scorer")
        self.prompts: Channel[Prompt] = self.inbox.channel("prompts", Prompt, bound=9)
        self.board: PolicyBoard[Any] = PolicyBoard(1)
        self.board.publish(0, {"w": mx.array([0.0, 1.0, 2.0])})
        self.folder = folder
        self.files = WeightsFiles(folder, at_once=3, shared_memory=folder / "none")
        self.handed_over: set[int] = set()
        report = self.reports.reporter("generator")
        self.local = partial(
            LocalProcesses,
            setups,
            board=self.board,
            files=self.files,
            device=device_thread("weights"),
            report=report,
            module=module,
            restarts=Restarts(limit=1, first_s=0.01),
        )
        self.make = partial(
            RemoteGenerator,
            self.inbox,
            self.scorer.channel("rollouts", RolloutGroup, bound=9),
            members=lambda: [self.local()],
            board=self.board,
            parts=len(setups) if setups[0].most_at_once is None else None,
            handed_over=self.handed_over,
            report=report,
        )

    async def run(self, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        for prompt in prompts:
            await self.prompts.send(prompt)
        self.prompts.close()
        with anyio.fail_after(60):
            await run_roles([Role(self.make)], Restarts(limit=1, first_s=0.01))
        assert ended(self.scorer)
        return await taken(self.scorer)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*.safetensors"))


async def test_groups_come_back_whole_and_the_end_travels_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch)
    prompts = [make_prompt(0, 0), make_prompt(0, 1)]
    groups = await rig.run(prompts[::-1])
    assert [group.prompt for group in groups] == prompts
    assert all(group.rollouts == (OF_EVERY,) * 2 for group in groups)
    assert rig.handed_over == set()
    assert len(rig.inbox) == 0
    assert rig.left() == ["00000000.safetensors"], "the board still holds it"
    rig.files.close()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


async def test_how_far_the_process_is_is_known_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, hand_over = [], RemoteGenerator._hand_over

    async def watched(generator: RemoteGenerator, group: RolloutGroup) -> None:
        seen.append(generator.made)
        await hand_over(generator, group)

    monkeypatch.setattr(RemoteGenerator, "_hand_over", watched)
    await Rig(tmp_path, monkeypatch).run([make_prompt(0, 0), make_prompt(0, 1)])
    assert seen == [7, 7]


async def test_a_process_tells_how_far_it_is_when_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator_process, "_MADE_EVERY_S", 0.001)
    part = generator_process.GeneratorProcess.__new__(generator_process.GeneratorProcess)
    generator, frames = SimpleNamespace(made=0), list[bytes]()

    async def send(frame: bytes) -> None:
        frames.append(frame)
        generator.made = min(generator.made + 1, 3)

    part._generator, part._connection = generator, SimpleNamespace(send=send)  # type: ignore[assignment]
    with anyio.move_on_after(0.05):
        await part._tell_made()
    assert frames == []
    generator.made = 1
    with anyio.move_on_after(0.2):
        await part._tell_made()
    assert [decode_from_process(frame) for frame in frames] == [Made(tokens=n) for n in (1, 2, 3)]


async def test_spans_come_by_our_clock_and_incidents_come_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_s = time.perf_counter()
    rig = Rig(tmp_path, monkeypatch)
    await rig.run([make_prompt(0, 0), make_prompt(0, 1)])
    reports = await taken(rig.reports.mailbox)
    spans = [report for report in reports if isinstance(report, Span) and report.name == "generate"]
    assert len(spans) == 2
    off_s = 5.0  # far less than the clocks differ by, and more than half of what a message takes on a busy machine
    assert all(before_s - off_s < span.start_s < time.perf_counter() + off_s for span in spans)
    assert [report.kind for report in reports if isinstance(report, Incident)] == ["bored"]


async def test_a_process_that_tells_of_a_span_before_it_tells_the_time_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, does="span first")
    assert len(await rig.run([make_prompt(0, 0), make_prompt(0, 1)])) == 2
    assert [r.kind for r in await taken(rig.reports.mailbox) if isinstance(r, Incident)] == ["bored"]


async def test_prompts_are_dealt_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch, setups=[SETUP, SETUP])
    prompts = [make_prompt(0, place, round_size=3) for place in range(3)]
    groups = {group.prompt.slot.place: group for group in await rig.run(prompts)}
    # the child says by the number of completions how many prompts of the round it was given
    assert [len(groups[place].rollouts) for place in range(3)] == [2, 1, 2]


async def test_old_versions_go_when_the_board_lets_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch)
    actor = rig.make()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(actor.run)
        for step in range(4):
            if step > 1:
                rig.board.publish(step - 1, {"w": mx.array([0.0, 1.0, 2.0])})
            for place in range(2):
                await rig.prompts.send(make_prompt(step, place))
            with anyio.fail_after(60):
                for _ in range(2):
                    await anext(rig.scorer)
        assert not +rig.files._lent, "nothing is kept of a version that was read"
        rig.prompts.close()
    assert rig.left() == ["00000001.safetensors", "00000002.safetensors"]
    rig.files.close()


async def test_free_prompts_go_at_once_and_versions_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    rig = Rig(tmp_path, monkeypatch, setups=[msgspec.structs.replace(SETUP, most_at_once=4)])
    groups = await rig.run([make_prompt(0, 0, round_size=9), make_prompt(5, 1, round_size=9)])
    assert [group.prompt.slot.step for group in groups] == [0, 5], "no step need be whole"
    assert rig.left() == ["00000000.safetensors"]
    rig.files.close()


async def test_free_prompts_follow_the_newest_version_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long its file takes: the process loads what it is told in order, so none is completed with older ones."""
    told: list[int | str] = []
    send, write = GeneratorChild._send, WeightsFiles.write

    async def listed(child: GeneratorChild, message: ToProcess) -> None:
        told.append(message.version if isinstance(message, NewWeights) else type(message).__name__)
        await send(child, message)

    def slow(files: WeightsFiles, version: int, weights: Any) -> Path:
        time.sleep(0.05)
        return write(files, version, weights)

    monkeypatch.setattr(GeneratorChild, "_send", listed)
    monkeypatch.setattr(WeightsFiles, "write", slow)
    rig = Rig(tmp_path, monkeypatch, setups=[msgspec.structs.replace(SETUP, most_at_once=4)])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.make().run)
        for version in range(3):
            if version:
                rig.board.publish(version, {"w": mx.array([0.0, 1.0, 2.0])})
            await rig.prompts.send(make_prompt(version, 0))
            with anyio.fail_after(60):
                await anext(rig.scorer)
        rig.prompts.close()
    assert told == ["Setup", "Ping", 0, "Prompts", 1, "Prompts", 2, "Prompts", "End"]
    rig.files.close()


@pytest.mark.parametrize(
    ("does", "cause", "message"),
    [
        (
            "die",
            ChildEnded,
            r"(?s)tests\.actors\.generator\.child_generator \(pid \d+\) ended with exit code 1.*ValueError: out of",
        ),
        ("garbage", FrameError, r"a frame of 1,416,128,883 bytes was announced, over the limit"),
        ("frame", MessageError, r"a frame of 10 bytes between the generator and its process is no message"),
        ("turn", MessageError, r"sent Ready out of turn"),
    ],
)
async def test_a_process_that_fails_again_and_again_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, cause: type[Exception], message: str
) -> None:
    rig = Rig(tmp_path, monkeypatch, does)
    with pytest.raises(RunError, match=message) as caught:
        await rig.run([make_prompt(0, 0), make_prompt(0, 1)])
    assert isinstance(caught.value.__cause__, cause)
    assert "it was restarted 1 times" in str(caught.value)
    assert [incident.kind for incident in await rig.reports.incidents()] == ["process_restarted"]
    assert len(rig.inbox.in_hand) == 2, "nothing was lost"
    rig.files.close()


async def test_a_module_that_cannot_be_imported_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(tmp_path, monkeypatch, module="tests.actors.no_such_module")
    with pytest.raises(RunError, match=r"(?s)exit code 1; its last lines:.*No module named tests\.actors\.no_such"):
        await rig.run([make_prompt(0, 0), make_prompt(0, 1)])


@pytest.mark.parametrize(
    ("does", "error", "message"),
    [("refuse", ModelError, "no such folder"), ("refuse strangely", RunError, "what is that")],
)
async def test_what_no_restart_mends_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, error: type[Exception], message: str
) -> None:
    rig = Rig(tmp_path, monkeypatch, does)
    with pytest.raises(error, match=message):
        await rig.run([make_prompt(0, 0), make_prompt(0, 1)])
    assert await rig.reports.incidents() == []


async def test_a_folder_without_tokenizer_is_refused_by_the_process_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, monkeypatch, module="troupe.actors.generator.process")
    with pytest.raises(ModelError, match="/nowhere"):
        await rig.run([make_prompt(0, 0), make_prompt(0, 1)])


async def test_a_process_that_dies_between_two_groups_is_followed_by_one_that_does_the_round_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHILD_MARK", str(tmp_path / "mark"))
    rig = Rig(tmp_path, monkeypatch, "die once")
    prompts = [make_prompt(0, 0), make_prompt(0, 1)]
    groups = await rig.run(prompts)
    assert [group.prompt for group in groups] == prompts, "each once"
    assert [incident.kind for incident in await rig.reports.incidents()] == ["process_restarted", "bored"]
    rig.files.close()


async def test_one_of_two_processes_dies_and_the_other_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHILD_MARK", str(tmp_path / "mark"))
    started, start = list[int](), GeneratorChild.start

    async def counted(*args: Any, **options: Any) -> GeneratorChild:
        child = await start(*args, **options)
        started.append(child.pid)
        return child

    monkeypatch.setattr(GeneratorChild, "start", counted)
    rig = Rig(tmp_path, monkeypatch, "die once", setups=[SETUP, msgspec.structs.replace(SETUP, name="other")])
    prompts = [make_prompt(step, place, batch_size=4) for step in range(2) for place in range(4)]
    groups = await rig.run(prompts)
    assert sorted(group.prompt.gid for group in groups) == sorted(prompt.gid for prompt in prompts)
    assert len(started) <= 3, "where it is over before, the dead one needs no successor"
    assert [i.kind for i in await rig.reports.incidents() if i.kind != "bored"] == ["process_restarted"]
    rig.files.close()
