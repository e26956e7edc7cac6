"""What evaluations of earlier starts of a run came to, and whether they can be compared with those that will come."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from troupe.actors.evaluator.conditions import Conditions
from troupe.actors.evaluator.ledger import EvaluationLedger
from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.messages import Evaluated
from troupe.messages.evaluations import changed
from troupe.records.evaluations import read_evaluations


def evaluated_before(folder: Path, last: int) -> tuple[Evaluated, ...]:
    """What is known of versions up to the one that the run goes on from; later ones are made again with their steps."""
    return tuple(each for each in read_evaluations(folder) if each.version <= last)


def lacks_first(config: EvaluationConfig, names: Sequence[str], evaluated: Sequence[Evaluated]) -> bool:
    """Whether the untrained policy is still to be evaluated on some set."""
    return config.is_due(0) and bool(EvaluationLedger(names, evaluated).lacks(0))


def told_of_changes(evaluated: Sequence[Evaluated], sets: Mapping[str, Conditions]) -> Iterator[str]:
    """A line for each set of which other figures would come now than before."""
    newest = {each.name: each.conditions for each in evaluated}
    for name, conditions in sets.items():
        if name in newest and (differing := changed(newest[name], conditions.now())):
            yield (
                f"the set {name} is evaluated otherwise from here: {'; '.join(differing)}; its figures are not "
                "compared with those before (a new set in evaluation.sets would have a curve of its own)"
            )
