"""Evaluation in a run: its actor, the learner's side of it, and what is to be done of it when a run goes on."""

from collections.abc import Callable, Mapping
from functools import partial

from troupe.actors.evaluator.actor import Evaluator, SetWork
from troupe.actors.evaluator.asking import Evaluations
from troupe.actors.evaluator.decoding import CrewDecoder, Decoder, EvalSet, RowPrompts
from troupe.actors.evaluator.ledger import EvaluationLedger
from troupe.policy import Weights, opened_thought
from troupe.run.decoders import make_decoder
from troupe.run.ledgers import Factories, Ledgers
from troupe.run.prepare import Prepared
from troupe.run.sets import early_stop
from troupe.run.wiring import Wiring
from troupe.runtime.actor import Actor


def make_evaluator(
    prepared: Prepared, wiring: Wiring, ledgers: Ledgers, factories: Factories
) -> Callable[[], Actor] | None:
    """The maker of the actor; None where there is nothing to evaluate."""
    if wiring.evaluating is None:
        return None
    report, parts = wiring.reporters["evaluator"], wiring.evaluating.parts
    config, device = prepared.config, ledgers.devices["generator"]
    acting, held_out = prepared.inputs.acting_setup, prepared.inputs.sets
    conditions = prepared.inputs.conditions
    policy = prepared.start.policy.having({})  # not to keep the weights that the run begins with
    tokenizer, opened = policy.tokenizer, partial(opened_thought, policy.tokenizer)

    def decoder(number: int, of: EvalSet) -> Decoder:
        if parts is not None:
            return CrewDecoder(parts, number)
        generation = of.settings.generation(config.generation)
        engine = partial(
            factories.engine,
            policy.config,
            generation,
            stop_ids=policy.eos_ids,
            tokenizer=tokenizer,
            base=policy.base,
        )
        return make_decoder(
            engine, generation, device, tokenizer=tokenizer, acting_setup=acting, seed=config.seed, report=report
        )

    def sets() -> list[SetWork]:
        return [
            SetWork(of, RowPrompts(of, number, opened), decoder(number, of), conditions[of.name].now)
            for number, of in enumerate(held_out)
        ]

    return partial(
        Evaluator,
        wiring.evaluating.evaluator,
        wiring.evaluating.evaluated,
        sets=sets,
        ledger=ledgers.evaluations,
        written=ledgers.sinks.written,
        record=partial(ledgers.devices["checkpointer"].run, ledgers.evaluations.write, plain=True),
        aside=partial(ledgers.devices["checkpointer"].run, plain=True),
        parts=parts,
        report=report,
    )


def learners_evaluations(prepared: Prepared, wiring: Wiring, ledgers: Ledgers) -> Evaluations | None:
    """What the learner asks for evaluations with; None where there is nothing to evaluate."""
    if wiring.evaluating is None:
        return None
    return Evaluations(
        wiring.evaluating.asked,
        prepared.config.evaluation,
        ledgers.evaluations,
        report=wiring.reporters["learner"],
        stop=early_stop(prepared.config, prepared.inputs.sets),
        overdue=overdue(prepared, ledgers.evaluations),
    )


def overdue(prepared: Prepared, ledger: EvaluationLedger) -> dict[int, Weights]:
    """Versions before the one that this start goes on from which an earlier start has not done with, and is due."""
    start, config = prepared.start, prepared.config.evaluation
    if start.checkpoint is None:
        return {}
    there: Mapping[int, Weights] = start.checkpoint.behind
    if start.untrained is not None:
        there = {0: start.untrained, **there}
    return {version: weights for version, weights in there.items() if config.is_due(version) and ledger.lacks(version)}
