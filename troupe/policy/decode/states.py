"""What gated delta nets carry from token to token while decoding: of whole prompts, and of the rows that follow them.

One state a layer and row, float32, however many tokens there were. A prompt's is computed once, and each of its rows
begins with a copy. Shapes as in `network/delta.py`; S prompts, w rows of each, B = S·w rows in their order.
"""

from collections.abc import Sequence

import mlx.core as mx

from troupe.policy.network.delta import ROWS, DeltaInputs, DeltaSizes, DeltaState, one_step, through_rows


class PromptStates:
    """What prompts leave behind, layer by layer; they may come some tokens at a time."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths`: how many tokens each prompt has."""
        self._lengths = list(lengths)
        self.layers: list[DeltaState] = []

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        return [x for state in self.layers for x in state]

    def go_on(self, before: "PromptStates", more: Sequence[int]) -> None:
        """Begin with what other tokens left behind, `more` being how many there are behind them."""
        self._lengths, self.layers = list(more), before.layers

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes, start: int) -> mx.array:
        """Tokens of all prompts from place `start` on, padded on the right → o float32 (S, T, H, b), all computed."""
        S, T = inputs.mixed.shape[:2]
        lengths = [min(max(length - start, 0), T) for length in self._lengths]
        if min(lengths) < T:
            is_real = (mx.arange(T) < mx.array(lengths)[:, None])[..., None]
            inputs = inputs._replace(decay=inputs.decay * is_real, rate=inputs.rate * is_real)
        before = self.layers[layer] if layer < len(self.layers) else DeltaState.empty(S, sizes)
        outputs, left = [], []
        for rows in (slice(at, min(at + ROWS, S)) for at in range(0, S, ROWS)):
            o, state, _ = through_rows(inputs.of(rows), before.of(rows), sizes, lengths[rows], paced=True)
            mx.eval(state)
            outputs.append(o)
            left.append(state)
        after = joined(left)
        mx.eval(after)
        self.layers[layer : layer + 1] = [after]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def join(self, parts: Sequence["PromptStates"]) -> None:
        """Take over the states of several, one behind the other; these are emptied layer by layer to spare memory."""
        for _ in range(len(parts[0].layers)):
            self.layers.append(joined([part.layers.pop(0) for part in parts]))
            mx.eval(self.layers[-1])


class RowStates:
    """What rows leave to their next token, layer by layer."""

    def __init__(self, prompts: PromptStates, width: int) -> None:
        """`width` rows for every prompt, whose states are used up."""
        self.layers: list[DeltaState] = []
        while prompts.layers:
            state = prompts.layers.pop(0)
            self.layers.append(DeltaState(*(mx.repeat(x, width, axis=0) for x in state)))
            mx.eval(self.layers[-1])

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        return [x for state in self.layers for x in state]

    def recur(self, layer: int, inputs: DeltaInputs, sizes: DeltaSizes) -> mx.array:
        """The next token of every row → o float32 (B, 1, H, b)."""
        o, self.layers[layer] = one_step(inputs, self.layers[layer], sizes)
        return o

    def of(self, rows: Sequence[int]) -> list[DeltaState]:
        """What some rows leave, by their places."""
        index = mx.array(list(rows))
        return [state.of(index) for state in self.layers]

    def select(self, rows: Sequence[int]) -> None:
        """Keep only these rows, by their places now, in this order."""
        index = mx.array(list(rows))
        for place, state in enumerate(self.layers):
            self.layers[place] = state.of(index)
            mx.eval(self.layers[place])


def joined(states: Sequence[DeltaState]) -> DeltaState:
    """Of several rows, one behind the other."""
    return states[0] if len(states) == 1 else DeltaState(*(mx.concatenate(list(x)) for x in zip(*states, strict=True)))
