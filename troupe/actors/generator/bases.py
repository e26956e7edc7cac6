"""The base beside an adapter, read in a process of its own."""

from pathlib import Path

from troupe.actors.generator.wire import BaseSource
from troupe.errors import ModelError
from troupe.policy import Base, NetworkConfig, network_fingerprint, read_model_folder


def read_base(config: NetworkConfig, source: BaseSource) -> Base:
    """The base that the run began with, as the run holds it. ModelError where the folder is another model's by now."""
    folder = Path(source.folder)
    if network_fingerprint(folder) != source.fingerprint:
        raise ModelError(
            f"{folder}: the base was changed since the run began, so that its adapter cannot be sampled from; restore "
            "it and resume"
        )
    read, weights = read_model_folder(folder, source.dtype, expand=config.quantization is None)
    return Base.of(read, dict(weights), source.adapter, name=source.folder, fingerprint=source.fingerprint)
