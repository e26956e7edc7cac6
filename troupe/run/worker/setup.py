"""What a worker's generator is made of: the run's setup, with what is this machine's own."""

import re
from pathlib import Path

import msgspec

from troupe.actors.generator.wire import BaseSource, Setup, decode_in_process
from troupe.errors import ModelError, RunError
from troupe.policy import network_fingerprint

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")


class Here(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner of the machine has decided."""

    on_cpu: bool
    env: dict[str, str] = {}
    """Of the generator's process, besides this one's: which card it sees."""
    model: Path | None = None
    """Where the base lies that an adapter is trained beside."""
    limit_gb: float | None = None
    """Of MLX's memory, in 10⁹ bytes."""


def read_setup(frame: bytes) -> Setup:
    """The run's setup. MessageError where the frame is none, RunError where it asks for what a run may not."""
    setup = decode_in_process(frame)
    if not isinstance(setup, Setup):
        raise RunError(f"the run sent a {type(setup).__name__} as the setup of its generator")
    for file in setup.tokenizer_files:
        if not _FILE_NAME.fullmatch(file):
            raise RunError(f"the run sent a file of its tokenizer under the name {file!r}, which may lead elsewhere")
    if not setup.tokenizer_files:
        raise RunError("the run sent no files of its tokenizer")
    return setup


def own_setup(setup: Setup, name: str, here: Here) -> Setup:
    """The setup for this machine. ModelError where the base is not here. Takes a while where there is one."""
    base = None if setup.base is None else _base_here(setup.base, here.model)
    return msgspec.structs.replace(setup, name=name, base=base, on_cpu=here.on_cpu, limit_gb=here.limit_gb)


def _base_here(source: BaseSource, model: Path | None) -> BaseSource:
    """The base at its place on this machine."""
    folder = Path(source.folder) if model is None else model
    try:
        found = network_fingerprint(folder) if folder.is_dir() else None
    except (ModelError, OSError):
        found = None
    if found == source.fingerprint:
        return msgspec.structs.replace(source, folder=str(folder))
    why = "is no model folder" if found is None else "is another model than the run's"
    raise ModelError(
        f"{folder}: {why}; the run trains an adapter beside the model that it calls {source.folder}: copy that folder "
        "here, and name it with --model"
    )
