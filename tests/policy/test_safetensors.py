"""Files of arrays: written chunk by chunk, their headers read, and damage told apart from other formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from tests.checkpoint.checkpoints import ARRAYS, assert_same_arrays
from troupe.errors import ModelError
from troupe.policy.safetensors import read_header, safetensors_bytes, safetensors_chunks

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def write(file: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> int:
    mx.eval(list(arrays.values()))
    return file.write_bytes(b"".join(safetensors_chunks(arrays, metadata)))


def test_arrays_come_back_from_mlx_and_from_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    written = write(file, ARRAYS, {"format": "pt"})
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    assert_same_arrays(loaded, ARRAYS)
    assert [(name, tensor.shape) for name, tensor in read_header(file)] == [
        (name, array.shape) for name, array in sorted(ARRAYS.items())
    ]
    with safe_open(file, framework="numpy") as stored:
        assert stored.metadata() == {"format": "pt"}
        assert stored.get_tensor("turned").tolist() == [[0, 3], [1, 4], [2, 5]]
        assert stored.get_slice("bf16").get_dtype() == "BF16"
    assert written <= safetensors_bytes(ARRAYS) <= written + 256 * len(ARRAYS), "an estimate, never too small"
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    assert header_bytes % 8 == 0, "numbers lie where processors like them"


def test_a_file_does_not_tell_in_which_order_its_arrays_came() -> None:
    mx.eval(list(ARRAYS.values()))
    turned = dict(reversed(ARRAYS.items()))
    assert b"".join(safetensors_chunks(turned)) == b"".join(safetensors_chunks(ARRAYS))


def test_without_metadata_none_is_written(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write(file, {"a": mx.array([1.0])})
    with safe_open(file, framework="numpy") as stored:
        assert stored.metadata() is None
        assert stored.get_tensor("a").tolist() == [1.0]


def headed(header: Any, data: bytes = b"1234") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a header of 0 bytes is not in a file of 0"),
        (b"1234", "is not in a file of 4"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "a header of 1099511627776 bytes is not in a file of 10"),
        ((2).to_bytes(8, "little") + b"xx", "Expecting value"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "can't decode"),
        ((10**5).to_bytes(8, "little") + b"[" * 10**5, "recursion"),
        (headed([["a", F32]]), "its header is no JSON object"),
        (headed({"a": 3}), "Expected `object`"),
        (headed({"a": {"dtype": "F32"}}), "missing required field `shape`"),
        (headed({"a": F32 | {"shape": [-1]}}), ">= 0"),
        (headed({"a": F32 | {"dtype": "Q7"}}), "a: dtype Q7 is not known"),
        (headed({"a": F32 | {"shape": [9]}}), "a: bytes 0 to 4 are not where it lies"),
        (headed({"a": F32 | {"data_offsets": [4, 8]}}), "a: bytes 4 to 8 are not where it lies"),
        (headed({"a": F32, "b": F32}), "b: bytes 0 to 4 are not where it lies"),
        (headed({"a": F32}, b"123"), "bytes, there are"),
        (headed({"a": F32}, b"12345"), "bytes, there are"),
        (headed({"a": F32, "__metadata__": {"format": 1}}), "Expected `str`"),
    ],
)
def test_what_is_no_sound_file_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_header(file)
    assert str(caught.value).startswith(f"{file}: truncated, damaged or no safetensors file (")
    assert str(caught.value).endswith("; copy it again")
    assert told in str(caught.value)


def test_a_pointer_of_git_lfs_is_told_for_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="a pointer of Git LFS"):
        read_header(tmp_path / "a")


def test_types_that_we_do_not_write_are_read(tmp_path: Path) -> None:
    quarter = {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}
    (tmp_path / "a").write_bytes(headed({"a": quarter}))
    ((name, tensor),) = read_header(tmp_path / "a")
    assert (name, tensor.dtype, tensor.shape) == ("a", "F4", (2, 4))
