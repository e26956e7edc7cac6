"""Troupe: GRPO training of Qwen3 models on Apple's MLX, played by independent asynchronous actors."""

import warnings

from troupe import linux_cpu

if linux_cpu.load_openblas() == "too late":  # must run before anything imports mlx.core
    warnings.warn(
        "mlx was imported before troupe, so matrix products on this CPU stay 30 times slower than they could be; "
        "import troupe first",
        RuntimeWarning,
        stacklevel=2,
    )

from troupe.config import RunConfig, load_config
from troupe.errors import TroupeError
from troupe.rewards import RewardActor, RewardSample
from troupe.rollouts import generate_and_score
from troupe.supervisor import RunResult, Supervisor, train

linux_cpu.run_without_compiler()

__version__ = "0.1.0"

__all__ = [
    "RewardActor",
    "RewardSample",
    "RunConfig",
    "RunResult",
    "Supervisor",
    "TroupeError",
    "generate_and_score",
    "load_config",
    "train",
]
