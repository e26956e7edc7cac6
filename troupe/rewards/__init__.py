"""Scores, or a reason why there is none.

A reward is a function in TRL's signature (`convention.py`), called once a group or once a step, or a `RewardActor`
(`actor.py`), called once a sample. Functions run in the event loop, in a thread or in processes (`processes/`).
"""

from troupe.rewards.actor import RewardActor, RewardSample
from troupe.rewards.builtin import (
    diversity_reward,
    exact_answer_reward,
    format_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    length_reward,
    think_format_reward,
)
from troupe.rewards.convention import Reward, RewardFunction, batch_reward, check_columns
from troupe.rewards.episodes import EnvironmentView, environment_reward, get_environment_reward
from troupe.rewards.exchange import RewardVersion as Sitting
from troupe.rewards.extras import TrainerState
from troupe.rewards.loading import default_reward, load_reward
from troupe.rewards.manager import RewardManager
from troupe.rewards.outcomes import GroupScores, Wait
from troupe.rewards.settings import RewardsConfig
from troupe.rewards.verifiers import get_math_verify_reward, reasoning_gym_reward

__all__ = [
    "EnvironmentView",
    "GroupScores",
    "Reward",
    "RewardActor",
    "RewardFunction",
    "RewardManager",
    "RewardSample",
    "RewardsConfig",
    "Sitting",
    "TrainerState",
    "Wait",
    "batch_reward",
    "check_columns",
    "default_reward",
    "diversity_reward",
    "environment_reward",
    "exact_answer_reward",
    "format_reward",
    "get_environment_reward",
    "get_math_verify_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "length_reward",
    "load_reward",
    "reasoning_gym_reward",
    "think_format_reward",
]
