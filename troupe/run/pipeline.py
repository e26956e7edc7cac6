"""From a prepared run to its actors: a maker for each over the wiring that they share.

An actor that fails is made anew (all but the Learner): its maker gives it the same channels, device thread and ledgers.
What must outlive an actor is therefore in `Ledgers`, outside its maker.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import msgspec

from troupe.actors.checkpointer import Checkpointer
from troupe.actors.conversations import Conversations
from troupe.actors.environment import Environment
from troupe.actors.learner.actor import Learner, LearnerOutputs
from troupe.actors.learner.gathering import gathering_for
from troupe.actors.learner.snapshots import Snapshots
from troupe.actors.learner.train import LearnerState
from troupe.actors.metrics import Metrics
from troupe.actors.prompter import Prompter
from troupe.actors.scorer import Scorer
from troupe.actors.teacher.actor import Teacher
from troupe.messages import Incident, MemberStatus, Settle
from troupe.policy import Weights
from troupe.records.standing import Change
from troupe.rewards import TrainerState
from troupe.run.cluster import Hub
from troupe.run.evaluations import learners_evaluations, make_evaluator
from troupe.run.generators import make_generator
from troupe.run.learning import make_trainer
from troupe.run.ledgers import Factories, Ledgers
from troupe.run.prepare import Prepared
from troupe.run.resume.changes import ChangesLog
from troupe.run.wiring import Wiring
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.roles import Role


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """The actors, the wiring between them, and what outlives them."""

    roles: tuple[Role, ...]
    learner: Learner
    wiring: Wiring
    ledgers: Ledgers

    @property
    def actors(self) -> tuple[Actor, ...]:
        """Who runs now, in the order in which work flows."""
        return tuple(role.actor for role in self.roles)

    @property
    def unread_incidents(self) -> tuple[Incident, ...]:
        """Incidents that came when Metrics had ended."""
        return tuple(m for actor in self.actors for m in actor.inbox.waiting if isinstance(m, Incident))

    def note(self, kind: str, message: str) -> None:
        """Report an incident of the supervisor while Metrics runs."""
        self.wiring.supervisor_report.incident_nowait(Incident(actor="supervisor", kind=kind, message=message))

    def tell(self, incident: Incident) -> None:
        """Count an incident and pass it on while Metrics, who does so otherwise, does not run."""
        self.ledgers.tally.incidents[incident.kind] += 1
        self.wiring.news.send_nowait(incident)
        self.ledgers.sinks.write(incident)


def build_pipeline(
    prepared: Prepared,
    factories: Factories | None = None,
    *,
    check_folder: Callable[[], None] = lambda: None,
    hub: Hub | None = None,
) -> Pipeline:
    """Open every channel and hand each actor its own. Nothing runs yet.

    `check_folder`: raises FolderGoneError where the run folder is not in its place any more. `hub`: what workers speak
    to, where the run is served.
    """
    factories = Factories() if factories is None else factories
    ledgers = Ledgers(prepared, factories, check_folder)
    wiring = Wiring(
        max(ledgers.credits.limit, len(prepared.start.restored.alive)),
        factories.mailbox,
        episodes=prepared.config.generation.num_generations if ledgers.conversations is not None else 0,
        evaluates=bool(prepared.inputs.sets),
        by_crew=ledgers.files is not None and ledgers.conversations is None,
        teaches=prepared.config.teacher.has_actor,
        supervised=prepared.inputs.supervised is not None,
    )
    learner = _make_learner(prepared, wiring, ledgers, factories, check_folder)
    roles = (
        Role(_prompter(prepared, wiring, ledgers)),
        Role(make_generator(prepared, wiring, ledgers, factories, hub)),
        *([] if ledgers.conversations is None else [Role(_environment(wiring, ledgers, ledgers.conversations))]),
        *([] if wiring.teaching is None else [Role(_teacher(prepared, wiring, ledgers))]),
        Role(_scorer(prepared, wiring, ledgers)),
        Role(lambda: learner, restartable=False),
        *([] if (evaluator := make_evaluator(prepared, wiring, ledgers, factories)) is None else [Role(evaluator)]),
        Role(_checkpointer(wiring, ledgers)),
    )
    return Pipeline(
        roles=(*roles, Role(_metrics(wiring, ledgers, partial(members_of, roles)))),
        learner=learner,
        wiring=wiring,
        ledgers=ledgers,
    )


def members_of(roles: Iterable[Role]) -> Iterator[MemberStatus]:
    """Who does the actors' work in processes of their own, here or elsewhere."""
    for role in roles:
        yield from role.actor.members()


def _prompter(prepared: Prepared, wiring: Wiring, ledgers: Ledgers) -> Callable[[], Actor]:
    schedule = prepared.config.schedule
    return partial(
        Prompter,
        wiring.prompter,
        wiring.prompts,
        wiring.given,
        schedule=prepared.inputs.schedule,
        credits=ledgers.credits,
        ledger=ledgers.prompts,
        open_groups=ledgers.open_groups,
        replaces=prepared.config.learner.dynamic_sampling
        or (schedule.mode == "free" and schedule.on_stale != "correct"),
        report=wiring.reporters["prompter"],
    )


def _environment(wiring: Wiring, ledgers: Ledgers, conversations: Conversations) -> Callable[[], Actor]:
    assert wiring.acting is not None
    return partial(
        Environment,
        wiring.acting.environment,
        wiring.completed,
        wiring.acting.observations,
        wiring.acting.answered,
        conversations=conversations,
        alive=ledgers.prompts.alive.keys,
        hold=wiring.acting.hold,
        report=wiring.reporters["environment"],
    )


