"""A taskset of verifiers with an environment of its own, which talks over several turns."""

import verifiers.v1 as vf

__all__ = ["CountdownEnv", "CountdownTaskset"]


class CountdownData(vf.TaskData):
    start: int


class CountdownTask(vf.Task[CountdownData, vf.State, vf.TaskConfig]):
    pass


class CountdownConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class CountdownEnv(vf.Env[CountdownConfig]):
    async def run(self, task, agents):  # type: ignore[no-untyped-def]
        right = 0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            for expected in range(task.data.start - 1, -1, -1):
                right += segment.last_reply == str(expected)
                if expected:
                    segment = await interaction.turn("and then?")
        interaction.trace.record_reward("counted", right / task.data.start, 1.0)

    async def finalize(self, task, episode):  # type: ignore[no-untyped-def]
        (trace,) = (each for each in episode.traces if each.agent.name == "player")
        trace.record_metric("start", task.data.start)


class CountdownTaskset(vf.Taskset[CountdownTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self):  # type: ignore[no-untyped-def]
        start = 1
        while True:
            yield CountdownTask(CountdownData(prompt=f"Count down from {start}.", start=start), self.config.task)
            start += 1
