"""Troupe: GRPO training of language models on Apple's MLX, by independent asynchronous actors."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from troupe.runtime import code_files as reward_files  # noqa: F401 - the last for processes that are spawned
from troupe.runtime import linux_cpu
from troupe.runtime.machine import VERSION, missing_backend

if linux_cpu.load_openblas() == "too late":  # must run before anything imports mlx.core
    warnings.warn(
        "mlx was imported before troupe, so matrix products on this CPU stay 30 times slower than they could be; "
        "import troupe first",
        RuntimeWarning,
        stacklevel=2,
    )

if TYPE_CHECKING:
    from troupe.errors import TroupeError
    from troupe.records.diagnosis.past import diagnose
    from troupe.rewards import RewardActor, RewardSample
    from troupe.run.config import RunConfig, load_config
    from troupe.run.one_step import generate_and_score
    from troupe.run.result import RunResult
    from troupe.run.supervisor import Supervisor, train

linux_cpu.keep_freed_memory()
linux_cpu.run_without_compiler()

__version__ = VERSION

__all__ = [
    "RewardActor",
    "RewardSample",
    "RunConfig",
    "RunResult",
    "Supervisor",
    "TroupeError",
    "diagnose",
    "generate_and_score",
    "load_config",
    "train",
]

_HOMES = {
    "RewardActor": "rewards",
    "RewardSample": "rewards",
    "RunConfig": "run.config",
    "RunResult": "run.result",
    "Supervisor": "run.supervisor",
    "TroupeError": "errors",
    "diagnose": "records.diagnosis.past",
    "generate_and_score": "run.one_step",
    "load_config": "run.config",
    "train": "run.supervisor",
}
_ROOMS = {"checkpoint", "dataset", "environments", "errors", "grpo", "messages", "policy", "rewards"}


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for: a daemon and `troupe status` need no MLX."""
    if name not in _ROOMS and name not in _HOMES:
        raise AttributeError(f"module 'troupe' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"troupe.{_HOMES.get(name, name)}")
    except ImportError as error:
        if (told := missing_backend(error)) is None:
            raise
        raise ImportError(f"troupe.{name}: {told}") from None
    if name in _ROOMS:
        return module
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
