"""Placement of a run: where the generator runs, how many threads work, and what is chosen so that all of it fits the
memory."""

from itertools import takewhile

import msgspec

from troupe.actors.learner.held_out import largest_pieces
from troupe.actors.schedule import ScheduleConfig
from troupe.errors import ConfigError
from troupe.policy import DTYPES, NetworkConfig
from troupe.run.acting import sessions_of
from troupe.run.config import RunConfig
from troupe.run.devices import Cards
from troupe.run.inputs import Inputs
from troupe.run.measure.figures import Place
from troupe.run.memory import Plan, plan_memory
from troupe.run.workload import SupervisedRowSizes, Workload
from troupe.runtime import linux_cpu


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What of this machine matters to where work is placed."""

    on_cpu: bool
    cards: Cards | None = None
    """Who has which card, where they are shared out."""
    cores: int | None
    """Threads that OpenBLAS takes by itself; None where nobody can tell."""
    worthwhile: int = 2**18
    """Numbers, one a token and place of the hidden state, below which a micro-batch of its own costs more than a
    processor beside the other gains."""
    better: Place | None = None
    """Where the generator overlaps better with the learner, as was measured here; None: nowhere clearly, or unknown."""
    light: int = 2**27
    """Bytes of weights up to which several processes decode faster than one: each reads all of them for every token."""


def place_run(inputs: Inputs, machine: Machine) -> Plan:
    """The config with every choice in it, and the memory that the run takes so. ConfigError where it cannot fit."""
    config, policy = _unsampled(inputs.config), inputs.policy
    worthwhile = _worthwhile(config, policy.config, inputs, machine)
    held = policy.base.weights or policy.weights
    is_light = sum(array.nbytes for array in held.values()) <= machine.light
    config = _placed(config, machine, worthwhile if is_light else 1)
    config, streams = _streamed(config, machine, worthwhile, _given_parts(inputs.config.schedule))
    if machine.on_cpu:
        linux_cpu.take_buffers(streams + (config.schedule.blas_threads or 1) + config.teacher.has_actor)
    work = Workload(
        policy=policy.config,
        dtype=DTYPES[policy.dtype],
        adapter=policy.base.adapter,
        longest_prompt=inputs.longest_prompt,
        on_cpu=machine.on_cpu,
        streams=streams,
        supervised=_of_supervised(inputs),
        evaluates=max((each.settings.generation(config.generation).num_generations for each in inputs.sets), default=0),
        ranks=ranks_of(config, machine),
        beside=_beside(config, machine),
        teachers=() if inputs.teachers is None else inputs.teachers.works,
        longest_demonstrated=max(map(len, inputs.demonstrated or ()), default=0),
        **_of_episodes(config, inputs),
    )
    return _told(plan_memory(config, work), inputs.config, machine)


def _by_figures(config: RunConfig, machine: Machine) -> Place | None:
    """Where the generator goes as was measured, if not where it goes by itself; None: the figures change nothing."""
    schedule = config.schedule
    is_one_beside = schedule.max_staleness > 0 and (schedule.generator_processes or 1) == 1
    is_here = config.cluster.serve is None and not schedule.engines_alone
    has_one_device = machine.cards is None and (schedule.learner_ranks or 1) == 1
    is_open = schedule.generator == "auto" and config.memory_limit_gb is None
    if not (is_open and is_one_beside and is_here and has_one_device):
        return None
    return None if machine.better == _by_itself(machine) else machine.better


def _by_itself(machine: Machine) -> Place:
    """Where the generator works beside the learner as far as nothing was measured."""
    return "process" if machine.on_cpu else "thread"


def _told(plan: Plan, asked: RunConfig, machine: Machine) -> Plan:
    if _by_figures(asked, machine) is None:
        return plan
    notice = (
        f'schedule.generator is "{plan.config.schedule.generator}", as measured on this machine (troupe doctor says by '
        "which file); give another to decide it yourself"
    )
    return msgspec.structs.replace(plan, notices=(*plan.notices, notice))


def ranks_of(config: RunConfig, machine: Machine) -> int:
    """How many processes learn together. ConfigError where they could not have what each needs."""
    if machine.cards is not None:
        return len(machine.cards.ranks)
    ranks = config.schedule.learner_ranks or 1
    if ranks > 1 and not machine.on_cpu:
        raise ConfigError(
            f"schedule.learner_ranks is {ranks}, but each rank has an NVIDIA card of its own, and no such cards are "
            "seen here; leave it out"
        )
    return ranks


def hosts_of(config: RunConfig, machine: Machine) -> tuple[int, ...]:
    """Ranks beside which the first processes of the generator are threads: those of the same cards; on a processor
    where the two take turns."""
    schedule, ranks = config.schedule, ranks_of(config, machine)
    if ranks == 1 or schedule.generator != "process":
        return ()
    processes = schedule.generator_processes or 1
    if machine.cards is None:
        takes_turns = schedule.max_staleness == 0 and config.memory_limit_gb is None
        return tuple(range(min(processes, ranks))) if takes_turns else ()
    of_learner = machine.cards.ranks
    shared = takewhile(of_learner.__contains__, machine.cards.generators[:processes])
    return tuple(map(of_learner.index, shared))


def _beside(config: RunConfig, machine: Machine) -> int | None:
    if machine.cards is None or config.schedule.generator != "process":
        return None
    hosted, processes = len(hosts_of(config, machine)), config.schedule.generator_processes or 1
    others = [machine.cards.of_generator(number) for number in range(hosted, processes)]
    return others.count(machine.cards.of_rank(0))


def _of_episodes(config: RunConfig, inputs: Inputs) -> dict[str, int]:
    """What the memory of a run that acts follows from besides."""
    acting_setup = inputs.acting_setup
    if acting_setup is None:
        return {}
    longest = acting_setup.rules.context - config.generation.max_completion_length
    sessions = {"sessions": sessions_of(config.schedule)}
    return sessions | ({"longest_history": longest} if acting_setup.begins_rows else {})


def _unsampled(config: RunConfig) -> RunConfig:
    """Where nothing is sampled the generator is a thread that rests."""
    schedule = config.schedule
    if config.task == "grpo" or schedule.generator != "auto" or schedule.engines:
        return config
    return msgspec.structs.replace(config, schedule=msgspec.structs.replace(schedule, generator="thread"))


def _of_supervised(inputs: Inputs) -> SupervisedRowSizes | None:
    rows = inputs.supervised
    if rows is None:
        return None
    return SupervisedRowSizes(
        rows.longest_prompt, rows.longest_completion, rows.longest_history, largest_pieces(rows.held_out)
    )


def _worthwhile(config: RunConfig, policy: NetworkConfig, inputs: Inputs, machine: Machine) -> int:
    """How many parts of a step may be worth a processor of their own."""
    rows = config.learner.batch_size * config.generation.num_generations
    longest_prompt, longest = inputs.longest_prompt, config.generation.max_completion_length
    if config.task == "sft" and inputs.supervised is not None:
        longest_prompt, longest = inputs.supervised.longest_prompt, inputs.supervised.longest_completion
    tokens = config.learner.batch_size * longest_prompt + rows * longest
    return max(1, tokens * policy.hidden_size // machine.worthwhile)


def _placed(config: RunConfig, machine: Machine, worthwhile: int) -> RunConfig:
    """Decide where the generator runs, in how many processes (no more than `worthwhile`) and how many threads OpenBLAS
    has, so that the resolved config says it."""
    schedule, most = config.schedule, config.learner.batch_size
    _check_parts(schedule, most)
    cores = machine.cores if machine.on_cpu else None
    takes_turns = schedule.max_staleness == 0  # the generator with the learner
    processes = schedule.generator_processes or _for_cards(schedule, machine.cards)
    if processes is None:
        is_open = schedule.generator == "auto" and schedule.blas_threads is None and config.memory_limit_gb is None
        processes = min(cores or 1, worthwhile, schedule.parts or most) if takes_turns and is_open else 1
    where = schedule.generator
    if schedule.engines_alone:
        processes = 1
    elif where == "auto":
        is_elsewhere = machine.cards is not None and machine.cards.generators[0] != machine.cards.ranks[0]
        beside = _by_figures(config, machine) or _by_itself(machine)
        has_own = processes > 1 or is_elsewhere or (beside == "process" and not takes_turns)
        where = "process" if has_own else "thread"
    threads = schedule.blas_threads
    if threads is None and cores:
        threads = max(1, cores // _sharers(schedule, "thread" if schedule.engines_alone else where, processes))
    placed = msgspec.structs.replace(
        schedule,
        generator=where if config.cluster.serve is None else "process",  # beside members elsewhere; no bit changes
        generator_processes=processes,
        parts=schedule.parts or processes,
        blas_threads=threads,
        learner_streams=schedule.learner_streams if machine.on_cpu else 1,
    )
    return msgspec.structs.replace(config, schedule=placed)


def _for_cards(schedule: ScheduleConfig, cards: Cards | None) -> int | None:
    """A process of the generator for each of its cards, where there is work for them; None: cards decide nothing."""
    if cards is None or schedule.generator == "thread":
        return None
    return min(len(cards.generators), schedule.parts or 1) if schedule.mode == "pinned" else len(cards.generators)


def _check_parts(schedule: ScheduleConfig, most: int) -> None:
    for name, number in (("parts", schedule.parts), ("generator_processes", schedule.generator_processes)):
        if (number or 1) > most and (schedule.parts is None or name == "parts"):
            raise ConfigError(
                f"schedule.{name} is {number}, but a step has only {most} prompts (learner.batch_size) to be dealt; "
                f"give at most {most}"
            )


def _sharers(schedule: ScheduleConfig, where: str, processes: int) -> int:
    """How many that compute at the same time share the processor; where parts are given, whoever decodes them: bits
    depend on it."""
    parts = _given_parts(schedule)
    if parts is None and where == "thread":
        return 1
    return (parts or processes) + (schedule.max_staleness > 0)


def _given_parts(schedule: ScheduleConfig) -> int | None:
    return schedule.parts if schedule.mode == "pinned" else None


def _streamed(config: RunConfig, machine: Machine, worthwhile: int, given: int | None) -> tuple[RunConfig, int]:
    """How many micro-batches the learner may well differentiate at a time, which the resolved config says where that
    was asked for; where not, memory has its say, too. `given`: the parts that were asked for."""
    schedule, learner = config.schedule, config.learner
    streams, parts = 1, schedule.parts or 1
    at_once = parts if given is None else min(parts, machine.cores or parts)
    if machine.on_cpu and (schedule.generator != "thread" or not schedule.max_staleness):
        rows = learner.batch_size * config.generation.num_generations
        cores = schedule.blas_threads or 1
        if not schedule.max_staleness:
            cores *= at_once  # which rest while the learner works
        streams = min(schedule.learner_streams or min(cores, worthwhile), learner.gradient_accumulation_steps or rows)
    if schedule.learner_streams is not None:
        config = msgspec.structs.replace(config, schedule=msgspec.structs.replace(schedule, learner_streams=streams))
    return config, streams
