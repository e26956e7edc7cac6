"""What is learned from episodes: their rows, what counts of them, and their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from tests.support.episodes import acted, episode, played
from tests.support.fakes import make_prompt, make_rollout
from troupe.actors.learner.batch import Assembled, CompletionLogProbs, assemble
from troupe.actors.learner.gathering import FreeGathering, PinnedGathering, is_usable, stale_tokens
from troupe.actors.learner.measures import num_tokens, sampled_tokens, staleness_statistics
from troupe.actors.learner.scores import advantages_of, group_statistics, has_signal
from troupe.grpo import LearnerConfig, adamw_init, train_on_batch
from troupe.messages import RolloutGroup, RowStart, ScoredGroup, ToolCall
from troupe.policy import load_policy

WEIGHTS = {"r": 1.0}
PROMPT = make_prompt(0, 0).prompt_ids
FORKED = acted(2, 1, 2, 0, 3, rows=[(5, (7, 8, 9))])
"""Two tokens, one that is read, two more; and three after another prompt."""
PLAIN = acted(4, first_id=30)
GROUP = played([FORKED, PLAIN], [episode((0, 2), (3, 5), (5, 8)), episode((0, 4))], [1.0, 0.0])


def made_of(*groups: ScoredGroup, oldest: int | None = None, gamma: float = 1.0, **settings: Any) -> Assembled:
    config = LearnerConfig(**settings)
    return assemble(groups, config, weights=WEIGHTS, pad_id=0, oldest=oldest, gamma=gamma)


def test_an_episode_is_a_row_for_each_prompt_that_it_follows() -> None:
    batch = made_of(GROUP).batch
    assert batch.prompts == (PROMPT, PROMPT, (7, 8, 9))
    assert batch.completions == ((10, 11, 12, 13, 14), (30, 31, 32, 33), (15, 16, 17))
    assert batch.completion_mask.tolist() == [[1, 1, 0, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]
    assert batch.samples == (0, 1, 0)
    a = 0.5 / (0.5**0.5 + 1e-4)
    assert batch.advantages.tolist() == pytest.approx([a, -a, a])
    assert batch.sampling_log_probs[0].tolist() == [-0.5, -0.5, 0, -0.5, -0.5]
    assert batch.keys is not None
    assert batch.keys[0][0] == batch.keys[1][0] != batch.keys[2][0], "equal prompts lose the same"
    assert len({own for _, own in batch.keys}) == 3


def test_a_first_row_may_have_a_prompt_of_its_own_and_empty_ones_are_left_out() -> None:
    own = acted(3, 2, rows=[(0, (5, 5)), (3, (6,)), (5, (4, 4))])
    batch = made_of(played([own, PLAIN], scores=[1.0, 0.0])).batch
    assert batch.prompts == ((5, 5), PROMPT)
    assert batch.completions == ((10, 11, 12), (30, 31, 32, 33)), "nothing was sampled after the other two"
    assert batch.samples is None


def test_groups_are_laid_out_first_rows_first() -> None:
    other = played([FORKED, FORKED], scores=[0.0, 1.0], place=1)
    batch = made_of(GROUP, other).batch
    assert batch.samples == (0, 1, 2, 3, 0, 2, 3)
    assert [len(prompt) for prompt in batch.prompts[:4]] == [2, 2, 3, 3]


def test_episodes_of_one_answer_make_the_very_batch_that_answers_do() -> None:
    rollouts = [make_rollout((1, 2, 3)), make_rollout((4,), reason="length")]
    plain = made_of(played(rollouts, scores=[1.0, 0.0])).batch
    acting = made_of(played(rollouts, [episode((0, 3)), episode((0, 1))], [1.0, 0.0])).batch
    assert plain.samples is None
    for name in ("prompts", "completions", "truncated", "keys", "experts", "samples", "shares"):
        assert getattr(plain, name) == getattr(acting, name)
    for name in ("completion_mask", "advantages", "sampling_log_probs"):
        assert mx.array_equal(getattr(plain, name), getattr(acting, name)).item()


def test_recorded_experts_go_with_their_tokens() -> None:
    """Two bytes a token. The last token of a row is sent nowhere; nothing is known of a prompt that is told anew."""
    forked = msgspec.structs.replace(FORKED, experts=bytes(range(14)))
    plain = msgspec.structs.replace(PLAIN, experts=bytes(range(50, 56)))
    group = msgspec.structs.replace(GROUP.group, rollouts=(forked, plain), prompt_experts=b"pppp")
    batch = made_of(msgspec.structs.replace(GROUP, group=group)).batch
    assert batch.experts == ((b"pppp", bytes(range(8))), (b"pppp", bytes(range(50, 56))), (b"", bytes(range(10, 14))))


def test_a_cut_episode_is_cut_in_all_its_rows() -> None:
    cut = msgspec.structs.replace(FORKED, finish_reason="length")
    assert made_of(played([cut, PLAIN], scores=[1.0, 0.0])).batch.truncated == (True, False, True)


def test_only_sampled_tokens_count() -> None:
    lengths = made_of(GROUP).metrics
    assert lengths["completions/mean_length"] == (7 + 4) / 2
    assert lengths["completions/max_length"] == 7
    assert lengths["completions/mean_terminated_length"] == (7 + 4) / 2
    assert sampled_tokens([GROUP]) == 11
    assert num_tokens([GROUP]) == 2 * 2 + 11, "as TRL counts them: no observations"


def test_tokens_that_were_read_are_never_stale() -> None:
    aged = acted(2, 2, 2, versions=[3, 3, 0, 0, 2, 2])
    group = played([aged, aged], scores=[1.0, 0.0])
    assert stale_tokens(group, 3) == 4
    assert staleness_statistics([group], 3) == {"staleness": 0.5, "staleness/max": 1.0}
    assert made_of(group, oldest=3).batch.completion_mask.tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    old = acted(2, 2, rows=[(2, (9,))], versions=[0, 0, 5, 5])
    free = FreeGathering(1, 1, 0, 1, "drop")
    lost = played([old, old], scores=[1.0, 0.0])
    free.add(lost)
    free.examine([lost], set(), 5)
    assert free._states[lost.group.prompt.gid] == "stale", "what is left of it was read, not sampled"


def test_rows_of_which_no_young_token_is_left_go_one_by_one() -> None:
    aged = msgspec.structs.replace(FORKED, versions=(0,) * 5 + (2,) * 3)
    young = msgspec.structs.replace(PLAIN, versions=(2,) * 4)
    batch = made_of(played([aged, young], scores=[1.0, 0.0]), oldest=1).batch
    assert batch.completions == ((30, 31, 32, 33), (15, 16, 17))
    assert batch.num_samples == 2


def test_a_step_learns_from_sampled_tokens_alone(tiny_model: Path) -> None:
    """Other ids, log-probs and versions where something was read after the last sampled token change nothing."""
    policy = load_policy(tiny_model)
    log_probs = CompletionLogProbs(policy.config, 1.0)

    def trained(*read: int) -> dict[str, mx.array]:
        end = len(PLAIN.token_ids)
        acting = msgspec.structs.replace(
            PLAIN,
            token_ids=(*PLAIN.token_ids, *read),
            log_probs=(*PLAIN.log_probs, *[float(-i) for i in read]),
            versions=(0,) * (end + len(read)),
            observed=((end, end + len(read)),) if read else (),
        )
        batch = made_of(played([FORKED, acting], scores=[1.0, 0.0])).batch
        config = LearnerConfig(entropy_coef=0.1, top_entropy_quantile=0.5, importance_sampling_level="sequence")
        result = train_on_batch(
            policy.weights, adamw_init(policy.weights), batch, log_probs, config, lr=1e-2, max_completion_length=16
        )
        assert result.updated
        return result.optimizer_state

    first, other = trained(), trained(40, 41, 42)
    for name, value in first.items():
        scale = float(mx.abs(value).max()) or 1.0
        np.testing.assert_allclose(np.array(other[name]) / scale, np.array(value) / scale, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "sapo"])
def test_a_history_that_is_told_as_it_was_changes_no_gradient(tiny_model: Path, loss_type: Any) -> None:
    """A new row whose prompt is the very tokens so far, computed by another way through the network."""
    policy = load_policy(tiny_model)
    told = msgspec.structs.replace(FORKED, rows=(RowStart(start=5, prompt_ids=PROMPT + FORKED.token_ids[:5]),))
    whole = msgspec.structs.replace(FORKED, rows=())
    moments = []
    for rollout, micro in ((whole, 1), (told, 1), (told, 2)):
        batch = made_of(played([rollout, PLAIN], scores=[1.0, 0.0])).batch
        config = LearnerConfig(loss_type=loss_type, max_grad_norm=0.0, gradient_accumulation_steps=micro)
        config = msgspec.structs.replace(config, vllm_importance_sampling_correction=False)
        state = adamw_init(policy.weights)
        log_probs = CompletionLogProbs(policy.config, 1.0)
        result = train_on_batch(policy.weights, state, batch, log_probs, config, lr=0.0, max_completion_length=16)
        moments.append(result.optimizer_state)
    first, *others = moments
    for other in others:
        for name, moment in first.items():
            scale = float(mx.abs(moment).max()) or 1.0
            np.testing.assert_allclose(np.array(other[name]) / scale, np.array(moment) / scale, atol=2e-5, err_msg=name)


# ---- rewards that are missing


def test_a_failed_episode_has_no_reward_and_may_send_its_group_into_quarantine() -> None:
    broken = episode((0, 2), failed="its process ended", reward=None)
    group = played([FORKED, PLAIN, PLAIN], [broken, episode((0, 4)), episode((0, 4))], [None, 1.0, 0.0], faulted=[0])
    assert advantages_of([group], LearnerConfig(), WEIGHTS)[0].item() == 0
    assert is_usable(group, 2)
    assert not is_usable(group, 3)
    gathering = PinnedGathering(1, 3, 0, 0)
    gathering.examine(gathering.add(group), set(), 0)
    step = gathering.take_step(0)
    assert step is not None
    assert step.states == {group.group.prompt.gid: "quarantined"}


# ---- advantages by turn

GIGPO: dict[str, Any] = {"turn_advantages": "gigpo", "scale_rewards": "none"}


def twins(rewards: tuple[float | None, ...], other: tuple[float | None, ...], score: float = 1.0) -> ScoredGroup:
    """Two episodes of two turns from the same states."""
    turns, states = ((0, 2), (3, 5)), ("s", "t")
    episodes = [episode(*turns, rewards=r, states=states) for r in (rewards, other)]
    return played([acted(2, 1, 2), acted(2, 1, 2)], episodes, [score, 1.0])


def test_a_token_has_its_episodes_advantage_and_its_turns() -> None:
    group = twins((0.0, 1.0), (1.0, 0.0), score=0.0)
    made = made_of(group, gamma=0.5, turn_advantage_weight=2.0, **GIGPO)
    # returns 0.5 and 1 from s, 1 and 0 from t; episodes −0.5 and 0.5
    one = [-0.5 - 0.5, -0.5 - 0.5, -0.5, -0.5 + 1.0, -0.5 + 1.0]
    two = [0.5 + 0.5, 0.5 + 0.5, 0.5, 0.5 - 1.0, 0.5 - 1.0]
    np.testing.assert_allclose(np.array(made.batch.advantages), [one, two], rtol=1e-6)
    assert made.advantages == ((-0.5, 0.5),)
    assert made.metrics["turns/compared"] == 1.0
    assert made_of(group).batch.advantages.shape == (2,)


def test_turns_keep_their_advantages_in_the_rows_of_an_episode() -> None:
    forked = episode((0, 2), (3, 5), (5, 8), rewards=(0.0, 0.0, 4.0), states=("s", "u", "t"))
    plain = episode((0, 4), rewards=(2.0,), states=("t",))
    made = made_of(played([FORKED, PLAIN], [forked, plain], [1.0, 1.0]), **GIGPO)
    np.testing.assert_allclose(
        np.array(made.batch.advantages), [[0, 0, 0, 0, 0], [-1, -1, -1, -1, 0], [1, 1, 1, 0, 0]], rtol=1e-6
    )
    assert made.metrics["turns/compared"] == 0.5


def test_where_turns_have_no_rewards_the_last_one_has_the_completions() -> None:
    group = twins((None, None), (None, None), score=3.0)
    made = made_of(group, gamma=0.5, **GIGPO)
    np.testing.assert_allclose(np.array(made.batch.advantages)[0], [1.5, 1.5, 1.0, 2.0, 2.0], rtol=1e-6)


def test_a_group_of_equal_rewards_may_have_turns_to_learn_from() -> None:
    group = twins((0.0, 1.0), (1.0, 0.0))
    assert not has_signal(group, LearnerConfig(), WEIGHTS)
    assert has_signal(group, LearnerConfig(turn_advantages="gigpo"), WEIGHTS)
    assert not has_signal(twins((0.0, 1.0), (0.0, 1.0)), LearnerConfig(turn_advantages="gigpo"), WEIGHTS)


def test_turns_of_episodes_without_reward_are_compared_with_nothing() -> None:
    group = msgspec.structs.replace(twins((0.0, 1.0), (1.0, 0.0)), faulted=(1,))
    assert not has_signal(group, LearnerConfig(turn_advantages="gigpo"), WEIGHTS)


# ---- figures


def call(name: str, seconds: float, error: str = "") -> ToolCall:
    return ToolCall(name=name, arguments={}, result="", error=error, seconds=seconds)


def test_figures_of_episodes() -> None:
    searched = episode(
        (0, 2), (3, 5), (5, 8), seconds=0.25, calls=[(call("search", 1.0), call("add", 2.0)), (call("search", 3.0),)]
    )
    other = episode((0, 4), environment="Quiz", seconds=1.0, failed="late", calls=[(call("invented", 0.0, "none"),)])
    figures = group_statistics([played([FORKED, PLAIN], [searched, other], [1.0, 0.0])], LearnerConfig(), WEIGHTS)
    expected = {
        "turns/mean": 2.0,
        "turns/min": 1.0,
        "turns/max": 3.0,
        "observations/mean_tokens": 0.5,
        "tools/call_frequency": 2.0,
        "tools/failure_frequency": 0.25,
        "tools/search/wait_s": 2.0,
        "tools/add/wait_s": 2.0,
        "environments/wait_s": 1.5,
        "environments/Game/wait_s": 1.0,
        "environments/Quiz/wait_s": 2.0,
        "environments/failed": 0.5,
    }
    assert {name: figures[name] for name in expected} == expected
    acting = {name for name in figures if name.partition("/")[0] in ("turns", "tools", "environments", "observations")}
    assert acting == set(expected), "what a policy invents has no figures"
    plain = RolloutGroup(prompt=make_prompt(0, 0), rollouts=(PLAIN,))
    without = group_statistics([ScoredGroup(group=plain, scores={"r": (1.0,)})], LearnerConfig(), WEIGHTS)
    assert not {name for name in without if name.startswith(("turns/", "tools/"))}
