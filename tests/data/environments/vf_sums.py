"""A taskset of verifiers: sums, rewarded by two rubrics, answered at once."""

import verifiers.v1 as vf

__all__ = ["SumsTaskset"]


class SumsData(vf.TaskData):
    answer: str


class SumsTask(vf.Task[SumsData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 3)

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class SumsConfig(vf.TasksetConfig):
    largest: int = 5


class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
    def load(self):  # type: ignore[no-untyped-def]
        for a in range(self.config.largest):
            yield SumsTask(SumsData(prompt=f"{a}+{a}=", system_prompt="Add.", answer=str(a + a)), self.config.task)
