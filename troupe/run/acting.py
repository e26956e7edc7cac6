"""Where the policy acts: the tools and environments of a run, who runs them, and how what is said there becomes ids and
is understood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from troupe.actors.conversations import Conversations, Rules, as_messages
from troupe.actors.schedule import ScheduleConfig
from troupe.dataset import DataConfig, PromptDataset
from troupe.environments.calls import CallStyle, parse_turn, which_calls
from troupe.environments.convention import EnvironmentSpec, Said, World
from troupe.environments.ledger import EpisodeName
from troupe.environments.loading import Factory, check_rows, load_world
from troupe.environments.manager import EnvironmentManager
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.messages import Answered, PromptText
from troupe.policy import Policy, Tokenizer, opened_thought
from troupe.policy.text.continuing import Continuer
from troupe.rewards import (
    Reward,
    RewardManager,
    RewardsConfig,
    default_reward,
    environment_reward,
    get_environment_reward,
)
from troupe.rewards.convention import Signature
from troupe.run.config import RunConfig
from troupe.runtime.elsewhere import Elsewhere


class Acting(NamedTuple):
    """What was given in Python to act with."""

    tools: Sequence[Callable[..., Any]] = ()
    environment_factory: Factory | Mapping[str, Factory] | None = None


NOTHING_GIVEN = Acting()


class Understanding:
    """Sampled ids as what they say."""

    def __init__(self, tokenizer: Tokenizer, style: CallStyle | None) -> None:
        self._tokenizer, self._style = tokenizer, style

    def __call__(self, ids: Sequence[int], read: Sequence[int], spec: EnvironmentSpec) -> Said:
        """`read`: the ids before them, which may have begun a thought."""
        begun = opened_thought(self._tokenizer, [], read)
        return parse_turn(self._tokenizer.decode_sampled(ids), self._style, spec.tools, begun)


class ActingWorld:
    """The tools and environments of a run, and who runs them: all that can be known before a model is loaded."""

    def __init__(self, config: EnvironmentConfig, world: World, elsewhere: Elsewhere | None = None) -> None:
        """`elsewhere`: where other machines are that may run them."""
        self.config, self.world, self._elsewhere = config, world, elsewhere
        self.manager: EnvironmentManager

    @property
    def gives_rewards(self) -> bool:
        """Whether an environment may say what an episode is worth."""
        return any(spec.has_reward or spec.has_step for spec in self.world.environments.values())

    @property
    def own_rewards(self) -> list[Reward]:
        """Of environments with `get_reward`, under the names of their classes, to be added to other rewards."""
        multi = self.world.multi
        return [
            get_environment_reward(spec.label, {name} if multi else None)
            for name, spec in self.world.environments.items()
            if spec.has_reward
        ]

    def begin(self, rewards: RewardManager) -> None:
        """Make the manager, when it is known who looks at environments afterwards."""
        wants = any(not callable(reward) or _looks(reward) for reward in rewards.rewards)
        self.manager = EnvironmentManager(self.world, self.config, wants_attributes=wants, elsewhere=self._elsewhere)

    def environments(self, gid: int) -> list[Any] | None:
        """Of a group, as rewards get them."""
        return self.manager.environments(gid)


def load_acting(config: EnvironmentConfig, given: Acting, elsewhere: Elsewhere | None = None) -> ActingWorld | None:
    """What `config` names and what is given besides; None where that is nothing. `elsewhere`: where other machines are.

    Raises:
        WorldError: for an environment or a tool that cannot be used.
    """
    if not config.is_on and not given.tools and given.environment_factory is None:
        return None
    return ActingWorld(config, load_world(config, given.tools, given.environment_factory), elsewhere)


def check_learner(learner: LearnerConfig, acting: ActingWorld | None) -> None:
    """ConfigError where turns are to be compared that no environment names the states of, or nothing is observed that
    could be foreseen."""
    if learner.echo_alpha and acting is None:
        raise ConfigError(
            f"learner.echo_alpha is {learner.echo_alpha:g}, but the policy observes nothing: there is neither an "
            "environment nor a tool; name one, or leave it out"
        )
    if learner.turn_advantages == "off":
        return
    specs = [] if acting is None else list(acting.world.environments.values())
    if not any(spec.has_state_id for spec in specs):
        names = ", ".join(spec.label for spec in specs if spec.label) or "there is no environment"
        raise ConfigError(
            f"learner.turn_advantages is {learner.turn_advantages!r}, which compares turns that began in the same "
            f"state, but no environment says which are the same ({names}); give it a method "
            "state_id(self, observation) -> str"
        )


def sessions_of(schedule: ScheduleConfig) -> int:
    """Rounds of episodes that a generator may have under way at once."""
    return 1 + schedule.max_staleness if schedule.mode == "pinned" else 1


def default_rewards(rows: PromptDataset, acting: ActingWorld | None, *, may_be_none: bool = False) -> str:
    """Name of the reward where none is named. RewardError where nothing says what is right, unless none is needed."""
    gives = acting is not None and acting.gives_rewards
    if may_be_none and not gives and not rows.columns & {"answer", "reasoning_gym"}:
        return "none"
    return default_reward(rows.columns, rows.source, environment_rewards=gives)


def make_rewards(
    rewards: Sequence[Reward | str],
    config: RewardsConfig,
    acting: ActingWorld | None,
    datasets: Iterable[PromptDataset] = (),
    *,
    elsewhere: Elsewhere | None = None,
) -> RewardManager:
    """The rewards, with those of environments that have `get_reward`, unless the reward `environment` gives them
    already; as in TRL. Without weights for them these are 1. `elsewhere`: where other machines are.

    Raises:
        RewardError: for a reward that cannot be used.
        WorldError: for a row of `datasets` that no episode can begin with.
    """
    if acting is None:
        return RewardManager(rewards, config=config, elsewhere=elsewhere)
    for rows in datasets:
        check_rows(acting.world, rows, rows.source)
    is_named = any(reward == "environment" or reward is environment_reward for reward in rewards)
    own = [] if is_named else acting.own_rewards
    weights = config.weights
    if weights is not None and len(weights) == len(rewards):
        weights = (*weights, *(1.0 for _ in own))
    if config.run is not None and len(config.run) == len(rewards):
        config = msgspec.structs.replace(config, run=(*config.run, *("auto" for _ in own)))
    manager = RewardManager([*rewards, *own], weights, config, environments=acting.environments, elsewhere=elsewhere)
    acting.begin(manager)
    return manager


def _looks(reward: Reward) -> bool:
    return callable(reward) and "environments" in Signature.of(reward).names


class ActingSetup(msgspec.Struct, frozen=True, kw_only=True):
    """What episodes are run with."""

    world: World
    manager: EnvironmentManager
    words: Mapping[str, Continuer]
    """Of each environment."""
    understand: Understanding
    rules: Rules
    told: tuple[str, ...] = ()
    """What is to be known of how it is talked with, one line each."""

    @classmethod
    def of(cls, acting: ActingWorld, policy: Policy, data: DataConfig) -> ActingSetup:
        """That of a policy. ConfigError, ModelError for a chat template that cannot tell of tools or go on."""
        config, world = acting.config, acting.world
        words = {
            name: Continuer(
                policy.tokenizer,
                tools=spec.schemas or None,
                history=config.history,
                end_ids=policy.eos_ids,
                template_kwargs=data.chat_template_kwargs,
            )
            for name, spec in world.environments.items()
        }
        notices: list[str] = []
        for name, spec in world.environments.items():
            ways = {"by_tool": bool(spec.tools), "by_user": spec.has_step}
            words[name].check(**ways)
            notices.append(words[name].notice(**ways))
        style = _style(config, world, policy.tokenizer, data)
        if config.calls == "auto" and style is not None:
            notices.append(f"tools are called as the chat template says: environment.calls = {style!r}")
        return cls(
            world=world,
            manager=acting.manager,
            words=words,
            understand=Understanding(policy.tokenizer, style),
            rules=Rules(max_turns=config.max_turns, gamma=config.gamma, context=policy.config.max_position_embeddings),
            told=tuple(dict.fromkeys(notices)),
        )

    def within(self, longest_prompt: int, max_completion_length: int) -> ActingSetup:
        """With the bound for rows that memory is planned for: what an environment adds to a prompt, or a history that
        is told anew, may be as long as a completion."""
        most = longest_prompt + 2 * max_completion_length
        rules = msgspec.structs.replace(self.rules, context=min(self.rules.context, most))
        return msgspec.structs.replace(self, rules=rules)

    @property
    def begins_rows(self) -> bool:
        """Whether rows may have prompts that the dataset does not have."""
        return any(spec.is_live for spec in self.world.environments.values())

    def notices(self, config: RunConfig) -> list[str]:
        """What the user should know, one line each."""
        told = list(self.told)
        if "sqlite" not in config.metrics.sinks:
            told.append(
                "answers of environments and tools are recorded in run.sqlite, which metrics.sinks does not name: a "
                "run that is killed asks again for those since its last checkpoint"
            )
        lost = [spec.label for spec in self.world.environments.values() if spec.is_live and not spec.can_save]
        if lost:
            becomes = {
                "repeat": "are brought back after a kill by repeating the calls that were answered",
                "missing": "are lost with a kill, and their episodes have no reward",
            }[config.environment.on_lost]
            told.append(f"{', '.join(lost)}: without save_state and load_state, environments {becomes}")
        return told

    def opening(self, prompt: PromptText, columns: Mapping[str, Any]) -> tuple[int, ...]:
        """The ids of a prompt, as far as they are known before its environment has added anything."""
        return self.words[self.world.spec_of(columns).name].opening(as_messages(prompt))

    def recall(self, answers: Iterable[Answered]) -> None:
        """Know what an earlier start of the run was answered."""
        for each in answers:
            self.manager.ledger.note(EpisodeName(each.gid, each.sample), each.turn, each.token_ids, each.answer)

    def conversations(self) -> Conversations:
        """New ones, over the same environments."""
        return Conversations(self.manager, self.world, self.words, understand=self.understand, rules=self.rules)


def _style(config: EnvironmentConfig, world: World, tokenizer: Tokenizer, data: DataConfig) -> CallStyle | None:
    """How tools are called. ConfigError where there are tools and nobody says how."""
    if not any(spec.tools for spec in world.environments.values()):
        return None
    if config.calls != "auto":
        return config.calls
    template = tokenizer.chat_template(True, data.chat_template_kwargs.get("chat_template"))
    style = which_calls(template.source)
    if style is None:
        raise ConfigError(
            f"{template.origin}: the chat template has tools called in a way that is not known; set environment.calls "
            "to 'hermes' or 'xml', or use a model that calls tools so"
        )
    return style
