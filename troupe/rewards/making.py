"""What runs a reward, by the way that its configuration names: in this process, in processes, or on other machines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from troupe.errors import RewardError
from troupe.rewards.actor import RewardActor
from troupe.rewards.calling import Caller
from troupe.rewards.convention import Reward
from troupe.rewards.outcomes import RewardEvents
from troupe.rewards.processes.runner import ProcessRunner, process_spec
from troupe.rewards.runners import ActorRunner, FunctionRunner, Runner
from troupe.rewards.settings import RewardsConfig, Run, own_config
from troupe.runtime.elsewhere import Elsewhere


class RunnerMaker:
    """Makes what runs the rewards of a manager."""

    def __init__(
        self,
        config: RewardsConfig,
        events: RewardEvents,
        sleep: Callable[[float], Awaitable[None]],
        jitter: Callable[[], float],
        elsewhere: Elsewhere | None,
    ) -> None:
        self._config, self._events, self._elsewhere = config, events, elsewhere
        self._sleep, self._jitter = sleep, jitter

    def runner(self, name: str, run: Run, reward: Reward, spec: str | None) -> Runner:
        """What runs a reward that a text may name.

        Raises:
            RewardError: for one that cannot be run so.
        """
        config = own_config(reward, name, self._config)
        if run != "auto":
            spec = process_spec(reward, spec)
            config = msgspec.structs.replace(config, concurrency=config.processes)
        caller = Caller(
            name, config, partial(self._events.breaker_changed, name), sleep=self._sleep, jitter=self._jitter
        )
        if run == "worker":
            assert spec is not None
            return self._distant(name, reward, caller, spec)
        if isinstance(reward, RewardActor):
            return ActorRunner(reward, caller)
        if run == "process" and spec is not None:
            return ProcessRunner(reward, caller, spec)

        def in_processes() -> Runner:
            return ProcessRunner(reward, caller, process_spec(reward, spec, "do without what has it moved"))

        return FunctionRunner(reward, caller, elsewhere=in_processes, moved=partial(self._events.moved, name))

    def _distant(self, name: str, reward: Reward, caller: Caller, spec: str) -> Runner:
        if self._elsewhere is None:
            raise RewardError(
                f'reward {name}: rewards.run = "worker" needs a run that workers can join; give --serve HOST:PORT, or '
                'run it as "process"'
            )
        assert not isinstance(reward, RewardActor)
        caller.machines_changed = partial(self._events.machines_changed, name)
        return ProcessRunner(reward, caller, spec, self._elsewhere)
