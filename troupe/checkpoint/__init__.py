"""A folder that is whole or absent.

A checkpoint is a Hugging Face model folder that other tools load as it is, plus what training needs to go on:

    config.json  model.safetensors  tokenizer files      the policy
    optimizer.safetensors                                 the optimizer's state: moments of AdamW and the like
    unfinished.msgpack                                    groups under way: completions and scores not trained on yet
    rows.msgpack                                          what is known of the rows, where they are chosen by it
    behind-00000009.safetensors                           older policy versions that generation still needs
    reference.safetensors                                 the reference policy, where it follows the policy
    teacher.safetensors                                   the policy as its own teacher, where that follows it
    state.json                                            `RunState`
    made.json                                             `Made`: with which config, on what machine
    MANIFEST.json                                         size and sha256 of every file, written last

A folder without a manifest is no checkpoint. While a folder replaces an older one of the same name, the older one
waits beside it under `.replaced-NAME`, where reading finds it after a crash.
"""

from troupe.checkpoint.keep import (
    Pruned,
    best_checkpoint,
    checkpoint_folder,
    clear_leftovers,
    list_checkpoints,
    newer_versions,
    prune_checkpoints,
)
from troupe.checkpoint.read import load_checkpoint, load_newest, read_made, read_state, verify_manifest
from troupe.checkpoint.state import FORMAT, MANIFEST, Checkpoint, CheckpointConfig, Made, RewardState, RunState
from troupe.checkpoint.write import save_checkpoint, save_final_policy

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Checkpoint",
    "CheckpointConfig",
    "Made",
    "Pruned",
    "RewardState",
    "RunState",
    "best_checkpoint",
    "checkpoint_folder",
    "clear_leftovers",
    "list_checkpoints",
    "load_checkpoint",
    "load_newest",
    "newer_versions",
    "prune_checkpoints",
    "read_made",
    "read_state",
    "save_checkpoint",
    "save_final_policy",
    "verify_manifest",
]
