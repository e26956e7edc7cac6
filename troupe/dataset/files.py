"""Reading text files of rows, and saying why one cannot be read."""

from __future__ import annotations

from pathlib import Path

from troupe.errors import DatasetError


def refuse_folder(path: Path) -> None:
    """DatasetError where the path is a folder's."""
    if path.is_dir():
        raise DatasetError(f"{path}: is a folder; name the file in it that has the prompts, or hf:FOLDER for all")


def read_bytes(path: Path) -> bytes:
    """What is in a file. DatasetError where it cannot be had."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; relative paths start at {Path.cwd()}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def read_text(path: Path) -> str:
    """What is in a UTF-8 file, without a byte-order mark. DatasetError where it cannot be had."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
