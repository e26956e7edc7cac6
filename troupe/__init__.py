"""Troupe: GRPO training of Qwen3 models on Apple's MLX, played by independent asynchronous actors."""

import warnings

from troupe import openblas

if openblas.load() == "too late":  # must run before anything imports mlx.core
    warnings.warn(
        "mlx was imported before troupe, so matrix products on this CPU stay 30 times slower than they could be; "
        "import troupe first",
        RuntimeWarning,
        stacklevel=2,
    )

__version__ = "0.1.0"
