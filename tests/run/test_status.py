"""Who has which group, what everybody does, and what is told when nothing moves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import msgspec
import pytest

from tests.support.fakes import (
    make_group,
    make_prompt,
    make_scored,
    tiny_config,
    weigh_ids,
    write_prompts,
    write_ragged_model,
)
from tests.support.runs import in_store
from troupe import Supervisor
from troupe.messages import Activity, GroupClosed, Incident, LiveGroup, Prompt, RolloutGroup, ScoredGroup, Slot, Span
from troupe.rewards import RewardActor, RewardSample, Wait
from troupe.run.status import (
    Progress,
    doing,
    gid_of,
    last_movement_s,
    live_groups,
    of_actors,
    queues,
    stall,
    with_needs,
    with_waits,
)
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Mailbox
from troupe.runtime.reporter import Reporter

pytestmark = pytest.mark.anyio


class Working(Actor):
    """Stands about."""

    name: ClassVar[str] = "working"

    def __init__(self, name: str, *, last: bool = False) -> None:
        self.name = name  # type: ignore[misc]
        self.leaves_last = last  # type: ignore[misc]
        reports = Mailbox("reports")
        report = Reporter(
            name,
            reports.channel("incidents", Incident, bound=9),
            reports.channel("spans", Span, bound=9, overflow="drop_oldest"),
        )
        super().__init__(Mailbox(name), report=report)
        self.way_in = self.inbox.channel(f"to {name}", Prompt, RolloutGroup, ScoredGroup, GroupClosed, bound=9)

    async def handle(self, message: Any) -> None:
        raise AssertionError("it is never run")


def actors_of_a_run() -> list[Working]:
    return [Working(name) for name in ("prompter", "generator", "scorer", "learner")]


def alive(*prompts: Prompt, since_s: float = 90.0) -> dict[int, tuple[Slot, float]]:
    return {prompt.gid: (prompt.slot, since_s + i) for i, prompt in enumerate(prompts)}


async def test_a_group_belongs_to_who_has_it_furthest_down_the_line() -> None:
    actors = prompter, generator, scorer, learner = actors_of_a_run()
    prompts = [make_prompt(step, place) for step in range(3) for place in range(2)]
    for prompt in prompts[:5]:
        generator.way_in.send_nowait(prompt)
    for _ in range(4):
        await generator.inbox.take()
    scorer.way_in.send_nowait(make_group(prompts[0]))
    learner.way_in.send_nowait(make_scored(0, 1))
    groups = live_groups(alive(*prompts), actors, 100.0, handed_over={0, 1, 2})
    assert [(group.gid, group.owner, group.waiting) for group in groups] == [
        (0, "scorer", True),
        (1, "learner", True),
        (2, "learner", False),  # handed over, and with nobody else: it is among those that are collected
        (3, "generator", False),
        (4, "generator", True),
        (5, "learner", False),
    ]
    assert [group.age_s for group in groups] == [10.0, 9.0, 8.0, 7.0, 6.0, 5.0]
    assert groups[3].slot == Slot(step=1, place=1)
    await scorer.inbox.take()
    assert not live_groups(alive(prompts[0]), actors, 100.0)[0].waiting
    closed = GroupClosed(gid=5, slot=prompts[5].slot, state="trained", version=1)
    prompter.way_in.send_nowait(closed)
    assert live_groups(alive(prompts[5]), actors, 100.0)[0].owner == "prompter"
    assert gid_of("something else") is None


async def test_queues_are_those_of_the_data_channels() -> None:
    actors = actors_of_a_run()
    actors[0].inbox.channel("control", Prompt, bound=1, side=True).send_nowait(make_prompt(0, 0))
    actors[1].way_in.send_nowait(make_prompt(0, 0))
    assert queues(actors) == {"to prompter": 0, "to generator": 1, "to scorer": 0, "to learner": 0}


async def test_what_everybody_does_is_told_in_words() -> None:
    prompter, generator, scorer, learner = actors_of_a_run()
    with (
        prompter.report.span("idle", kind="wait"),
        learner.report.span("learn", step=3),
        scorer.report.span("score", gid=7),
        scorer.report.span("a"),
        scorer.report.span("b"),
        scorer.report.span("c"),
    ):
        elsewhere = Span(actor="generator", name="generate", start_s=time.perf_counter(), end_s=math.inf, process=7)
        generator.report.forward(msgspec.structs.replace(elsewhere, member="laptop"))
        now_s = time.perf_counter() + 300.0
        told = doing([prompter, generator, scorer, learner], now_s)
    assert told == {
        "prompter": "waits: idle for 300.0 s",
        "generator": "generate at laptop for 300.0 s",
        "scorer": "score of group 7 for 300.0 s, a for 300.0 s, b for 300.0 s, and 1 more",
        "learner": "learn for 300.0 s",
    }
    assert doing([prompter], now_s) == {"prompter": "nothing told"}


async def test_movement_is_a_message_taken_or_work_begun_on_a_device() -> None:
    actors = prompter, _generator, scorer, learner = actors_of_a_run()
    metrics = Working("metrics", last=True)
    begin_s = last_movement_s(actors)
    with scorer.report.span("score"), learner.report.span("idle", kind="wait"):
        assert last_movement_s(actors) == begin_s, "a reward that hangs does not move, nor does one who waits"
    with learner.report.span("learn"):
        learning_s = last_movement_s(actors)
    assert learning_s > begin_s
    metrics.way_in.send_nowait(make_prompt(0, 0))
    await metrics.inbox.take()
    assert last_movement_s([*actors, metrics]) == begin_s
    prompter.way_in.send_nowait(make_prompt(0, 0))
    await prompter.inbox.take()
    assert last_movement_s(actors) == prompter.inbox.moved_s > learning_s
    assert last_movement_s([]) == 0.0


OLDEST = LiveGroup(gid=12, slot=Slot(step=3, place=0, attempt=1), owner="scorer", waiting=False, age_s=640.4)


async def test_a_stall_names_the_oldest_group_and_what_everybody_waits_for() -> None:
    actors = _prompter, _generator, scorer, learner = actors_of_a_run()
    with scorer.report.span("score", gid=12), learner.report.span("idle", kind="wait"):
        incident = stall([OLDEST], actors, time.perf_counter() + 600.0, 600.2)
    assert (incident.actor, incident.kind, incident.gid) == ("supervisor", "stalled", 12)
    assert incident.message == (
        "nothing has moved for 600 s; the oldest group is 12 (step 3, place 0, attempt 1), with scorer, 640 s old; "
        "prompter: nothing told; generator: nothing told; scorer: score of group 12 for 600.0 s; "
        "learner: waits: idle for 600.0 s"
    )
    waiting = LiveGroup(gid=1, slot=Slot(step=0, place=1), owner="learner", waiting=True, age_s=1.0)
    assert "group is 1 (step 0, place 1, attempt 0), waiting for learner, 1 s old" in (
        stall([waiting], actors, 0.0, 600.0).message
    )


async def test_a_device_that_computes_is_named_and_not_called_dead() -> None:
    actors = actors_of_a_run()
    with actors[3].report.span("learn", step=3):
        incident = stall([], actors, time.perf_counter() + 300.0, 300.0)
    assert (incident.kind, incident.gid) == ("long_work", None)
    assert incident.message.startswith(
        "nothing has moved for 300 s; learner is computing `learn` since 300 s; prompter: nothing told; "
    )
    elsewhere = Span(actor="generator", name="generate", start_s=time.perf_counter(), end_s=math.inf, process=7)
    actors[1].report.forward(elsewhere)
    assert "generator is computing `generate` since" in stall([], actors, time.perf_counter(), 300.0).message


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(60):
        while not holds():  # noqa: ASYNC110 - nobody says when
            await anyio.sleep(0.01)


class Generating(Working):
    made = 113


async def test_what_the_actors_are_at_is_read_off_their_spans() -> None:
    prompter, _, scorer, learner = actors_of_a_run()
    generator, checkpointer = Generating("generator"), Working("checkpointer")
    actors = [prompter, generator, scorer, learner, checkpointer]
    now_s = time.perf_counter()
    with prompter.report.span("idle", kind="wait"), scorer.report.span("wait for the round", kind="wait"):
        assert of_actors(actors, now_s, 512) is None
    with checkpointer.report.span("checkpoint", step=3):
        assert of_actors(actors, now_s, 512) == Activity(what="saving step 3")
        with generator.report.span("generate", step=1), learner.report.span("learn", step=0):
            told = of_actors(actors, time.perf_counter() + 45.2, 512)
    assert told is not None
    assert told.what == "generating step 2, learning step 1"
    assert told.detail == ": 113 of at most 512 tokens (45 s)"
    with scorer.report.span("score judge", step=0, gid=1), scorer.report.span("score judge", step=0, gid=2):
        assert of_actors(actors, now_s, 512) == Activity(what="scoring step 1")
    with generator.report.span("generate"):
        assert getattr(of_actors(actors, now_s, 512), "what", None) == "generating"
    teacher = Working("teacher")
    with teacher.report.span("teach", step=0):
        assert of_actors([*actors, teacher], now_s, 512) == Activity(what="asking the teacher about step 1")
    with generator.report.span("start process"):
        assert getattr(of_actors(actors, now_s, 512), "text", None) == "starting the generator"


class Evaluating(Working):
    activity, progress = "evaluating held_out of step 3", "rows 37 / 400"


async def test_how_far_each_is_does_not_change_what_it_is_at() -> None:
    generator, evaluator = Generating("generator"), Evaluating("evaluator")
    with generator.report.span("generate", step=3), evaluator.report.span("evaluate held_out", step=3):
        told = of_actors([generator, evaluator], 0.0, 512)
    assert told is not None
    assert told.what == "generating step 4, evaluating held_out of step 3"
    assert told.detail == ": 113 of at most 512 tokens, rows 37 / 400"


async def test_a_wait_for_an_environment_is_told_when_it_lasts() -> None:
    environment, generator = Working("environment"), Generating("generator")
    actors = [generator, environment]
    with environment.report.span("tool search", gid=1), environment.report.span("step library", gid=2):
        now_s = time.perf_counter()
        assert of_actors(actors, now_s + 1.0, 512) is None
        text = "waiting for tool search and environment library"
        assert of_actors(actors, now_s + 5.0, 512) == Activity(what=text, detail=" (5 s)")
        assert of_actors(actors, now_s + 12.0, 512) == Activity(what=text, detail=" (12 s)", waiting=True)
        with generator.report.span("generate", step=1):
            told = of_actors(actors, time.perf_counter() + 12.0, 512)
    assert told is not None
    assert (told.what, told.waiting) == ("generating step 2", False)
    assert told.detail == f": 113 of at most 512 tokens (12 s); {text} (12 s)"
    wait = Wait(why="no answer", tries=3, for_s=9.0)
    assert getattr(with_waits(None, {"library": wait}, "environment"), "text", "") == (
        "waiting for environment library: no answer (3 tries, 9 s)"
    )


async def test_many_that_are_alike_are_counted() -> None:
    environment = Working("environment")
    with ExitStack() as spans:
        for gid in range(64):
            spans.enter_context(environment.report.span("tool search", gid=gid))
        spans.enter_context(environment.report.span("tool add", gid=1))
        told = doing([environment], time.perf_counter() + 12.0)["environment"]
    assert told == "64 × tool search, the longest for 12.0 s, tool add of group 1 for 12.0 s"


def test_progress_tells_how_far_it_is_and_for_how_long() -> None:
    rig = Progress()
    assert rig.activity(0.0) is None
    with rig.at("held-out rows") as now:
        assert rig.activity(now.since_s) == Activity(what="held-out rows")
        now.done, now.total = 37, 400
        assert rig.activity(now.since_s + 0.9) == Activity(what="held-out rows", detail=" 37 / 400")
        for later_s, told in ((12.0, "12 s"), (180.0, "3 min"), (7501.0, "2 h 05 min")):
            assert getattr(rig.activity(now.since_s + later_s), "text", "") == f"held-out rows 37 / 400 ({told})"
    assert rig.activity(0.0) is None


def test_what_is_waited_for_comes_first() -> None:
    wait = Wait(why="connection refused", tries=12, for_s=34.2)
    assert with_waits(None, {}) is None
    alone = with_waits(None, {"my_judge": wait})
    assert alone is not None
    assert alone.text == "waiting for reward my_judge: connection refused (12 tries, 34 s)"
    assert alone.waiting
    both = with_waits(Activity(what="scoring step 1"), {"a": wait, "b": Wait(why="odd", tries=1, for_s=0.2)})
    assert both is not None
    assert both.what == "waiting for reward a and b"
    assert both.detail == ": connection refused (12 tries, 34 s); odd (1 try, 0 s); scoring step 1"


async def test_what_must_be_brought_comes_before_what_goes_on_meanwhile() -> None:
    class Alone(Working):
        needs = "waiting for a worker: troupe worker --join o/join/worker.toml"

    actors = actors_of_a_run()
    assert with_needs(Activity(what="learning step 1"), actors) == Activity(what="learning step 1")
    told = with_needs(Activity(what="learning step 1"), [*actors, Alone("generator")])
    assert told is not None
    assert told.text == f"{Alone.needs}; learning step 1"
    assert told.waiting


async def test_a_judge_that_does_not_listen_is_told_of_before_the_first_step(
    tmp_path: Path, ragged_model: Path, free_tcp_port: int
) -> None:
    async def my_judge(completions: list[str], **_: Any) -> list[float]:
        await anyio.connect_tcp("127.0.0.1", free_tcp_port)
        raise AssertionError("nobody listens there")

    held_out = write_prompts(tmp_path / "held-out.json", rows=5)
    settings = {"rewards__retries": 1000, "learner__max_steps": 1}
    async with Supervisor(
        tiny_config(ragged_model, tmp_path, **settings, data__eval_path=str(held_out)), [my_judge]
    ) as run:
        await until(lambda: (now := run.status().activity) is not None and now.waiting)
        now = run.status().activity
        assert now is not None
        run.stop()
    assert now.what == "waiting for reward my_judge"
    assert " tries, " in now.detail or "(1 try, " in now.detail
    assert "evaluating held_out of step 0" in now.detail
    assert "rows " in now.detail


async def test_faults_of_held_out_rows_are_stored_and_told_when_they_happen(tmp_path: Path, ragged_model: Path) -> None:
    heard = list[Incident]()

    async def broken(completions: list[str], **_: Any) -> list[float]:
        raise OSError("no route")

    held_out = write_prompts(tmp_path / "held-out.json", rows=5)
    config = tiny_config(ragged_model, tmp_path, metrics__sinks=["sqlite"], data__eval_path=str(held_out))
    async with Supervisor(config, [broken]) as run, anyio.create_task_group() as tasks:

        async def listen() -> None:
            heard.extend([incident async for incident in run.incidents()])

        tasks.start_soon(listen)
        await until(lambda: (run.folder / "run.sqlite").exists() and len(_of_rows(run.folder)) == 5)
        run.stop()
    stored = _of_rows(run.folder)
    told = [f"evaluation of held_out, row {row}: reward broken: OSError: no route" for row in range(5)]
    assert sorted(message.partition(" (")[0] for _, message, _, _ in stored) == told
    assert {(kind, gid) for kind, _, _, gid in stored} == {("reward_error", None)}
    assert {message for _, message, _, _ in stored} <= {incident.message for incident in heard}


def _of_rows(run: Path) -> list[tuple[Any, ...]]:
    return [each for each in _stored(run) if each[1].startswith("evaluation of ")]


def _stored(run: Path) -> list[tuple[Any, ...]]:
    """Kind, message, step and group of every incident; none where the tables are being made."""
    if not in_store(run, "SELECT 1 FROM sqlite_master WHERE name = 'incidents'"):
        return []
    return in_store(run, "SELECT kind, message, step, gid FROM incidents ORDER BY rowid")


async def test_held_out_rows_after_the_last_step_are_told_too(tmp_path: Path, ragged_model: Path) -> None:
    """Of a judge that goes away by then, too."""
    calls = 0

    async def fickle(completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls > 4:  # two rows of the evaluation before, and the two groups of the step
            raise OSError("gone")
        return weigh_ids(completion_ids)

    held_out = write_prompts(tmp_path / "held-out.json", rows=2)
    settings = {"rewards__retries": 0, "metrics__sinks": ["sqlite", "jsonl"], "learner__max_steps": 1}
    config = tiny_config(ragged_model, tmp_path, **settings, data__eval_path=str(held_out))
    async with Supervisor(config, [fickle]) as run:
        await run.wait()
    stored = _stored(run.folder)
    assert [(kind, step) for kind, _, step, _ in stored] == [("reward_error", 1)] * 2
    assert stored[0][1].startswith("evaluation of held_out, row 0: reward fickle: OSError: gone")
    assert run.result.incidents == {"reward_error": 2}
    assert run.status().activity is None


async def test_a_reward_that_does_not_stop_is_in_the_store(tmp_path: Path, ragged_model: Path) -> None:
    class Stubborn(RewardActor):
        async def score(self, sample: RewardSample) -> float:
            return float(len(sample.completion_ids))

        async def stop(self) -> None:
            raise OSError("stuck")

    settings = {"metrics__sinks": ["sqlite"], "learner__max_steps": 1}
    async with Supervisor(tiny_config(ragged_model, tmp_path, **settings), [Stubborn()]) as run:
        await run.wait()
    [(kind, message, _, _)] = _stored(run.folder)
    assert kind == "reward_error"
    assert "did not stop: OSError: stuck" in message


async def test_a_supervisor_that_loads_says_so(tmp_path: Path, ragged_model: Path) -> None:
    run = Supervisor(tiny_config(ragged_model, tmp_path, learner__max_steps=1), [weigh_ids])
    assert run.status().activity is None
    seen: list[Activity | None] = []

    async def look() -> None:
        while not seen or seen[-1] is None:
            seen.append(run.status().activity)
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        async with run:
            run.stop()
    assert seen[-1] is not None
    assert seen[-1].what == "loading the model and the prompts"
    assert msgspec.json.decode(msgspec.json.encode(seen[-1]), type=Activity) == seen[-1]
