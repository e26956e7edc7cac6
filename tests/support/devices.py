"""Which device MLX is said to compute on, wherever the tests run."""

from __future__ import annotations

import mlx.core as mx
import pytest


def compute_on(monkeypatch: pytest.MonkeyPatch, *, cpu: bool) -> None:
    """Have the product choose its ways as on a CPU, or as elsewhere."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu if cpu else mx.gpu))
