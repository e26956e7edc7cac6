"""TrainerState: where training stands, as TRL tells reward functions."""

from __future__ import annotations

from typing import Any

import msgspec


class TrainerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a reward function gets as `trainer_state`: the fields of the object of that name in transformers that mean
    something here, under their names.

    It is a function of the group's slot alone, so a schedule in a reward (a bonus that fades, say) does not depend on
    timing: steps that end while the group is being scored are not counted. Nothing that depends on the machine or the
    moment is there: best_metric, total_flos, num_input_tokens_seen, log_history's entries.
    """

    global_step: int
    """Learner batch k ≥ 0 that the completions are for: batches done when it begins. In TRL: optimizer updates, which
    is the same where num_iterations is 1."""
    max_steps: int
    """Learner batches of the whole run."""
    epoch: float
    """Passes over the dataset before the batch, with the fraction."""
    num_train_epochs: int = 1
    """Passes that the run takes at most, rounded up."""
    train_batch_size: int = 1
    """Completions in a batch, P × G."""
    is_world_process_zero: bool = True
    """Always: one process trains."""
    is_local_process_zero: bool = True
    """Always."""
    is_hyper_param_search: bool = False
    """Never."""
    log_history: tuple[dict[str, Any], ...] = ()
    """Always empty."""

    @classmethod
    def at(cls, step: int, *, max_steps: int, prompts: int, num_generations: int, rows: int) -> TrainerState:
        """For batch `step` of `prompts` prompts each, of a dataset of `rows`."""
        return cls(
            global_step=step,
            max_steps=max_steps,
            epoch=step * prompts / rows,
            num_train_epochs=-(-max_steps * prompts // rows),
            train_batch_size=prompts * num_generations,
        )
