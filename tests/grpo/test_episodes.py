"""The loss of episodes: tokens that were only read, as TRL's loss has them, and completions of several rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trl import assert_close
from troupe.grpo import (
    Batch,
    LearnerConfig,
    adamw_init,
    discounted_returns,
    make_batch,
    train_on_batch,
    turn_advantages,
)
from troupe.grpo.batch import micro_batches
from troupe.grpo.batch_gradient import BatchGradient
from troupe.grpo.log_probs import DifferentiatedByMlx
from troupe.policy.network.packing import distinct_prompts

FOLDER = Path(__file__).parents[1] / "data" / "trl"
VECTORS = json.loads((FOLDER / "episodes.json").read_text())
TENSORS: dict[str, mx.array] = mx.load(str(FOLDER / "episodes.safetensors"))  # type: ignore[assignment]
LIMIT = VECTORS["max_completion_length"]
OFF: dict[str, Any] = {"vllm_importance_sampling_correction": False}


def case_tensors(number: int) -> dict[str, mx.array]:
    start = f"{number}/"
    return {name.removeprefix(start): value for name, value in TENSORS.items() if name.startswith(start)}


def gradient_of(
    batch: Batch, config: LearnerConfig, new: dict[str, mx.array], old: mx.array, ref: mx.array
) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """Through all that a step does with a batch; the weights are log-probs and entropies, a row each."""

    def statistics(weights: Any, part: Batch) -> tuple[mx.array, mx.array]:
        rows = mx.array([completion[0] for completion in part.completions])  # the first id says which row it is
        T = part.completion_mask.shape[1]
        return weights["logps"][rows, :T], weights["entropies"][rows, :T]

    gradient = BatchGradient(
        {**new, "logps": old},
        batch,
        DifferentiatedByMlx(statistics),
        config,
        ref_weights={**new, "logps": ref},
        max_completion_length=LIMIT,
        streams=(),
    )
    return gradient.at(new, config.entropy_coef, 0)


def numbered(lengths: list[int]) -> list[list[int]]:
    return [[row] * length for row, length in enumerate(lengths)]


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("number", range(len(VECTORS["episodes"])))
def test_loss_and_gradient_are_those_of_trl_with_a_tool_mask(number: int, micro: int) -> None:
    case, x = VECTORS["episodes"][number], case_tensors(number)
    sampled, old = (np.array(x[name]).tolist() for name in ("tool_mask", "old"))
    settings = {name: value for name, value in case["settings"].items() if value is not None}
    config = LearnerConfig(**settings, num_iterations=2, gradient_accumulation_steps=micro, **OFF)
    lengths: list[int] = mx.sum(x["completion_mask"], axis=1).astype(mx.int32).tolist()  # type: ignore[assignment]
    batch = make_batch(
        [[1]] * len(lengths),
        numbered(lengths),
        [row[:length] for row, length in zip(old, lengths, strict=True)],
        x["advantages"],
        pad_id=0,
        sampled=[list(map(bool, row[:length])) for row, length in zip(sampled, lengths, strict=True)],
    )
    new = {"logps": x["logps"], "entropies": x["entropies"]}
    grads, values = gradient_of(batch, config, new, x["old"], x["ref"])
    assert_close(values["loss"].item(), case["loss"], 1e-5)
    assert_close(grads["logps"], x["grad/logps"], 1e-5)
    assert_close(grads["entropies"], x["grad/entropies"], 1e-5)


TOKEN_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"]


@pytest.mark.parametrize("loss_type", TOKEN_LOSSES)
def test_a_history_told_anew_changes_nothing_of_what_a_completion_weighs(loss_type: Any) -> None:
    """Two completions, one in a row, the other in three; and the same tokens in a row each: equal losses."""
    dice = np.random.default_rng(3)
    config = LearnerConfig(loss_type=loss_type, beta=0.1, entropy_coef=0.01, num_iterations=2, **OFF)
    logps, drift, entropies = (mx.array(dice.normal(0, s, (2, 9)).astype(np.float32)) for s in (1.0, 0.4, 1.0))
    mask = [[True] * 5 + [False] * 2, [True, True, False, True, False, True, True, True, False]]
    advantages = [0.7, -1.1]
    one = make_batch([[1], [1]], numbered([7, 9]), [[0.0] * 7, [0.0] * 9], advantages, pad_id=0, sampled=mask)
    cuts = [(0, 0, 7), (1, 0, 3), (1, 3, 4), (1, 4, 9)]
    many = make_batch(
        [[1], [1], [1, 2], [1, 2, 3]],
        numbered([stop - start for _, start, stop in cuts]),
        [[0.0] * (stop - start) for _, start, stop in cuts],
        [advantages[sample] for sample, _, _ in cuts],
        pad_id=0,
        sampled=[mask[sample][start:stop] for sample, start, stop in cuts],
        samples=[sample for sample, _, _ in cuts],
    )

    def laid_out(x: mx.array) -> mx.array:
        rows = [mx.pad(x[sample, start:stop], (0, 9 - (stop - start))) for sample, start, stop in cuts]
        return mx.stack(rows)

    def as_before(x: mx.array) -> mx.array:
        parts = [
            [x[row, : stop - start] for row, (s, start, stop) in enumerate(cuts) if s == sample] for sample in (0, 1)
        ]
        whole = [mx.concatenate(part) for part in parts]
        return mx.stack([mx.pad(row, (0, 9 - row.size)) for row in whole])

    new = {"logps": logps, "entropies": entropies}
    old, ref = logps + drift, logps - drift
    wanted, values = gradient_of(one, config, new, old, ref)
    new = {"logps": laid_out(logps), "entropies": laid_out(entropies)}
    for micro in (1, 2):
        cut = msgspec.structs.replace(config, gradient_accumulation_steps=micro)
        found, of_many = gradient_of(many, cut, new, laid_out(old), laid_out(ref))
        for name in ("loss", "kl", "entropy"):
            assert_close(of_many[name].item(), values[name].item(), 1e-6)
        for name in ("logps", "entropies"):
            assert_close(as_before(found[name]), wanted[name], 1e-6)


def test_truncated_episodes_are_masked_in_all_their_rows_and_still_counted() -> None:
    batch = make_batch(
        [[1], [1], [2]], [[1, 2], [3], [4]], [[0.0] * 2, [0.0], [0.0]], [1.0, 1.0, 1.0],
        pad_id=0, truncated=[True, False, True], samples=[0, 1, 0],
    )  # fmt: skip
    masked = batch.without_truncated().with_shares()
    assert masked.completion_mask.tolist() == [[0, 0], [1, 0], [0, 0]]
    assert masked.num_samples == 2
    assert masked.shares is not None
    assert masked.shares.tolist() == [0, 1, 0]


def test_shares_are_by_sampled_tokens_and_stay_when_rows_are_selected() -> None:
    batch = make_batch(
        [[1], [1], [2]], [[1, 2, 3], [3], [4]], [[0.0] * 3, [0.0], [0.0]], [1.0, 2.0, 1.0],
        pad_id=0, sampled=[[True, False, True], [True], [True]], samples=[0, 1, 0],
    ).with_shares()  # fmt: skip
    np.testing.assert_allclose(np.array(batch.shares), [2 / 3, 1, 1 / 3], rtol=1e-6)
    assert batch.rows(slice(1, 3)).shares.tolist() == batch.shares[1:].tolist()  # type: ignore[union-attr, index]
    plain = replace(batch, samples=None, shares=None)
    assert plain.with_shares() is plain
    young = batch.with_tokens([[False] * 3, [True], [True]])
    assert young.samples == (1, 0)
    assert young.with_shares().shares.tolist() == [1, 1]  # type: ignore[union-attr]


def test_advantages_by_token_are_cut_as_rows_are() -> None:
    by_token = mx.array([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    batch = make_batch([[1], [1]], [[1, 2, 3], [4]], [[0.0] * 3, [0.0]], by_token, pad_id=0)
    assert batch.select([1]).advantages.tolist() == [[4.0]]
    with pytest.raises(ValueError, match="advantages has the shape"):
        make_batch([[1], [1]], [[1, 2, 3], [4]], [[0.0] * 3, [0.0]], by_token[:, :2], pad_id=0)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 3)), min_size=1, max_size=8),
    st.integers(1, 9),
)
def test_micro_batches_of_episodes_hold_what_was_planned(episodes: list[tuple[int, int, int]], n: int) -> None:
    """Each row once and in order; no more rows than as many completions of one row would be; never too many places."""
    rows = sorted(
        ((number, sample) for sample, (_, forks, _) in enumerate(episodes) for number in range(forks + 1)),
        key=lambda row: row[0],
    )
    batch = make_batch(
        [[7] * (2 + 5 * number) if number == 0 else [sample, *[8] * 5 * number] for number, sample in rows],
        [[index] * episodes[sample][2] for index, (_, sample) in enumerate(rows)],
        [[0.0] * episodes[sample][2] for _, sample in rows],
        [0.0] * len(rows),
        pad_id=0,
        samples=[sample for _, sample in rows],
    )
    parts = micro_batches(batch, n, 4)
    assert [c for part in parts for c in part.completions] == list(batch.completions)
    most = -(-len(episodes) // min(n, len(episodes)))
    for part in parts:
        assert part.num_rows <= most
        prompts, _ = distinct_prompts(part.prompts)
        places = sum(map(len, prompts)) + part.num_completion_tokens
        assert part.num_rows == 1 or places <= most * 4 + 2 * 1


def test_a_batch_trains_the_same_whether_rows_of_an_episode_are_cut_apart() -> None:
    """The gradients of a table of log-probs do not depend on the number of micro-batches."""
    batch = make_batch(
        [[1], [1], [1, 2]], [[0, 1], [1, 1], [2]], [[-1.0] * 2, [-1.0] * 2, [-1.0]], [1.0, -1.0, 1.0],
        pad_id=0, sampled=[[True, False], [True, True], [True]], samples=[0, 1, 0],
    )  # fmt: skip

    def statistics(weights: Any, part: Batch) -> tuple[mx.array, mx.array]:
        logits = weights["table"] - mx.logsumexp(weights["table"])
        logps = logits[part.completion_ids]
        return logps, mx.zeros_like(logps)

    def trained(n: int) -> list[float]:
        config = LearnerConfig(loss_type="grpo", gradient_accumulation_steps=n)
        weights = {"table": mx.array([0.1, 0.2, 0.3])}
        state = adamw_init(weights)
        result = train_on_batch(weights, state, batch, statistics, config, lr=0.1, max_completion_length=LIMIT)
        return result.weights["table"].tolist()  # type: ignore[return-value]

    np.testing.assert_allclose(trained(1), trained(2), rtol=1e-6)


# ---- advantages by turn


def test_turns_from_one_state_are_compared_as_worked_out_by_hand() -> None:
    first, second = discounted_returns([0.0, 0.0, 1.0], 0.5), discounted_returns([1.0, 0.0], 0.5)
    assert (first, second) == ([0.25, 0.5, 1.0], [1.0, 0.0])
    states = ["a", "b", "a", "a", None]
    # a: 0.25, 1 and 1: mean 0.75, deviation √(0.375 / 2); b alone; the last one began nowhere known
    found = turn_advantages([*first, *second], states)
    deviation = (0.375 / 2) ** 0.5 + 1e-4
    assert found == pytest.approx([-0.5 / deviation, 0, 0.25 / deviation, 0.25 / deviation, 0])
    assert turn_advantages([*first, *second], states, "none") == pytest.approx([-0.5, 0, 0.25, 0.25, 0])
    assert turn_advantages([3.0, 3.0], ["a", "a"]) == [0.0, 0.0]
    assert turn_advantages([1.0, 0.0, 5.0, 9.0], ["a", "a", "b", "b"], "batch") == pytest.approx(
        [value / (np.std([1, 0, 5, 9], ddof=1) + 1e-4) for value in (0.5, -0.5, -2, 2)]
    )


@given(
    st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.floats(-100, 100)), max_size=12),
    st.sampled_from(["group", "batch", "none"]),
)
def test_advantages_of_turns_cancel_out_in_each_state(turns: list[tuple[str | None, float]], scale: Any) -> None:
    states, returns = [state for state, _ in turns], [value for _, value in turns]
    found = turn_advantages(returns, states, scale)
    assert all(value == 0 for value, state in zip(found, states, strict=True) if states.count(state) < 2 or not state)
    for state in "abc":
        own = [value for value, one in zip(found, states, strict=True) if one == state]
        assert abs(sum(own)) <= 1e-6 * (1 + sum(map(abs, own)))
    order = sorted(range(len(turns)), key=lambda i: -i)
    again = turn_advantages([returns[i] for i in order], [states[i] for i in order], scale)
    assert [again[order.index(i)] for i in range(len(turns))] == pytest.approx(found)


@given(st.lists(st.floats(-10, 10), max_size=6), st.floats(0, 1))
def test_a_return_is_its_reward_and_the_next_return_discounted(rewards: list[float], gamma: float) -> None:
    returns = [*discounted_returns(rewards, gamma), 0.0]
    assert returns[:-1] == pytest.approx([r + gamma * n for r, n in zip(rewards, returns[1:], strict=True)])
