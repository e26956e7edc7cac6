"""Every error that Troupe raises on purpose, in one tree.

TroupeError
├── InputError              bad input, found before work starts; exit code 2
│   ├── ConfigError         a key of the configuration: unknown, wrong type, out of range
│   ├── DatasetError        a file or row of prompts
│   ├── ModelError          a model folder: configuration, weights, tokenizer
│   ├── RewardError         reward code that is missing, does not import or breaks its contract
│   ├── OutputError         an output folder that may not be used
│   └── CheckpointError     a checkpoint that is damaged or belongs to another run
└── RunError                a fault while a run was under way; exit code 3
    └── FolderGoneError     the run folder was moved, deleted or exchanged under the run

A message names the value, the limit and what to do about it, and starts with the file, line or key at fault.
"""

from __future__ import annotations


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


class OutputError(InputError):
    """The output folder may not be written: it holds files, or it cannot be created."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, damaged or of another run."""


class RunError(TroupeError):
    """A fault stopped a run; its newest complete checkpoint is still whole."""


class FolderGoneError(RunError):
    """The name of the run folder does not lead any more to the folder that the run began to write in."""
