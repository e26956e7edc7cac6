"""Which sinks need a package of others, and whether it is there. Imports none of them before it is asked to."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

from troupe.errors import ConfigError, remedy
from troupe.records.sinks.base import MetricsConfig, SinkName

_PACKAGES: dict[SinkName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_sinks(config: MetricsConfig) -> None:
    """Whether each sink that is asked for can work here, as far as that can be known before work starts.

    ConfigError with the remedy. Somebody who is not logged in is never asked for it later.
    """
    for name in config.sinks:
        if name in _PACKAGES:
            package(name)
        if name in _CHECKS:
            _CHECKS[name](config)


def package(sink: SinkName, module: str = "") -> Any:
    """The package that a sink writes with, or a module in it. ConfigError where it cannot be imported."""
    name = _PACKAGES[sink]
    try:
        return importlib.import_module(f"{name}.{module}" if module else name)
    except ImportError as error:
        raise ConfigError(
            f"metrics.sinks has {sink!r}, but the package {name} cannot be imported ({error}); "
            f"{remedy(sink)}, or leave the sink out"
        ) from None


def wandb_mode(config: MetricsConfig) -> str:
    """What the config says, or else the environment."""
    return config.wandb_mode or os.environ.get("WANDB_MODE") or "online"


def _check_wandb(config: MetricsConfig) -> None:
    if wandb_mode(config) == "online" and not package("wandb").login(prompt=False, verify=False):
        raise ConfigError(
            "metrics.sinks has 'wandb', but nobody is logged in to Weights & Biases here; log in with `wandb login` "
            'or WANDB_API_KEY, or keep the run on this machine with metrics.wandb_mode = "offline"'
        )


def _check_prometheus(config: MetricsConfig) -> None:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", config.prometheus_port))
        except OSError as error:
            raise ConfigError(
                f"metrics.prometheus_port is {config.prometheus_port}, where nothing can be served ({error.strerror}); "
                "give another port, perhaps another run has this one"
            ) from None


_CHECKS: dict[SinkName, Callable[[MetricsConfig], None]] = {"wandb": _check_wandb, "prometheus": _check_prometheus}
