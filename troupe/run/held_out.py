"""HeldOut: what greedy completions of the held-out rows are worth, before and after training."""

from __future__ import annotations

import math

import msgspec

from troupe.messages import Incident
from troupe.policy import Policy, load_policy
from troupe.run.activity import Progress
from troupe.run.evaluate import Evaluation, evaluate
from troupe.run.pipeline import Pipeline
from troupe.run.prepare import Prepared
from troupe.run.start import Start
from troupe.runtime.device import DeviceThread


class HeldOut:
    """Evaluates policies of one run; where it has no held-out rows, nothing."""

    def __init__(self, prepared: Prepared, pipeline: Pipeline, device: DeviceThread, progress: Progress) -> None:
        """`device`: the thread that rows are completed in."""
        self._inputs = prepared.inputs
        self._config = prepared.config
        self._pipeline = pipeline
        self._device = device
        self._progress = progress

    async def untrained_policy(self, start: Start) -> Policy:
        """The policy as it was before step 0, read again where this start goes on from a checkpoint."""
        if start.checkpoint is None or self._inputs.evaluation is None:
            return start.policy
        with self._progress.at("loading the policy as it was before step 1"):
            read = await self._device.run(load_policy, self._inputs.source, self._config.model.dtype)
        return start.policy.having(read.weights)

    async def evaluate(self, policy: Policy, what: str) -> Evaluation | None:
        """Complete and score every row. `what`: the rows, in words."""
        held_out = self._inputs.evaluation
        if held_out is None:
            return None

        def tell(incident: Incident) -> None:  # its gid is the number of a row
            self._pipeline.tell(msgspec.structs.replace(incident, gid=None, message=f"{what}: {incident.message}"))

        with self._progress.at(what) as progress:
            return await evaluate(
                policy,
                held_out.dataset,
                held_out.prompt_ids,
                generation=msgspec.structs.replace(self._config.generation, temperature=0.0),
                device=self._device,
                rewards=self._inputs.rewards,
                progress=progress,
                tell=tell,
            )


def mean_scores(evaluation: Evaluation | None) -> dict[str, float]:
    """The mean score of each reward that scored anything."""
    means = {} if evaluation is None else evaluation.rewards
    return {name: mean for name, mean in means.items() if not math.isnan(mean)}
