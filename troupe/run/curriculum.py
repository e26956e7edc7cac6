"""The curriculum that a run's config asks for, and what to tell of it."""

from collections.abc import Sequence

from troupe.actors.curriculum import Curriculum
from troupe.dataset import CurriculumConfig, PromptDataset
from troupe.errors import ConfigError
from troupe.rewards import RewardManager
from troupe.run.config import RunConfig

_SEEN = 1.5
"""Prompts drawn a row, from which on a curriculum has something to go by."""


def curriculum_for(
    config: RunConfig, dataset: PromptDataset, rewards: RewardManager, *, begins: int = 0
) -> Curriculum | None:
    """What chooses the rows from step `begins` on; None where each epoch has all of them. ConfigError for a reward that
    there is not."""
    settings, learner, schedule = config.curriculum, config.learner, config.schedule
    if not settings.enabled:
        return None
    if settings.reward is not None and settings.reward not in rewards.names:
        names = ", ".join(rewards.names)
        raise ConfigError(f"curriculum.reward is {settings.reward!r}, but the run's rewards are {names}; name one")
    return Curriculum(
        settings,
        dataset,
        batch_size=learner.batch_size,
        seed=config.seed,
        shuffle=config.data.shuffle,
        ahead=schedule.max_staleness if schedule.mode == "pinned" else None,
        begins=begins,
        attempts=learner.max_resampling_attempts if learner.dynamic_sampling else 0,
    )


def curriculum_notices(config: RunConfig, rewards: Sequence[str], *, rows: int, steps: int) -> list[str]:
    """What the user should know. `rewards`: their names; `rows`: of the dataset; `steps`: of the run."""
    settings, prompts = config.curriculum, steps * config.learner.batch_size
    if not settings.enabled:
        idle = settings != CurriculumConfig()
        return ["the section [curriculum] does nothing as long as curriculum.enabled is false"] if idle else []
    told = []
    if len(rewards) > 1 and settings.reward is None and settings.passes_from is None:
        told.append(
            f"the curriculum takes the weighted sum of {', '.join(rewards)}, cut to 0…1, for the part of a completion "
            "that passes; name one of them as curriculum.reward, or a score as curriculum.passes_from"
        )
    if prompts >= _SEEN * rows:
        return told
    return [
        *told,
        f"the run draws {prompts:,} prompts of {rows:,} rows, so most are seen once at most and the curriculum has "
        "little to go by; learner.dynamic_sampling replaces what teaches nothing at once",
    ]
