"""A folder for the weights that a worker has fetched: in memory where there is room; gone with the worker, or, where
that was killed, at the next start of a worker or a run."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from troupe.actors.generator.weights_files import SHARED_MEMORY, free_bytes, locked_folder, remove_leftovers
from troupe.errors import RunError


@contextmanager
def scratch_folder(needed: int, places: tuple[Path, ...] = ()) -> Iterator[Path]:
    """An empty folder with room for so many bytes. RunError where no place has it."""
    places = places or (SHARED_MEMORY, Path(tempfile.gettempdir()))
    for each in places:
        remove_leftovers(each, each)
    usable = [place for place in places if place.is_dir() and os.access(place, os.W_OK)]
    roomy = next((place for place in usable if free_bytes(place) >= needed), None)
    if roomy is None:
        found = " and ".join(f"{place} has {free_bytes(place) / 1e9:.3g} GB free" for place in usable)
        raise RunError(f"versions of the policy take {needed / 1e9:.3g} GB of files here, but {found}; make room")
    folder, lock = locked_folder(roomy)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
