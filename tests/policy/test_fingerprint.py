"""Model folders told apart without reading all of them."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import write_tiny_model
from troupe.policy import model_fingerprint, network_fingerprint
from troupe.policy.model_files import SAMPLE_BYTES, SAMPLES


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_a_copy_elsewhere_is_the_same(tiny_model: Path, model: Path) -> None:
    before = model_fingerprint(tiny_model)
    assert (len(before), before == model_fingerprint(model)) == (64, True)
    (model / "README.md").write_text("about")
    (model / "LICENSE").write_text("free")
    (model / "optimizer.bin").write_bytes(b"x")
    assert model_fingerprint(model) == before, "what says nothing of the model does not count"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_byte_of_configuration_and_tokenizer_counts(model: Path, name: str) -> None:
    before = model_fingerprint(model)
    text = bytearray((model / name).read_bytes())
    text[len(text) // 2] ^= 1
    (model / name).write_bytes(text)
    assert model_fingerprint(model) != before


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja", "qwen.tiktoken", "x.safetensors"])
def test_another_file_that_counts(model: Path, name: str) -> None:
    before = model_fingerprint(model)
    (model / name).write_bytes(struct.pack("<Q", 2) + b"{}")
    assert model_fingerprint(model) != before


def test_what_an_adapter_stands_beside_is_configuration_and_weights_alone(tiny_model: Path, model: Path) -> None:
    before = network_fingerprint(tiny_model)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (model / name).write_text("{}")
    assert network_fingerprint(model) == before
    (model / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n")
    assert network_fingerprint(model) != before
    assert network_fingerprint(write_tiny_model(model.parent / "other", seed=1)) != before


def test_other_weights_are_another_model(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    assert model_fingerprint(other) != model_fingerprint(tiny_model)


def weights_file(folder: Path, size: int, *, flipped: int | None = None, name: str = "a") -> Path:
    """A safetensors file of one tensor of `size` bytes, the bit of one of them flipped."""
    folder.mkdir(exist_ok=True)
    header = f'{{"{name}":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    data = bytearray(size)
    if flipped is not None:
        data[flipped] = 1
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def test_pieces_are_looked_at_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    size = 4 * SAMPLES * SAMPLE_BYTES
    before = model_fingerprint(weights_file(tmp_path, size))
    step = size // SAMPLES
    for place in (0, SAMPLE_BYTES - 1, step, 40 * step + 5, size - 1):
        assert model_fingerprint(weights_file(tmp_path, size, flipped=place)) != before, place
    assert model_fingerprint(weights_file(tmp_path, size, name="b")) != before
    assert model_fingerprint(weights_file(tmp_path, size + 1)) != before


def test_a_large_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weights_file(tmp_path, 100)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(16_000_000_000)  # a hole, which takes no room
    read = 0

    class Counting:
        def __init__(self) -> None:
            self._sum: Any = sha256()

        def update(self, piece: bytes) -> None:
            nonlocal read
            read += len(piece)
            self._sum.update(piece)

        def hexdigest(self) -> str:
            return str(self._sum.hexdigest())

    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", Counting)
    model_fingerprint(folder)
    assert SAMPLES * SAMPLE_BYTES < read < 2 * SAMPLES * SAMPLE_BYTES


def test_a_small_file_is_read_whole(tmp_path: Path) -> None:
    before = model_fingerprint(weights_file(tmp_path, 3 * SAMPLE_BYTES))
    for place in range(0, 3 * SAMPLE_BYTES, 1001):
        assert model_fingerprint(weights_file(tmp_path, 3 * SAMPLE_BYTES, flipped=place)) != before


def test_an_empty_folder_and_a_damaged_header(tmp_path: Path) -> None:
    empty = model_fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert model_fingerprint(tmp_path) != empty
