"""Learning rates where the config leaves them open, and whether the learner's settings go with the network."""

import msgspec

from troupe.errors import ConfigError
from troupe.grpo import LearnerConfig
from troupe.grpo.optimizer import LEARNING_RATE
from troupe.policy import NetworkConfig, Policy
from troupe.policy.adapter.modules import describe_adapter
from troupe.run.config import RunConfig, Task
from troupe.run.teaching import check_teaching

_RATES: dict[Task, float] = {"grpo": LEARNING_RATE, "sft": 2e-5}
_ADAPTER_RATES: dict[Task, float] = {"grpo": 1e-5, "sft": 2e-4}
"""Ten times those of a whole network; written out, as ten times 1e-6 is another number than 1e-5."""


def with_rates(config: RunConfig, policy: Policy) -> tuple[RunConfig, list[str]]:
    """With the learning rate where the config leaves it open, and what to tell of that and of an adapter."""
    adapter, lr, notices = policy.base.adapter, config.learner.lr, list[str]()
    check_teaching(config)
    _check_experts(config.learner, policy.config)
    if adapter is not None:
        _check_reference(config.learner)
        notices.append(describe_adapter(policy.config, adapter))
    if lr is None:
        lr = _default_rate(config.task, is_adapter=adapter is not None)
        if adapter is not None:
            notices.append(f"learner.lr is {lr:g}, ten times that of training the whole network; name it for another")
    warm = config.warm_start
    if warm.path is not None and warm.lr is None:
        warm = msgspec.structs.replace(warm, lr=_default_rate("sft", is_adapter=adapter is not None))
        config = msgspec.structs.replace(config, warm_start=warm)
    return msgspec.structs.replace(config, learner=msgspec.structs.replace(config.learner, lr=lr)), notices


def _check_experts(learner: LearnerConfig, network: NetworkConfig) -> None:
    """Raise ConfigError where something is asked of experts that the network does not have."""
    if network.sparse_layers:
        return
    none = f"but a {network.model_type} has no experts"
    if learner.router_aux_loss_coef:
        raise ConfigError(f"learner.router_aux_loss_coef is {learner.router_aux_loss_coef:g}, {none}; leave it out")
    if learner.router_replay != "off":
        raise ConfigError(f"learner.router_replay is {learner.router_replay!r}, {none}; leave it out")


def _check_reference(learner: LearnerConfig) -> None:
    """Raise ConfigError where the reference policy would be a mixture of adapters, which is no adapter."""
    if learner.sync_ref_model and learner.ref_model_mixup_alpha != 1.0:
        raise ConfigError(
            f"learner.ref_model_mixup_alpha is {learner.ref_model_mixup_alpha:g}, but a mixture of two adapters is no "
            "adapter; give 1, or set learner.sync_ref_model = false"
        )


def _default_rate(task: Task, *, is_adapter: bool) -> float:
    return (_ADAPTER_RATES if is_adapter else _RATES)[task]
