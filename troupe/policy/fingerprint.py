"""What tells one model folder from another without reading all of it: a run goes on only with the model that it began
with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from troupe.policy.companions import companion_files
from troupe.policy.model_files import INDEX_FILE
from troupe.policy.safetensors import read_start

SAMPLES, SAMPLE_BYTES = 64, 16_384
"""Pieces of each file of weights that are looked at, evenly spaced, and how long each is."""


def model_fingerprint(folder: Path) -> str:
    """64 hexadecimal digits that are the same for the same model, wherever it lies.

    All of the configuration and the tokenizer's files counts; of the weights the names, sizes, headers (names, types
    and shapes of all tensors) and `SAMPLES` pieces of each file, about 1 MB. A folder in which single numbers were
    changed may therefore pass; one that was trained on does not. OSError where a file cannot be read.
    """
    total = hashlib.sha256()
    for file in sorted(_files(folder)):
        size = file.stat().st_size
        total.update(f"{file.name}\0{size}\0".encode())
        for piece in _pieces(file, size):
            total.update(piece)
    return total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    yield from companion_files(folder)
    yield from (file for file in (folder / INDEX_FILE, *folder.glob("*.safetensors")) if file.is_file())


def _pieces(file: Path, size: int) -> Iterator[bytes]:
    if file.suffix != ".safetensors":
        yield file.read_bytes()
        return
    with file.open("rb") as stream:
        yield read_start(stream)
        begin = stream.tell()
        step = max((size - begin) // SAMPLES, SAMPLE_BYTES)
        for start in range(begin, size, step):
            stream.seek(start)
            yield stream.read(SAMPLE_BYTES)
        if size - SAMPLE_BYTES > begin:
            stream.seek(size - SAMPLE_BYTES)
            yield stream.read(SAMPLE_BYTES)
