"""From the text that names a source of prompts to its rows.

Those that Hugging Face `datasets` loads, of the hub, its cache or a folder here, need the extra `datasets`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from troupe.dataset import gym
from troupe.dataset.files import import_optional, read_csv, read_json, read_jsonl, read_parquet, refuse_folder
from troupe.dataset.query import split_query
from troupe.errors import DatasetError
from troupe.runtime.files import expanded

FILES: dict[str, Callable[[Path], Iterator[tuple[int | None, Any]]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""Suffix → what reads the rows of such a file, each with its line where there are lines."""

HUB = "hf:"
_OPTIONS = {"split": "split", "config": "name", "revision": "revision", "data_dir": "data_dir"}
"""Option of a source → argument of `datasets.load_dataset`."""
_SAVED = ("dataset_dict.json", "state.json")
"""Of which `save_to_disk` leaves one in the folder that it writes."""


def read_source(source: str, first: int | None = None) -> tuple[Iterable[tuple[int | None, Any]], int | None]:
    """Line (None where there is none) and value of each row; and how many there are, where not all of them come
    because `first` are enough. DatasetError where they cannot be had."""
    if source.startswith(gym.PREFIX):
        rows, in_all = gym.read_gym(source, first)
        return ((None, row) for row in rows), in_all
    if source.startswith(HUB):
        return read_hub(source), None
    return read_file(expanded(source)), None


def read_file(path: Path) -> Iterator[tuple[int | None, Any]]:
    """Line and value of each row of a file."""
    refuse_folder(path)
    read = FILES.get(path.suffix.lower())
    if read is None:
        shown = f"unknown suffix {path.suffix!r}" if path.suffix else "a file of prompts has a suffix"
        raise DatasetError(f"{path}: {shown}; give a {', '.join(FILES)} file of prompts, hf:NAME or reasoning_gym:TASK")
    return read(path)


def anchored_source(source: str, base: Path) -> str:
    """The source as it is found from everywhere: paths, also of an `hf:FOLDER` that exists, counted from `base`."""
    if source.startswith(gym.PREFIX):
        return source
    if source.startswith(HUB):
        name, question, query = source.removeprefix(HUB).partition("?")
        folder = (base / expanded(name)).absolute()
        return f"{HUB}{folder}{question}{query}" if name and folder.exists() else source
    return str((base / expanded(source)).absolute())


def source_name(source: str) -> str:
    """What a run of these prompts may be called: the file's name without suffix, the dataset's or the first task's."""
    for prefix in (HUB, gym.PREFIX):
        if source.startswith(prefix):
            name = source.removeprefix(prefix).partition("?")[0]
            return Path(name.partition(",")[0]).name or "run"
    return Path(source).stem or "run"


def read_hub(source: str) -> Iterator[tuple[None, dict[str, Any]]]:
    """The rows of `hf:NAME?split=…&config=…&revision=…&data_dir=…`; the split is "train" where none is given.

    NAME is a dataset of the hub, a folder of files that `load_dataset` understands, or one that `save_to_disk` wrote;
    of a single dataset in the latter all rows are taken where no split is given.

    Raises:
        DatasetError: for whatever keeps it from being loaded.
    """
    name, options = split_query(source)
    name = name.removeprefix(HUB)
    if not name:
        raise DatasetError(f"{source}: no dataset is named; write hf:NAME or hf:FOLDER")
    if unknown := sorted(options.keys() - _OPTIONS.keys()):
        raise DatasetError(f"{source}: unknown option {unknown[0]}; there are {', '.join(_OPTIONS)}")
    datasets = import_optional("datasets", "datasets", source)
    split = options.pop("split", None)
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


def _load(datasets: Any, name: str, split: str | None, arguments: dict[str, str]) -> Any:
    folder = expanded(name)
    if not any((folder / file).is_file() for file in _SAVED):
        if folder.exists() and "revision" in arguments:  # which the library would not heed
            raise DatasetError(f"{name}: a folder has no revisions; leave the option out")
        return datasets.load_dataset(str(folder) if folder.exists() else name, split=split or "train", **arguments)
    if arguments:
        raise DatasetError(f"{name}: this folder was written by save_to_disk and takes no option but split")
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        return _pick_split(datasets, name, found, split or "train")
    return found if split is None else _pick_split(datasets, name, {_name_of_split(folder, found): found}, split)


def _name_of_split(folder: Path, dataset: Any) -> str:
    """What a saved dataset says that it was, or the folder that it was saved in: a split's name, or "train" where it
    was made of rows or of several splits."""
    if (folder.resolve().parent / _SAVED[0]).is_file():
        return folder.resolve().name
    names = set(re.findall(r"(?:^|\+)(\w+)", str(dataset.split or "")))
    return names.pop() if len(names) == 1 else "train"


def _pick_split(datasets: Any, name: str, parts: Mapping[str, Any], split: str) -> Any:
    """A split, or what the library calls a slice or a sum of several."""
    if split in parts:
        return parts[split]
    sizes = {part: len(rows) for part, rows in parts.items()}
    try:
        instruction = datasets.ReadInstruction.from_spec("+".join(sizes) if split == "all" else split)
        slices = instruction.to_absolute(sizes)
    except Exception as error:  # of a name that is not there, and of what is no slice
        raise DatasetError(
            f"{name}: there is no split {split!r}; there are {', '.join(sizes)}, and slices of them such as "
            f"{next(iter(sizes), 'train')}[:500]"
        ) from error
    return datasets.concatenate_datasets([parts[cut.splitname].select(range(cut.from_, cut.to)) for cut in slices])
