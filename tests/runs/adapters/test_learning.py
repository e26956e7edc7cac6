"""What an adapter learns: what it is taught, near its reference, at the rate that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anyio
import mlx.core as mx
import numpy as np
import pytest

from tests.support.adapters import DORA, LORA, adapter_config, train_adapter
from tests.support.fakes import ones, same_bits, weigh_ids
from tests.support.runs import column, completions, policy_of
from troupe import Supervisor, load_config
from troupe.errors import ConfigError
from troupe.policy import load_policy
from troupe.run.prepare import prepare

FOLLOWS: dict[str, Any] = {"learner__beta": 0.1, "learner__sync_ref_model": True, "learner__ref_model_sync_steps": 1}


def lower(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of small letters."""
    return [sum(97 <= token < 123 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.parametrize("settings", [LORA, pytest.param(DORA, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_an_adapter_learns_what_pays(tmp_path: Path, tiny_model: Path, settings: dict[str, Any]) -> None:
    more = {"learner__lr": 0.03, "learner__lr_scheduler": "constant", "learner__max_steps": 20}
    result = train_adapter(tiny_model, tmp_path, lower, **settings | more, generation__num_generations=8)
    told = column(result.folder, "reward")
    assert np.mean(told[:3]) < 0.3
    assert np.mean(told[-3:]) > np.mean(told[:3]) + 0.3


@pytest.mark.parametrize("settings", [LORA, pytest.param(DORA, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_the_reference_is_the_base_which_the_first_step_is_at_and_a_strong_beta_keeps_near(
    tmp_path: Path, ragged_model: Path, settings: dict[str, Any]
) -> None:
    more = settings | {"learner__lr_scheduler": "constant", "learner__max_steps": 8}
    near, far = (
        column(train_adapter(ragged_model, tmp_path / str(beta), **more, learner__beta=beta).folder, "kl")
        for beta in (10.0, 0.001)
    )
    assert near[0] == far[0] == 0.0
    assert 0 < near[-1] < 0.5 * far[-1]


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_into_how_many_micro_batches_a_step_is_split_changes_no_gradient_also_where_prompts_are_equal(
    tmp_path: Path, ragged_model: Path, dropout: float
) -> None:
    """Equal neighbours are computed as one in a batch, and apart in micro-batches of a row."""
    (tmp_path / "alike.json").write_text(json.dumps([{"prompt": "abcdef", "answer": str(i)} for i in range(5)]))
    settings: dict[str, Any] = {"data__path": str(tmp_path / "alike.json"), "learner__lr": 1e-4}
    norms = [
        column(
            train_adapter(
                ragged_model,
                tmp_path / str(number),
                **LORA | {"adapter__dropout": dropout, "learner__gradient_accumulation_steps": number} | settings,
            ).folder,
            "grad_norm",
        )
        for number in (1, 6)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_dropout_is_in_what_is_learned_and_not_in_what_is_sampled(tmp_path: Path, ragged_model: Path) -> None:
    without, half = (
        Path(train_adapter(ragged_model, tmp_path / str(rate), **LORA | {"adapter__dropout": rate}).folder)
        for rate in (0.0, 0.5)
    )
    assert completions(half, step=1) == completions(without, step=1)
    assert not same_bits(policy_of(half), policy_of(without))
    name = "sampling/sampling_logp_difference/max"
    assert max(column(without, name) + column(half, name)) < 1e-4, "the correction for the sampler is without it"
    settings = json.loads((half / "final" / "adapter_config.json").read_bytes())
    assert settings["lora_dropout"] == settings["lora_parameters"]["dropout"] == 0.5


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_each_pass_over_a_batch_drops_something_else(tmp_path: Path, ragged_model: Path, dropout: float) -> None:
    """Where nothing is learned, passes without dropout are all the same."""
    settings: dict[str, Any] = LORA | {"adapter__dropout": dropout, "learner__lr": 0.0}
    once, twice = (
        column(
            train_adapter(ragged_model, tmp_path / str(passes), learner__num_iterations=passes, **settings).folder,
            "grad_norm",
        )
        for passes in (1, 2)
    )
    assert (twice == pytest.approx(once, rel=1e-5)) == (dropout == 0.0)


def test_a_reference_that_follows_every_step_is_the_policy_itself(tmp_path: Path, ragged_model: Path) -> None:
    result = train_adapter(ragged_model, tmp_path, learner__ref_model_mixup_alpha=1.0, **FOLLOWS)
    assert column(result.folder, "kl") == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_reference_of_two_adapters_is_refused(tmp_path: Path, ragged_model: Path) -> None:
    config = adapter_config(ragged_model, tmp_path, **FOLLOWS)
    with pytest.raises(ConfigError, match=r"ref_model_mixup_alpha is .*, but a mixture of two adapters is no adapter"):
        prepare(config, [weigh_ids])


def test_a_rate_that_is_left_open_is_ten_times_that_of_a_whole_network_and_stored(
    tmp_path: Path, ragged_model: Path
) -> None:
    result = train_adapter(ragged_model, tmp_path, learner__lr=None, learner__lr_scheduler="constant")
    assert column(result.folder, "learning_rate") == [1e-5] * 4
    assert load_config(Path(result.folder) / "run.toml").learner.lr == 1e-5
    named = adapter_config(ragged_model, tmp_path, learner__lr=1e-5, learner__lr_scheduler="constant")
    assert prepare(named, [weigh_ids], resume=True).start.first_step == 4, "the same rate by name is no other one"


@pytest.mark.anyio
async def test_the_rate_may_be_set_while_an_adapter_is_trained(tmp_path: Path, ragged_model: Path) -> None:
    config = adapter_config(ragged_model, tmp_path, learner__lr_scheduler="constant")
    async with Supervisor(config, [weigh_ids]) as run:
        run.pause()
        run.step(2)
        async for update in run.updates():
            if update.step == 2:
                run.set("learner.lr", 0.25)
                run.resume()
    assert column(run.folder, "learning_rate") == [0.01, 0.01, 0.25, 0.25]
    assert json.loads((run.folder / "changes.jsonl").read_text()) == {"step": 2, "key": "learner.lr", "value": 0.25}
    plain = await anyio.to_thread.run_sync(
        lambda: train_adapter(ragged_model, tmp_path / "plain", learner__lr_scheduler="constant")
    )
    assert not same_bits(policy_of(run.folder), policy_of(plain.folder))


def test_decay_shrinks_factors_and_magnitudes_as_with_peft(tmp_path: Path, ragged_model: Path) -> None:
    settings = {"learner__weight_decay": 0.5, "learner__lr": 0.01, "learner__lr_scheduler": "constant"}
    first = policy_of(train_adapter(ragged_model, tmp_path / "first", ones, **DORA, learner__lr=0.0).folder)
    last = policy_of(train_adapter(ragged_model, tmp_path / "last", ones, **DORA | settings).folder)
    left = (1 - 0.01 * 0.5) ** 4
    for name, weight in first.items():
        assert mx.allclose(last[name], weight * left, rtol=1e-5).item(), name


def test_held_out_rows_are_answered_by_the_base_before_and_by_the_adapter_after(
    tmp_path: Path, ragged_model: Path
) -> None:
    def weigh(completions: list[str], **_: Any) -> list[float]:
        return [sum(map(ord, text)) % 97 / 97 for text in completions]

    prompts = ["abc", "bcd", "cdef"]
    (tmp_path / "held_out.json").write_text(json.dumps([{"prompt": text, "answer": "x"} for text in prompts]))
    result = train_adapter(ragged_model, tmp_path, weigh, data__eval_path=str(tmp_path / "held_out.json"))
    before, after = (
        np.mean(weigh(load_policy(folder).generate_texts(prompts, 12, temperature=0.0)))
        for folder in (ragged_model, Path(result.folder) / "final")
    )
    assert before != after
    assert result.rewards_before["weigh"] == pytest.approx(before)
    assert result.rewards_after["weigh"] == pytest.approx(after)
