"""The maker of a run's generator: in a thread or in processes, of completions or of episodes."""

from collections.abc import Callable
from functools import partial
from typing import Any

from troupe.actors.generator.acting import ActingConfig, ActingGenerator
from troupe.actors.generator.actor import Generator
from troupe.actors.generator.crew import Members
from troupe.actors.generator.episodes import EpisodeLimits
from troupe.actors.generator.local import LocalProcesses
from troupe.actors.generator.remote import RemoteGenerator
from troupe.actors.generator.wire import BaseSource, Setup
from troupe.actors.schedule import ScheduleConfig
from troupe.grpo import LearnerConfig
from troupe.messages import Slot
from troupe.policy import GenerationConfig, is_on_cpu
from troupe.run.acting import sessions_of
from troupe.run.cluster import Hub
from troupe.run.engines import engine_members
from troupe.run.ledgers import Factories, Ledgers
from troupe.run.prepare import Prepared
from troupe.run.wiring import Wiring
from troupe.runtime.actor import Actor


def _most_at_once(prepared: Prepared) -> int | None:
    """Prompts that a decode of the free schedule has at the most; None: the schedule is pinned."""
    return prepared.config.learner.batch_size if prepared.config.schedule.mode == "free" else None


def make_generator(
    prepared: Prepared, wiring: Wiring, ledgers: Ledgers, factories: Factories, hub: Hub | None = None
) -> Callable[[], Actor]:
    """`hub`: what workers speak to, where the run is served."""
    config, policy = prepared.config, prepared.start.policy
    shared: dict[str, Any] = {
        "board": ledgers.board,
        "handed_over": ledgers.handed_over,
        "recorded": ledgers.recorded,
        "report": wiring.reporters["generator"],
    }
    acting = wiring.acting
    groups = wiring.completed if acting is None else acting.sampled
    if sources := _sources(prepared, wiring, ledgers, hub):
        return partial(
            RemoteGenerator,
            wiring.generator,
            groups,
            members=lambda: [source() for source in sources],
            parts=_parts(config.schedule) if config.schedule.mode == "pinned" else None,
            turns=None if acting is None else acting.turns,
            rows=None if wiring.evaluating is None else wiring.evaluating.parts,
            **shared,
        )
    shared |= {
        "device": ledgers.devices["generator"],
        "engine": partial(
            factories.engine,
            policy.config,
            config.generation,
            stop_ids=policy.eos_ids,
            tokenizer=policy.tokenizer,
            base=policy.base,
            **({"records_experts": True} if records_experts(config.learner) else {}),
        ),
        "decode_text": policy.tokenizer.decode_sampled,
    }
    if acting is not None:
        acts = acting_config(prepared)
        return partial(ActingGenerator, wiring.generator, groups, acting.turns, config=acts, **shared)
    return partial(
        Generator,
        wiring.generator,
        groups,
        seed=config.seed,
        most_at_once=_most_at_once(prepared),
        parts=_parts(config.schedule),
        **shared,
    )


def _sources(prepared: Prepared, wiring: Wiring, ledgers: Ledgers, hub: Hub | None) -> list[Callable[[], Members]]:
    """The makers of those who decode elsewhere; none where the generator is a thread."""
    config, device = prepared.config, ledgers.devices["generator"]
    policy, sources = prepared.start.policy, list[Callable[[], Members]]()
    if ledgers.files is not None:
        setups = _setups(prepared, ledgers.board.max_staleness, live=wiring.prompts.stats().bound)
        shared: dict[str, Any] = {"board": ledgers.board, "files": ledgers.files, "device": device}
        if hub is None or config.cluster.local_parts:
            report, envs = wiring.reporters["generator"], _envs(prepared)
            sources.append(partial(LocalProcesses, setups, report=report, envs=envs, hosts=ledgers.hosts, **shared))
        if hub is not None:
            hub.attach(report=wiring.supervisor_report, setup=setups[0], policy=policy, **shared)
            assert prepared.inputs.calls is not None
            prepared.inputs.calls.join(hub.desk, hub.roster)
            sources.append(lambda: hub.members)
    if config.schedule.engines:
        inputs = prepared.inputs
        probe_ids = inputs.schedule.prompt(Slot(step=0, place=0)).prompt_ids
        sources.append(engine_members(config, policy, prepared.folder, inputs.source, probe_ids, device))
    return sources


def _envs(prepared: Prepared) -> list[dict[str, str]]:
    """What each process of the generator has in its environment besides, where cards are shared out."""
    processes = prepared.config.schedule.generator_processes or 1
    return [] if prepared.cards is None else [prepared.cards.of_generator(number) for number in range(processes)]


def _parts(schedule: ScheduleConfig) -> int:
    return schedule.parts or 1


def acting_config(prepared: Prepared) -> ActingConfig:
    """What episodes are sampled with."""
    config, acting_setup = prepared.config, prepared.inputs.acting_setup
    assert acting_setup is not None
    return ActingConfig(
        seed=config.seed,
        limits=EpisodeLimits(
            num_generations=config.generation.num_generations,
            max_completion_length=config.generation.max_completion_length,
            context=acting_setup.rules.context,
            max_turns=acting_setup.rules.max_turns,
        ),
        sessions=sessions_of(config.schedule),
        parts=_parts(config.schedule),
        most_at_once=_most_at_once(prepared),
    )


def records_experts(learner: LearnerConfig) -> bool:
    """Whether the generator is to say which experts tokens went to."""
    return learner.router_replay != "off"


def _setups(prepared: Prepared, staleness: int, *, live: int) -> list[Setup]:
    """What each process of the generator is made of."""
    config = prepared.config
    schedule = config.schedule
    processes = schedule.generator_processes or 1
    return [
        Setup(
            name=f"generator {number}" if processes > 1 else "generator",
            policy=prepared.start.policy.config,
            base=base_source(prepared),
            generation=config.generation,
            sets=_sets(prepared),
            stop_ids=tuple(sorted(prepared.start.policy.eos_ids)),
            tokenizer=str(prepared.inputs.source),
            tokenizer_files=prepared.start.policy.companions.files,
            seed=config.seed,
            max_staleness=staleness,
            parts=_parts(schedule),
            most_at_once=_most_at_once(prepared),
            live=live,
            on_cpu=is_on_cpu(),
            blas_threads=schedule.blas_threads,
            records_experts=records_experts(config.learner),
            acts=acting_config(prepared) if prepared.inputs.acting_setup is not None else None,
            limit_gb=prepared.memory.generator_limit_gb,
        )
        for number in range(processes)
    ]


def _sets(prepared: Prepared) -> tuple[GenerationConfig, ...]:
    """What rows of each set are completed with that members of the crew decode. Episodes are not: they are had where
    the environments are."""
    inputs = prepared.inputs
    if inputs.acting_setup is not None:
        return ()
    return tuple(each.settings.generation(prepared.config.generation) for each in inputs.sets)


def base_source(prepared: Prepared) -> BaseSource | None:
    """Where a process of the generator reads the base, where an adapter is trained."""
    policy = prepared.start.policy
    if policy.base.adapter is None:
        return None
    return BaseSource(
        folder=str(prepared.inputs.source),
        fingerprint=policy.base.fingerprint,
        dtype=policy.dtype,
        adapter=policy.base.adapter,
    )
