"""One run, and everything that was written down of it: every record tells the same story."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import often_equal, weigh_ids
from tests.support.runs import completions, done, in_store, incidents, lines, names_in, refused, summary, train
from troupe.policy import load_policy
from troupe.records.store.completions import StoredCompletion

STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ragged_model: Path) -> Path:
    """A run in which everything happens: groups are replaced, quarantined and trained, and a reward fails once."""
    calls: list[int] = []

    def shaky(completion_ids: list[list[int]], prompts: list[str], **_: Any) -> list[float | None]:
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("a bad day")
        return [None if prompts[0] == "abc" and len(ids) > 9 else score for ids, score in _scored(completion_ids)]

    def agrees(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [2 * score for score in often_equal(completion_ids)]

    settings = {
        "metrics__sinks": ["console", "jsonl", "trace", "sqlite"],
        "metrics__store_log_probs": True,
        "learner__dynamic_sampling": True,
        "learner__max_steps": STEPS,
        "checkpoint__every": 2,
        "schedule__max_staleness": 1,
        "rewards__weights": [1.0, 0.25],
    }
    folder = tmp_path_factory.mktemp("records")
    return Path(train(ragged_model, folder, shaky, agrees, **settings).folder)


def _scored(completion_ids: list[list[int]]) -> list[tuple[list[int], float]]:
    return list(zip(completion_ids, often_equal(completion_ids), strict=True))


def by_step(run: Path) -> dict[int, list[StoredCompletion]]:
    found: defaultdict[int, list[StoredCompletion]] = defaultdict(list)
    for c in completions(run):
        found[c.step].append(c)
    return dict(found)


def test_steps_are_1_2_3_in_every_record(run: Path) -> None:
    steps = list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(run)] == steps
    assert [step for (step,) in in_store(run, "SELECT step FROM steps ORDER BY step")] == steps
    assert sorted(by_step(run)) == steps
    assert summary(run).steps == STEPS


def test_the_summary_counts_the_groups_that_the_store_has(run: Path) -> None:
    states = Counter(state for (state,) in in_store(run, "SELECT state FROM groups"))
    assert states == Counter(summary(run).closed_groups)
    assert set(states) >= {"trained", "filtered"}
    for state in ("trained", "filtered", "quarantined"):
        assert sum(line[f"groups/{state}"] for line in lines(run)) == states[state]


def test_the_mean_reward_of_a_step_is_that_of_its_completions(run: Path) -> None:
    for line in lines(run):
        of_step = by_step(run)[line["step"]]
        for name in ("shaky", "agrees"):
            scores = [score for c in of_step if (score := c.scores[name]) is not None]
            assert line[f"rewards/{name}/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-6)
        totals = [c.reward for c in of_step if c.reward is not None]
        assert line["reward"] == pytest.approx(sum(totals) / len(totals), abs=1e-6)


def test_lengths_and_endings_in_the_metrics_are_those_of_the_completions(run: Path) -> None:
    for line in lines(run):
        of_step = by_step(run)[line["step"]]
        lengths = [len(c.token_ids) for c in of_step]
        assert line["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))
        assert (line["completions/min_length"], line["completions/max_length"]) == (min(lengths), max(lengths))
        ended = [c for c in of_step if c.finish_reason == "stop"]
        assert line["completions/clipped_ratio"] == pytest.approx(1 - len(ended) / len(of_step))


def test_tokens_are_counted_as_they_were_sampled_and_prompted(run: Path) -> None:
    total = 0
    for line in lines(run):
        total += sum(len(str(c.prompt)) + len(c.token_ids) for c in by_step(run)[line["step"]])
        assert line["num_tokens"] == total, "a byte is a token of this model"


def test_texts_are_their_tokens_decoded(run: Path, ragged_model: Path) -> None:
    tokenizer = load_policy(ragged_model).tokenizer
    assert all(c.text == tokenizer.decode_sampled(c.token_ids) for c in completions(run))


def test_every_token_has_the_log_prob_it_was_drawn_with(run: Path) -> None:
    for c in completions(run):
        assert c.log_probs is not None
        assert len(c.log_probs) == len(c.token_ids)
        assert all(value <= 0.0 for value in c.log_probs)


def test_advantages_of_a_group_are_about_0_together_and_rank_as_its_rewards(run: Path) -> None:
    groups: defaultdict[int, list[StoredCompletion]] = defaultdict(list)
    for c in completions(run, state="trained"):
        groups[c.gid].append(c)
    assert groups
    for group in groups.values():
        scored = [c for c in group if c.reward is not None]
        assert sum(c.advantage or 0.0 for c in scored) == pytest.approx(0.0, abs=1e-4)
        by_reward = sorted(scored, key=lambda c: (c.reward or 0.0, c.sample))
        ranked = [c.advantage or 0.0 for c in by_reward]
        assert ranked == pytest.approx(sorted(ranked), abs=1e-6)


def test_the_best_and_the_worst_of_the_overview_are_the_extremes_of_the_newest_step(run: Path) -> None:
    told = json.loads(done("inspect", run, "--json"))
    rewards = [c.reward for c in by_step(run)[STEPS] if c.reward is not None]
    assert told["best"]["reward"] == max(rewards)
    assert told["worst"]["reward"] == min(rewards)
    assert told["newest_step"] == STEPS
    assert told["completions"] == len(completions(run))


def test_the_overview_has_the_rewards_of_the_first_and_the_newest_line(run: Path) -> None:
    told = json.loads(done("inspect", run, "--json"))
    first, *_, newest = lines(run)
    for name in ("reward", "rewards/shaky/mean", "rewards/agrees/mean"):
        assert told["rewards"][name] == [first[name], newest[name]]


def test_incidents_are_the_same_in_summary_overview_and_store(run: Path) -> None:
    counted = Counter(kind for kind, _ in incidents(run))
    assert counted == Counter(summary(run).incidents)
    assert json.loads(done("inspect", run, "--json"))["incidents"] == dict(counted)
    assert any("ValueError: a bad day" in message for _, message in incidents(run))


def test_an_export_has_every_completion_and_reads_back(run: Path, tmp_path: Path) -> None:
    said = done("inspect", run, "--jsonl", tmp_path / "all.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    assert said == f"{len(rows)} completions written to {tmp_path / 'all.jsonl'}\n"
    assert [(row["gid"], row["sample"], row["text"]) for row in rows] == [
        (c.gid, c.sample, c.text) for c in completions(run)
    ]


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (["--step", "2"], lambda c: c.step == 2),
        (["--step", "all", "--state", "filtered"], lambda c: c.state == "filtered"),
        (["--step", "all", "--min-reward", "0.9"], lambda c: c.reward is not None and c.reward >= 0.9),
        (["--step", "all", "--reward", "shaky", "--max-reward", "0"], lambda c: c.scores["shaky"] == 0.0),
        (["--gid", "3"], lambda c: c.gid == 3),
    ],
    ids=["a step", "a state", "a reward", "a score", "a group"],
)
def test_completions_are_found_by(run: Path, flags: list[str], chosen: Any) -> None:
    told = [json.loads(line) for line in done("inspect", run, *flags, "--json").splitlines()]
    expected = [(c.gid, c.sample) for c in completions(run) if chosen(c)]
    assert expected
    assert [(row["gid"], row["sample"]) for row in told] == expected


def test_checkpoints_in_the_store_are_those_on_the_disk(run: Path) -> None:
    standing = in_store(run, "SELECT version, folder, bytes FROM checkpoints WHERE removed_at IS NULL")
    on_disk = {path.name for path in (run / "checkpoints").iterdir()}
    assert {f"step-{version:08d}" for version, _, _ in standing} == on_disk
    for _, folder, size in standing:
        assert sum(path.stat().st_size for path in Path(folder).iterdir() if path.name != "MANIFEST.json") == size


def test_the_trace_opens_and_shows_every_step_learned_and_every_group_scored(run: Path) -> None:
    events = json.loads((run / "trace.json").read_text())
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in slices)
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] in ("thread_name",)}
    for actor in ("prompter", "generator", "scorer", "learner", "checkpointer"):
        assert any(name.startswith(actor) for name in tracks), actor
    learned = {event["args"].get("step") for event in slices if "learn" in event["name"]}
    assert learned >= set(range(STEPS))
    gids = {gid for (gid,) in in_store(run, "SELECT gid FROM groups")}
    drawn = {event["args"]["gid"] for event in slices if "gid" in event.get("args", {})}
    assert gids <= drawn


def test_who_asks_after_the_end_is_told_what_the_summary_says(run: Path) -> None:
    first, reward = done("status", run).splitlines()
    assert first == f"{run}: complete: {STEPS} of {STEPS} steps"
    assert reward.startswith("  reward  ")
    assert reward.endswith(f"  steps 1 to {STEPS}")


def test_a_person_is_shown_the_numbers_that_programs_get(run: Path) -> None:
    shown = done("inspect", run)
    told = json.loads(done("inspect", run, "--json"))
    assert re.search(rf"steps +{STEPS}\n", shown)
    assert re.search(rf"completions +{told['completions']}\n", shown)
    for state, count in told["groups"].items():
        assert f"{count} {state}" in shown
    assert f"{told['rewards']['reward'][1]:.4g}" in shown


def test_without_any_sink_there_is_still_a_policy_and_a_summary(tmp_path: Path, ragged_model: Path) -> None:
    result = train(ragged_model, tmp_path, metrics__sinks=[])
    folder = Path(result.folder)
    assert names_in(folder) == {"run.toml", "summary.json", "checkpoints", "final"}
    assert summary(folder) == result
    assert "metrics.sinks" in refused("inspect", folder)


def test_what_a_policy_writes_cannot_reach_the_terminal_of_who_reads_it(tmp_path: Path, tiny_model: Path) -> None:
    escapes = dict.fromkeys((0x1B, 0x07, 0x0D, ord("[")), 60.0)
    run = train(tiny_model, tmp_path, weigh_ids, generation__logit_bias=escapes, learner__max_steps=1).folder
    assert any("\x1b" in c.text for c in completions(run))
    shown = done("inspect", run, "--step", "all")
    assert "\x1b" not in shown
    assert "\\x1b" in shown
