"""Files: `~` in their names, writing one whole, reading TOML. Quick to import."""

import fcntl
import os
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from troupe.errors import ConfigError


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of `~` or `~USER`; as it is where that has none, to be told of as any
    other file that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


@contextmanager
def drafted(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A file to write in place of `path`: it takes that name, whole, at the end of the block.

    Where the block fails, `path` is what it was and the draft is gone. `durable`: on the disk, too, before the old file
    goes.
    """
    draft = path.with_name(f".writing-{path.name}")
    try:
        yield draft
        if durable:
            sync(draft)
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or which names a folder has, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """Wait until what was written to an open file is on the disk."""
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: its fsync leaves data in the drive's cache
    if full is not None:
        with suppress(OSError):  # a file system that has no such thing
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a file; ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        hint = ""
        if (path / "run.toml").is_file():
            hint = f"; this is the folder of a run, to go on with: troupe train -o {shlex.quote(str(path))} --resume"
        raise ConfigError(f"{path}: the configuration cannot be read: {error}{hint}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: this is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: the configuration is nested too deeply") from None
