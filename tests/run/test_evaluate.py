"""Completions and scores without actors: the batch of one step, and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.support.fakes import weigh_ids, write_ragged_model
from troupe.errors import ConfigError, DatasetError, RewardError
from troupe.messages import EvaluatedRow
from troupe.policy import GenerationConfig, RolloutEngine, RolloutRequest, load_policy
from troupe.rewards import RewardsConfig
from troupe.run.evaluate import answer, ask, evaluate_folder
from troupe.run.one_step import generate_and_score

pytestmark = pytest.mark.anyio
GENERATION = GenerationConfig(num_generations=3, max_completion_length=10)


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


async def test_one_step_as_arrays(ragged_model: Path) -> None:
    policy = load_policy(ragged_model)
    batch = await generate_and_score(policy, ["abc", "e"], weigh_ids, generation=GENERATION, seed=3, step=2)

    engine = RolloutEngine(policy.config, GENERATION, stop_ids=policy.eos_ids)
    engine.load(policy.weights, 0)
    requests = [
        RolloutRequest(prompt_ids=tuple(text.encode()), key=(3, 2, place, 0)) for place, text in enumerate(["abc", "e"])
    ]
    groups = sorted(engine.decode(requests), key=lambda group: group.index)
    completions = [completion for group in groups for completion in group.completions]
    T = max(len(completion.token_ids) for completion in completions)
    pad = policy.tokenizer.pad_token_id
    assert batch.prompt_ids.tolist() == [[97, 98, 99]] * 3 + [[pad, pad, 101]] * 3
    assert batch.completion_ids.tolist() == [[*c.token_ids, *[pad] * (T - len(c.token_ids))] for c in completions]
    assert batch.completion_mask.tolist() == [
        [1.0] * len(c.token_ids) + [0.0] * (T - len(c.token_ids)) for c in completions
    ]
    assert batch.texts == tuple(policy.tokenizer.decode_sampled(c.token_ids) for c in completions)

    rewards = np.array(weigh_ids([list(c.token_ids) for c in completions]), dtype=np.float32)
    np.testing.assert_array_equal(np.array(batch.rewards), rewards)
    table = rewards.reshape(2, 3)
    advantages = (table - table.mean(1, keepdims=True)) / (table.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(np.array(batch.advantages), advantages.reshape(-1), atol=1e-5)

    log_probs = policy.compute_log_probs(
        [list(b"abc")] * 3 + [list(b"e")] * 3, [list(c.token_ids) for c in completions]
    )
    mask = np.array(batch.completion_mask)
    np.testing.assert_allclose(np.array(batch.old_log_probs) * mask, np.array(log_probs) * mask, atol=1e-5)
    assert batch.metrics["reward"] == pytest.approx(rewards.mean(), abs=1e-6)


async def test_columns_reach_rewards_and_missing_scores_are_nan(ragged_model: Path) -> None:
    seen: list[Any] = []

    async def some(completions: list[str], level: list[int], **_: Any) -> list[float | None]:
        seen.append(level)
        return [None, 1.0, 0.0] if level[0] == 1 else [None, None, None]

    batch = await generate_and_score(
        load_policy(ragged_model),
        [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}],
        [some],
        generation=GENERATION,
    )
    assert seen == [[1, 1, 1], [2, 2, 2]]
    assert np.isnan(np.array(batch.rewards)).tolist() == [True, False, False, True, True, True]
    assert batch.advantages[0].item() == 0.0
    np.testing.assert_allclose(np.array(batch.advantages)[1:3], np.array([0.5, -0.5]) / (0.5**0.5 + 1e-4), rtol=1e-5)
    assert batch.advantages[3:].tolist() == [0.0] * 3


async def test_conversations_are_templated_and_scored_as_messages(ragged_model: Path) -> None:
    seen: list[Any] = []

    def note(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(i) for i in range(len(completions))]

    messages = [{"role": "user", "content": "hi"}]
    policy = load_policy(ragged_model)
    batch = await generate_and_score(policy, [messages], note, generation=GENERATION)
    assert np.array(batch.prompt_ids)[0].astype(np.uint8).tobytes() == b"[user]hi[assistant]"
    assert [prompt for prompt, _ in seen] == [messages] * 3
    assert [completion for _, completion in seen] == [[{"role": "assistant", "content": text}] for text in batch.texts]


async def test_bad_input_is_refused(ragged_model: Path) -> None:
    policy = load_policy(ragged_model)
    with pytest.raises(DatasetError, match="has 70 tokens, at most 63"):
        await generate_and_score(policy, ["x" * 70], weigh_ids)
    with pytest.raises(DatasetError, match="no rows"):
        await generate_and_score(policy, [], weigh_ids)

    def wants(completions: list[str], level: list[int]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="requires level"):
        await generate_and_score(policy, ["x"], wants)


async def test_greedy_evaluation_equals_the_argmax_of_the_uncached_model(tmp_path: Path, ragged_model: Path) -> None:
    policy = load_policy(ragged_model)
    rows = ["ab", "abcd", "abc"]
    greedy = []
    for prompt in rows:
        ids: list[int] = []
        while len(ids) < 6 and not (ids and ids[-1] in policy.eos_ids):
            logits = policy.model(mx.array([[*prompt.encode(), *ids]]))
            ids.append(int(np.argmax(np.array(logits[0, -1]))))
        greedy.append(policy.tokenizer.decode_sampled(ids))
    table = [
        {"prompt": row, "answer": text if i != 1 else "other"}
        for i, (row, text) in enumerate(zip(rows, greedy, strict=True))
    ]
    (tmp_path / "rows.json").write_text(json.dumps(table))
    result = await evaluate_folder(ragged_model, tmp_path / "rows.json", max_completion_length=6)
    assert result.completions == tuple(greedy)
    assert result.rows == 3
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.rewards == {"exact_answer_reward": pytest.approx(2 / 3)}


def rows_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


async def test_rows_without_an_answer_do_not_count_in_the_accuracy(tmp_path: Path, ragged_model: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": None}]
    none = await evaluate_folder(ragged_model, rows_file(tmp_path, rows), max_completion_length=3)
    assert none.accuracy is None
    rows[1]["answer"] = none.completions[1]
    again = await evaluate_folder(ragged_model, rows_file(tmp_path, rows), max_completion_length=3)
    assert again.accuracy == 1.0


def by_number(completions: list[str], n: list[int], **_: Any) -> list[float]:
    if 6 in n:
        raise ValueError("seven is too many")
    return [float(i) for i in n]


async def test_samples_are_the_same_wherever_it_goes_on_and_faults_are_told(tmp_path: Path, ragged_model: Path) -> None:
    path = rows_file(tmp_path, [{"prompt": "abcde"[: 1 + i % 5], "n": i} for i in range(7)])
    generation = GenerationConfig(temperature=1.0, max_completion_length=8)
    scoring = RewardsConfig(retries=0)
    questions = await ask(path, [by_number], generation=generation, scoring=scoring, num_samples=50)
    told: list[EvaluatedRow] = []
    whole = await answer(ragged_model, questions, each=told.extend)
    assert tuple(told) == whole.table
    assert len(set(whole.completions[:50])) > 1
    rest = await answer(ragged_model, questions, done=whole.table[:4])
    assert rest.table == whole.table
    assert whole.accuracy is None
    assert whole.rewards["by_number"] == pytest.approx((0 + 1 + 2 + 3 + 4 + 5) / 6), "row 6 alone is missing"
    assert whole.figures["missing"] == pytest.approx(1 / 7)
    for result in (whole, rest):
        assert [(incident.kind, incident.gid) for incident in result.incidents] == [("reward_error", 6)]
    gone = await answer(tmp_path / "gone", questions, done=whole.table)
    assert gone.figures == whole.figures


async def test_a_column_may_have_the_name_of_any_internal_argument(tmp_path: Path, ragged_model: Path) -> None:
    def by_gid(completions: list[str], gid: list[int], **_: Any) -> list[float]:
        return [float(number) for number in gid]

    path = rows_file(tmp_path, [{"prompt": "ab", "gid": 5, "trainer": 6, "rewards": 7}])
    result = await evaluate_folder(ragged_model, path, [by_gid], max_completion_length=2)
    assert result.rewards == {"by_gid": 5.0}


async def test_several_samples_want_a_temperature_and_a_limit_takes_the_first_rows(
    tmp_path: Path, ragged_model: Path
) -> None:
    path = rows_file(tmp_path, [{"prompt": text, "answer": "1"} for text in "abc"])
    with pytest.raises(ConfigError, match="2 samples a row at temperature 0 are all alike"):
        await evaluate_folder(ragged_model, path, num_samples=2)
    result = await evaluate_folder(ragged_model, path, num_samples=2, temperature=1.0, limit=2, max_completion_length=2)
    assert [(row.row, row.prompt, len(row.samples)) for row in result.table] == [(0, "a", 2), (1, "b", 2)]


async def test_evaluation_without_answers_needs_a_reward(tmp_path: Path, ragged_model: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(RewardError, match="no `answer` column and no reward is named"):
        await evaluate_folder(ragged_model, tmp_path / "rows.jsonl")
    result = await evaluate_folder(ragged_model, tmp_path / "rows.jsonl", ["length", weigh_ids], temperature=1.0)
    assert list(result.rewards) == ["length_reward", "weigh_ids"]