def _teacher(prepared: Prepared, wiring: Wiring, ledgers: Ledgers) -> Callable[[], Actor]:
    assert wiring.teaching is not None
    assert prepared.inputs.teachers is not None
    return partial(
        Teacher,
        wiring.teaching.teacher,
        wiring.rollouts,
        device=ledgers.devices["teacher"],
        teach=prepared.inputs.teachers.forward(prepared.config.generation.temperature).taught,
        recorded=ledgers.recorded,
        report=wiring.reporters["teacher"],
    )


def _scorer(prepared: Prepared, wiring: Wiring, ledgers: Ledgers) -> Callable[[], Actor]:
    config = prepared.config
    return partial(
        Scorer,
        wiring.scorer,
        wiring.scored,
        rewards=prepared.inputs.rewards,
        hold=wiring.hold,
        trainer_state=partial(
            TrainerState.at,
            max_steps=prepared.inputs.total_steps,
            prompts=config.learner.batch_size,
            num_generations=config.generation.num_generations,
            rows=prepared.inputs.schedule.rows,
        ),
        recorded=ledgers.recorded,
        settled=None if prepared.inputs.acting_setup is None else prepared.inputs.acting_setup.manager.settled,
        report=wiring.reporters["scorer"],
    )


def _make_learner(
    prepared: Prepared, wiring: Wiring, ledgers: Ledgers, factories: Factories, check_folder: Callable[[], None]
) -> Learner:
    config, changes, prompts = prepared.config, ChangesLog(prepared.folder), ledgers.prompts

    def keep_rate(step: int, lr: float) -> None:
        check_folder()
        changes.add(Change(step=step, key="learner.lr", value=lr))

    return Learner(
        wiring.learner,
        LearnerOutputs(
            closed_to_prompter=wiring.closed,
            closed_to_metrics=wiring.closed_groups,
            updates=wiring.updates,
            snapshots=wiring.snapshots,
            evaluations=learners_evaluations(prepared, wiring, ledgers),
        ),
        device=ledgers.devices["learner"],
        trainer=make_trainer(prepared, factories, ledgers, wiring.reporters["learner"]),
        state=_starting_state(prepared, ledgers.board),
        board=ledgers.board,
        gathering=gathering_for(
            config.schedule,
            batch_size=config.learner.batch_size,
            min_scored=config.rewards.min_scored,
            resampling=config.learner.max_resampling_attempts,
            unfinished=prepared.start.restored.collected,
            supervised=prepared.inputs.supervised_steps,
        ),
        snapshots=Snapshots(
            every=prepared.live.checkpoint_every,
            beside_learning=config.checkpoint.overlap is not False,
            with_reference=config.learner.sync_ref_model or prepared.inputs.supervised is not None,
            with_average=config.teacher.model_kind == "ema" or prepared.inputs.supervised is not None,
            open_groups=ledgers.open_groups,
            recorded=ledgers.recorded,
            next_prompt=lambda: prompts.next,
            curriculum=prepared.inputs.schedule.curriculum,
        ),
        epoch=prepared.inputs.schedule.epoch,
        keep_rate=keep_rate,
        report=wiring.reporters["learner"],
    )


def _starting_state(prepared: Prepared, board: PolicyBoard[Weights]) -> LearnerState:
    """Publish the versions that the first steps are generated with; say where learning goes on."""
    if prepared.start.checkpoint is not None:
        for version, weights in sorted(prepared.start.checkpoint.behind.items()):
            if version >= prepared.start.first_step - board.max_staleness:  # others are to be evaluated
                board.publish(version, weights)
    board.publish(prepared.start.first_step, prepared.start.policy.weights)
    state = None if prepared.start.checkpoint is None else prepared.start.checkpoint.state
    return LearnerState(
        version=prepared.start.first_step,
        weights=prepared.start.policy.weights,
        optimizer_state=prepared.start.optimizer_state,
        reference=prepared.start.reference,
        average=prepared.start.average,
        num_tokens=0 if state is None else state.num_tokens,
        skipped_in_a_row=0 if state is None else state.skipped_in_a_row,
    )


def _checkpointer(wiring: Wiring, ledgers: Ledgers) -> Callable[[], Actor]:
    async def settle(version: int) -> bool:
        wiring.settle.send_nowait(Settle(version=version))  # Metrics may have the step's Update yet to read
        return await ledgers.sinks.settled(version)

    return partial(
        Checkpointer,
        wiring.checkpointer,
        wiring.checkpoints,
        writer=ledgers.writer,
        device=ledgers.devices["checkpointer"],
        settle=settle,
        report=wiring.reporters["checkpointer"],
    )


def _metrics(wiring: Wiring, ledgers: Ledgers, members: Callable[[], Iterable[MemberStatus]]) -> Callable[[], Actor]:
    return partial(
        Metrics,
        wiring.metrics,
        sinks=ledgers.sinks,
        listeners=wiring.news,
        tally=ledgers.tally,
        watched=(
            wiring.generator,
            *([] if wiring.acting is None else [wiring.acting.environment]),
            *([] if wiring.teaching is None else [wiring.teaching.teacher]),
            wiring.scorer,
            wiring.learner,
            *([] if wiring.evaluating is None else [wiring.evaluating.evaluator]),
            wiring.checkpointer,
        ),
        reporters=tuple(wiring.reporters.values()),
        members=members,
        closes=False,
        report=wiring.metrics_report,
    )
