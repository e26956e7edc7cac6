"""Every error that Troupe raises on purpose, in one tree, and what they tell to install where a package is missing.

TroupeError
├── InputError              bad input, found before work starts; exit code 2
│   ├── ConfigError         a key of the configuration: unknown, wrong type, out of range
│   ├── DatasetError        a file or row of prompts
│   ├── ModelError          a model folder: configuration, weights, tokenizer
│   ├── RewardError         reward code that is missing, does not import or breaks its contract
│   ├── WorldError          an environment or tool that is missing, does not import or breaks its contract
│   ├── OutputError         an output folder that may not be used
│   └── CheckpointError     a checkpoint that is damaged or belongs to another run
└── RunError                a fault while a run was under way; exit code 3
    └── FolderGoneError     the run folder was moved, deleted or exchanged under the run

A message names the value, the limit and what to do about it, and starts with the file, line or key at fault.
"""

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_PARENT = Path(__file__).resolve().parent.parent
_REQUIREMENT = re.compile(r"(?P<package>[^;]+?)\s*;.*\bextra\s*==\s*['\"](?P<extra>[^'\"]+)['\"]")


def sayable(text: str) -> str:
    """The text as UTF-8 can say it: lone surrogates, as of a file name in another encoding, become their escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


class TroupeError(Exception):
    """The root: `except TroupeError` catches everything that Troupe itself raises."""


class InputError(TroupeError):
    """What the user gave cannot be used; nothing has been written."""


class ConfigError(InputError):
    """A configuration key is unknown, has the wrong type or lies outside its bounds."""


class DatasetError(InputError):
    """A dataset file is missing, empty or holds a row that cannot be used."""


class ModelError(InputError):
    """A model folder lacks a file, or a file in it is damaged, mis-shaped or unsupported."""


class RewardError(InputError):
    """A reward cannot be loaded, or returned something that is no list of scores."""


class WorldError(InputError):
    """An environment or a tool cannot be loaded, breaks its contract, or is named by a row and unknown."""


class OutputError(InputError):
    """The output folder may not be written: it holds files, or it cannot be created."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, damaged or of another run."""


class RunError(TroupeError):
    """A fault stopped a run; its newest complete checkpoint is still whole."""


class FolderGoneError(RunError):
    """The name of the run folder does not lead any more to the folder that the run began to write in."""


def in_clone() -> bool:
    """Whether this is a clone of the repository, and not an installed wheel."""
    return (_PARENT / "setup.sh").is_file() and (_PARENT / "pyproject.toml").is_file()


def packages_of(extra: str) -> list[str]:
    """What an extra of Troupe's stands for, as pip reads it; empty where the installation does not say."""
    try:
        found = map(_REQUIREMENT.fullmatch, requires("troupe") or [])
    except PackageNotFoundError:
        return []
    return [match["package"].replace(" ", "") for match in found if match and match["extra"] == extra]


def remedy(extra: str) -> str:
    """What to do where a package of an extra is missing; a clause for a message."""
    packages = packages_of(extra)
    if in_clone() or not packages:
        return f"install Troupe's extra in its clone: pip install -e '.[{extra}]'"
    return f"install it: {pip(packages)}"


def pip(packages: list[str]) -> str:
    """The command that installs packages where Troupe is, whatever `pip` means in the shell."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])
