"""Where transformers' own logits for the tests lie: beside the tests, or in the folder TROUPE_QWEN3_VECTORS names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx

SHIPPED = Path(__file__).parent.parent / "data" / "qwen3"
FOLDER = Path(os.environ.get("TROUPE_QWEN3_VECTORS") or SHIPPED)
ABOUT: dict[str, Any] = json.loads((FOLDER / "qwen3_forward.json").read_text())
MODELS = sorted(ABOUT["models"])
assert MODELS, f"{FOLDER}: names no models"


def model_folder(name: str) -> Path:
    """The model folder of one name in `MODELS`."""
    folders = [config.parent for config in FOLDER.glob("*/config.json")]
    [found] = [folder for folder in folders if folder.name == name or folder.name.endswith(f"-{name}")]
    return found


def tensors() -> dict[str, mx.array]:
    """Inputs and expected results; what "A/…" and "B/…" are is told in qwen3_forward.json."""
    loaded = mx.load(str(FOLDER / ABOUT.get("tensor_file", "qwen3_forward.safetensors")))
    assert isinstance(loaded, dict)
    return loaded
