"""Rows that Hugging Face `datasets` loads: of the hub, its cache, or a folder here. Needs the extra `datasets`.

Knows nothing of what a row must be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from troupe.dataset.extras import optional
from troupe.dataset.queries import split_query
from troupe.errors import DatasetError

PREFIX = "hf:"
_OPTIONS = {"split": "split", "config": "name", "revision": "revision", "data_dir": "data_dir"}
"""Option of a source → argument of `datasets.load_dataset`."""
_SAVED = ("dataset_dict.json", "state.json")
"""Of which `save_to_disk` leaves one in the folder that it writes."""


def read_hub(source: str) -> Iterator[tuple[None, dict[str, Any]]]:
    """The rows of `hf:NAME?split=…&config=…&revision=…&data_dir=…`; the split is "train" where none is given.

    NAME is a dataset of the hub, a folder of files that `load_dataset` understands, or one that `save_to_disk` wrote.

    Raises:
        DatasetError: for whatever keeps it from being loaded.
    """
    name, options = split_query(source)
    name = name.removeprefix(PREFIX)
    if not name:
        raise DatasetError(f"{source}: no dataset is named; write hf:NAME or hf:FOLDER")
    if unknown := sorted(options.keys() - _OPTIONS.keys()):
        raise DatasetError(f"{source}: unknown option {unknown[0]}; there are {', '.join(_OPTIONS)}")
    datasets = optional("datasets", "datasets", source)
    split = options.pop("split", "train")
    try:
        loaded = _load(datasets, name, split, {_OPTIONS[key]: value for key, value in options.items()})
    except DatasetError:
        raise
    except Exception as error:  # the network's, the hub's and the files' many kinds
        raise DatasetError(
            f"{source}: datasets.load_dataset failed: {type(error).__name__}: {' '.join(str(error).split())}; check "
            "name, config and split (HF_DATASETS_OFFLINE=1 keeps it to the cache)"
        ) from error
    for row in loaded:
        yield None, row


def _load(datasets: Any, name: str, split: str, arguments: dict[str, str]) -> Any:
    folder = Path(name).expanduser()
    if not any((folder / file).is_file() for file in _SAVED):
        return datasets.load_dataset(str(folder) if folder.exists() else name, split=split, **arguments)
    if arguments:
        raise DatasetError(f"{name}: this folder was written by save_to_disk and takes no option but split")
    found = datasets.load_from_disk(str(folder))
    if not isinstance(found, datasets.DatasetDict):
        return found
    if split not in found:
        raise DatasetError(f"{name}: there is no split {split!r}; there are {', '.join(found)}")
    return found[split]
