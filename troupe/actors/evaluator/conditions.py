"""Under which conditions a set is evaluated: what its figures depend on besides the policy."""

import hashlib
import sys
from array import array

import msgspec

from troupe.actors.evaluator.decoding import EvalSet
from troupe.policy import GenerationConfig
from troupe.rewards.identity import reward_identity

_OF_THE_MACHINE = ("memory_limit_gb",)
_DIGITS = 8


class Conditions:
    """Those of a set, as its results hold them. Two that are equal make figures that can be compared."""

    def __init__(self, of: EvalSet, generation: GenerationConfig) -> None:
        """`generation`: what the set's rows are completed with."""
        told = msgspec.to_builtins(generation, str_keys=True)
        told = {key: value for key, value in told.items() if key not in _OF_THE_MACHINE}
        self._lasting = {
            "rows": f"{len(of.dataset)} (sum {_sum_of_rows(of)})",
            "num_samples": _text(told.pop("num_generations")),
            **{key: _text(value) for key, value in told.items()},
            "passes_from": _text(of.settings.passes_from),
        }
        self._rewards = of.rewards
        self._identities: dict[tuple[str, int], str] = {}
        self.now()  # files of rewards as they are when they are loaded

    def now(self) -> dict[str, str]:
        """Condition → what it is, for a person, with the rewards that score now."""
        told = []
        for (name, (number, spec)), weight in zip(
            self._rewards.standing(sys.maxsize).items(), self._rewards.weights, strict=True
        ):
            identity = self._identities.setdefault((name, number), name if spec is None else reward_identity(spec))
            told.append(identity if weight == 1 else f"{identity} × {weight:g}")
        return {"rewards": ", ".join(told), **self._lasting}


def _sum_of_rows(of: EvalSet) -> str:
    """Of prompts as the policy gets them, and of columns; the file's format and place do not count."""
    digest = hashlib.sha256(of.dataset.fingerprint.encode())
    for ids in of.prompt_ids:
        digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()[:_DIGITS]


def _text(value: object) -> str:
    return msgspec.json.encode(value).decode()
