"""A folder for the weights that a worker has fetched: in memory where there is room; gone with the worker, or, where
that was killed, at the next start of a worker or a run."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from troupe.actors.generator.locked_folder import SHARED_MEMORY, remove_leftovers, roomy_folder
from troupe.errors import RunError


@contextmanager
def scratch_folder(needed: int, places: tuple[Path, ...] = ()) -> Iterator[Path]:
    """An empty folder with room for so many bytes. RunError where no place has it."""
    places = places or (SHARED_MEMORY, Path(tempfile.gettempdir()))
    remove_leftovers(*places)
    try:
        folder = roomy_folder(places, needed)
    except OSError as error:
        raise RunError(f"versions of the policy: {error}; make room") from None
    try:
        yield folder.path
    finally:
        folder.close()
