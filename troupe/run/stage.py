"""Stage: where the policy acts. The tools and environments of a run, who runs them, and how what is said there becomes
ids and is understood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from troupe.actors.conversations import Conversations, Rules, as_messages
from troupe.dataset import DataConfig, PromptDataset
from troupe.environments.calls import CallStyle, parse_turn, which_calls
from troupe.environments.convention import EnvironmentSpec, Said, World
from troupe.environments.ledger import EpisodeName
from troupe.environments.loading import Factory, check_rows, load_world
from troupe.environments.manager import EnvironmentManager
from troupe.environments.settings import EnvironmentConfig
from troupe.errors import ConfigError
from troupe.messages import Answered, PromptText
from troupe.policy import Policy, Tokenizer, opened_thought
from troupe.policy.text.continuing import Continuer


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


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """What episodes are played with."""

    world: World
    manager: EnvironmentManager
    words: Mapping[str, Continuer]
    """Of each environment."""
    understand: Understanding
    rules: Rules
    notices: tuple[str, ...] = ()

    @classmethod
    def load(cls, config: EnvironmentConfig, given: Acting, policy: Policy, data: DataConfig) -> Stage | None:
        """What `config` names and what is given besides; None where that is nothing.

        Raises:
            WorldError: for an environment or a tool that cannot be used.
            ConfigError, ModelError: for a chat template that cannot tell of it.
        """
        tools, factory = given
        if not config.is_on and not tools and factory is None:
            return None
        world = load_world(config, tools, factory)
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
            manager=EnvironmentManager(world, config),
            words=words,
            understand=Understanding(policy.tokenizer, style),
            rules=Rules(max_turns=config.max_turns, gamma=config.gamma, context=policy.config.max_position_embeddings),
            notices=tuple(dict.fromkeys(notices)),
        )

    def check_rows(self, rows: PromptDataset) -> None:
        """Refuse rows that no episode can begin with; WorldError names the first."""
        check_rows(self.world, rows, rows.source)

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
