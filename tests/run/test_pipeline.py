"""The whole cast: the same bits as a plain loop whatever the timing, work that overlaps, groups that close once."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.fakes import (
    BATCH_SIZE,
    FakeSink,
    delayed,
    often_equal,
    same_bits,
    tiny_config,
    weigh_ids,
    write_ragged_model,
)
from tests.support.straight import run_straight
from troupe import load_config
from troupe.checkpoint import Checkpoint, load_checkpoint
from troupe.messages import GroupClosed, Update
from troupe.policy import load_policy
from troupe.run.ledgers import Factories
from troupe.run.memory import peak_bytes
from troupe.run.pipeline import build_pipeline
from troupe.run.prepare import prepare
from troupe.runtime.memory import GB, RESERVE


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


def last_checkpoint(run: str | Path, version: int = 4) -> Checkpoint:
    return load_checkpoint(Path(run) / "checkpoints" / f"step-{version:08d}")


DYNAMIC = {"learner__dynamic_sampling": True, "learner__max_resampling_attempts": 2, "learner__batch_size": 3}
SYNCED = {"learner__beta": 0.05, "learner__sync_ref_model": True, "learner__ref_model_mixup_alpha": 0.3}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"schedule__max_staleness": 1},
        {"learner__num_iterations": 2, "learner__gradient_accumulation_steps": 2, "learner__beta": 0.05},
        {"generation__temperature": 0.7, "generation__top_k": 20, "seed": 5, "learner__loss_type": "dr_grpo"},
        pytest.param(
            {**SYNCED, "learner__ref_model_sync_steps": 3, "learner__num_iterations": 2}, marks=pytest.mark.slow
        ),
        {**SYNCED, "learner__ref_model_sync_steps": 1, "schedule__max_staleness": 1, "learner__num_iterations": 2},
        {"learner__use_adaptive_entropy": True, "learner__entropy_target": 9.0, "learner__entropy_coef_delta": 0.01},
    ],
    ids=["on-policy", "stale", "passes and reference", "filters", "synced", "synced twice a step", "entropy"],
)
def test_a_run_equals_the_plain_loop_bit_for_bit(tmp_path: Path, ragged_model: Path, settings: dict[str, Any]) -> None:
    config = tiny_config(ragged_model, tmp_path, **settings)
    result = troupe.train(config, [delayed(seed=1)])
    straight = run_straight(config, weigh_ids)
    stored = last_checkpoint(result.folder)
    assert same_bits(stored.weights, straight.weights)
    assert same_bits(stored.optimizer_state, straight.optimizer_state)
    assert same_bits(load_policy(Path(result.folder) / "final").weights, straight.weights)
    assert not same_bits(straight.weights, load_policy(ragged_model).weights), "something was learned"
    assert stored.state.num_tokens == straight.num_tokens
    if config.learner.sync_ref_model:
        assert stored.reference is not None
        assert straight.reference is not None
        assert same_bits(stored.reference, straight.reference)
        assert not same_bits(stored.reference, load_policy(ragged_model).weights), "the reference moved"
    else:
        assert stored.reference is None


@pytest.mark.parametrize(
    ("attempts", "max_staleness"),
    [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (1, 1), (2, 1)))],
)
def test_dynamic_sampling_equals_the_plain_loop_whatever_the_delays(
    tmp_path: Path, ragged_model: Path, max_staleness: int, attempts: int
) -> None:
    settings = DYNAMIC | {"schedule__max_staleness": max_staleness, "learner__max_resampling_attempts": attempts}
    straight = run_straight(tiny_config(ragged_model, tmp_path, **settings), often_equal)
    assert sum(straight.filtered) >= 3, "the case is worth its name"
    closed: list[list[GroupClosed]] = []
    for seed in range(2):
        sink = FakeSink()
        config = tiny_config(ragged_model, tmp_path / str(seed), **settings)
        result = troupe.train(config, [delayed(seed, reward=often_equal)], factories=with_sinks(sink))
        stored = last_checkpoint(result.folder)
        assert same_bits(stored.weights, straight.weights)
        assert same_bits(stored.optimizer_state, straight.optimizer_state)
        assert stored.state.num_tokens == straight.num_tokens
        updates = [message for message in sink.got if isinstance(message, Update)]
        assert [update.metrics["groups/filtered"] for update in updates] == straight.filtered
        closed.append([message for message in sink.got if isinstance(message, GroupClosed)])
        assert result.closed_groups["filtered"] == sum(straight.filtered)
    assert all(messages == closed[0] for messages in closed)
    assert len({message.gid for message in closed[0]}) == len(closed[0]), "every group is closed once"
    places: dict[tuple[int, int], list[GroupClosed]] = defaultdict(list)
    for message in closed[0]:
        places[message.slot.step, message.slot.place].append(message)
    assert len(places) == 4 * DYNAMIC["learner__batch_size"]
    for messages in places.values():
        assert [message.slot.attempt for message in messages] == list(range(len(messages)))
        *before, last = [message.state for message in messages]
        assert set(before) <= {"filtered"}
        assert last == "trained" or (last == "filtered" and len(messages) == attempts + 1)


@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_delays_change_nothing(tmp_path: Path, ragged_model: Path, max_staleness: int) -> None:
    runs = []
    for name, reward in (("sync", weigh_ids), ("late", delayed(seed=2)), ("later", delayed(seed=3))):
        config = tiny_config(ragged_model, tmp_path / name, schedule__max_staleness=max_staleness)
        runs.append(last_checkpoint(troupe.train(config, [reward]).folder))
    for other in runs[1:]:
        assert same_bits(other.weights, runs[0].weights)
        assert same_bits(other.optimizer_state, runs[0].optimizer_state)
        assert other.behind.keys() == runs[0].behind.keys()
        assert all(same_bits(other.behind[version], runs[0].behind[version]) for version in other.behind)


def test_staleness_and_seed_do_change_the_run(tmp_path: Path, ragged_model: Path) -> None:
    finals = []
    for name, settings in (("a", {}), ("b", {"schedule__max_staleness": 1}), ("c", {"seed": 1})):
        config = tiny_config(ragged_model, tmp_path / name, **settings)
        finals.append(last_checkpoint(troupe.train(config, [weigh_ids]).folder).weights)
    assert not same_bits(finals[0], finals[1])
    assert not same_bits(finals[0], finals[2])


def spans(run: str, name: str) -> list[tuple[float, float, int]]:
    """(start, end, step) of the spans of a name."""
    events = json.loads((Path(run) / "trace.json").read_text())
    return [(e["ts"], e["ts"] + e["dur"], e["args"]["step"]) for e in events if e["ph"] == "X" and e["name"] == name]


def test_early_groups_are_scored_while_their_step_is_still_generated(tmp_path: Path, ragged_model: Path) -> None:
    async def quick(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return weigh_ids(completion_ids)

    config = tiny_config(
        ragged_model, tmp_path, learner__batch_size=4, generation__max_completion_length=48, learner__max_steps=3
    )
    run = troupe.train(config, [quick]).folder
    ends = {step: end for _, end, step in spans(run, "generate")}
    early = [step for _, end, step in spans(run, "score quick") if end < ends[step]]
    assert early, "no group was scored before the generation of its step had ended"
    learned = {step: start for start, _, step in spans(run, "learn")}
    begun = {step: start for start, _, step in spans(run, "generate")}
    assert all(begun[step + 1] > learned[step] for step in (0, 1)), "on-policy: nothing is generated ahead"


def test_with_one_version_of_staleness_generation_overlaps_learning(tmp_path: Path, ragged_model: Path) -> None:
    config = tiny_config(ragged_model, tmp_path, schedule__max_staleness=1, learner__max_steps=5)
    run = troupe.train(config, [weigh_ids]).folder
    generated = {step: (start, end) for start, end, step in spans(run, "generate")}
    overlaps = [
        step
        for start, end, step in spans(run, "learn")
        if step + 1 in generated and generated[step + 1][0] < end and start < generated[step + 1][1]
    ]
    assert overlaps


def with_sinks(*sinks: FakeSink) -> Factories:
    return Factories(sinks=lambda prepared: list(sinks))


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_group_is_closed_once_and_every_step_told_in_order(
    tmp_path: Path, ragged_model: Path, max_staleness: int
) -> None:
    def moody(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completion_ids) if prompts[0] == "abc" else list(weigh_ids(completion_ids))

    sink = FakeSink()
    config = tiny_config(ragged_model, tmp_path, schedule__max_staleness=max_staleness)
    result = troupe.train(config, [moody], factories=with_sinks(sink))
    closed = [message for message in sink.got if isinstance(message, GroupClosed)]
    assert [message.gid for message in closed] == list(range(4 * BATCH_SIZE))
    assert [message.version for message in closed] == [1, 1, 2, 2, 3, 3, 4, 4]
    quarantined = sum(message.state == "quarantined" for message in closed)
    assert quarantined >= 1
    assert result.closed_groups == {"trained": 4 * BATCH_SIZE - quarantined, "quarantined": quarantined}
    assert result.incidents == {"group_quarantined": quarantined}
    updates = [message for message in sink.got if isinstance(message, Update)]
    assert [update.step for update in updates] == [1, 2, 3, 4]
    assert [update.metrics["staleness"] for update in updates] == [0.0, *[float(max_staleness)] * 3]


@pytest.mark.parametrize("max_staleness", [0, 1])
def test_every_data_channel_holds_all_live_groups(tmp_path: Path, ragged_model: Path, max_staleness: int) -> None:
    config = tiny_config(ragged_model, tmp_path, schedule__max_staleness=max_staleness)
    built = build_pipeline(prepare(config, [weigh_ids]))
    bounds = {stats.name: stats.bound for a in built.actors for c in a.inbox.channels for stats in [c.stats()]}
    live = (max_staleness + 1) * BATCH_SIZE
    assert {bounds[name] for name in ("prompts", "rollouts", "scored", "closed", "closed groups")} == {live}
    assert [actor.name for actor in built.actors] == [
        "prompter", "generator", "scorer", "learner", "checkpointer", "metrics"
    ]  # fmt: skip


@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_run_below_a_memory_limit_equals_the_plain_loop_with_its_choices(
    tmp_path: Path, ragged_model: Path, max_staleness: int
) -> None:
    settings: dict[str, Any] = {"schedule__max_staleness": max_staleness, "checkpoint__every": 1}
    settings["learner__gradient_checkpointing"] = True
    least = {"checkpoint__overlap": False, "learner__gradient_accumulation_steps": 6}
    needed = prepare(tiny_config(ragged_model, tmp_path, **settings, **least)).memory.phases
    config = tiny_config(ragged_model, tmp_path, **settings, memory_limit_gb=peak_bytes(needed) / GB / (1.0 - RESERVE))
    result = troupe.train(config, [delayed(seed=1)])
    chosen = load_config(Path(result.folder) / "run.toml")
    assert (chosen.checkpoint.overlap, chosen.generation.memory_limit_gb is None) == (False, False)
    assert (chosen.learner.gradient_accumulation_steps or 0) > 1
    straight = run_straight(chosen, weigh_ids)
    assert same_bits(last_checkpoint(result.folder).weights, straight.weights)
    assert same_bits(last_checkpoint(result.folder).optimizer_state, straight.optimizer_state)
