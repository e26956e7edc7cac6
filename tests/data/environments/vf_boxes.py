"""A taskset of verifiers whose reward looks into a container."""

import verifiers.v1 as vf

__all__ = ["BoxesTaskset"]


class BoxesTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def grows(self, runtime: vf.Runtime) -> float:
        return 1.0


class BoxesTaskset(vf.Taskset[BoxesTask, vf.TasksetConfig]):
    def load(self):  # type: ignore[no-untyped-def]
        yield BoxesTask(vf.TaskData(prompt="Grow."), self.config.task)
