"""Checked prompts in an order that a seed fixes.

A *source* is a text that names prompts: a file (`.json`, `.jsonl`, `.csv`, `.tsv`, `.parquet`), `hf:NAME` (Hugging Face
`datasets`) or `reasoning_gym:TASK`. Every row is checked when it is read, so that a bad one is refused before the first
token is sampled; whether a prompt fits the model is seen where it is tokenized.
"""

from troupe.dataset.curriculum import CurriculumConfig
from troupe.dataset.gym import stop_making_rows
from troupe.dataset.prompts import PromptDataset
from troupe.dataset.rows import RESERVED_COLUMNS, ROLES, PromptRow
from troupe.dataset.settings import ChatMode, DataConfig
from troupe.dataset.sources import anchored_source, source_name
from troupe.dataset.supervised import SftConfig, SupervisedRows

__all__ = [
    "RESERVED_COLUMNS",
    "ROLES",
    "ChatMode",
    "CurriculumConfig",
    "DataConfig",
    "PromptDataset",
    "PromptRow",
    "SftConfig",
    "SupervisedRows",
    "anchored_source",
    "source_name",
    "stop_making_rows",
]
