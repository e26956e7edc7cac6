"""The gated delta rule over packed tokens: prompts from nothing, completions from what their prompts leave.

A prompt is gone through once, and its state is where each of its completions begins; back, the cotangents of all these
beginnings are added up and gone through the prompt with. `ROWS` rows at a time, for memory.

Shapes: N tokens of Q prompts, then of Q·G completions (those that a prompt lacks have no token); the rest as in
`delta.py`.
"""

from collections.abc import Sequence

import mlx.core as mx

from troupe.policy.network.delta import ROWS, DeltaInputs, DeltaSizes, DeltaState, back_through_rows, through_rows
from troupe.policy.network.layouts import Cells


class PackedRows:
    """Prompts and completions, each as a rectangle."""

    def __init__(self, prompts: Cells, completions: Cells, lengths: Sequence[int], own_lengths: Sequence[int]) -> None:
        """`lengths`: tokens of each prompt; `own_lengths`: of each of Q·G completions."""
        self._prompts, self._completions = prompts, completions
        self._lengths, self._own_lengths = list(lengths), list(own_lengths)

    def through(self, inputs: DeltaInputs, sizes: DeltaSizes, *, paced: bool) -> mx.array:
        """All (1, N, …) → o float32 (1, N, H, b). `paced`: for nothing that is differentiated."""
        prompts, own = self._apart(inputs)
        outputs = []
        before = []
        for rows in _portions(len(self._lengths), paced=paced):
            empty = DeltaState.empty(rows.stop - rows.start, sizes)
            o, state, _ = through_rows(prompts.of(rows), empty, sizes, self._lengths[rows], paced=paced)
            outputs.append(o)
            before.append(state)
        o = self._prompts.collect(_joined(outputs))
        if not self._completions.count:
            return o[None]
        state, outputs = DeltaState(*map(_joined, zip(*before, strict=True))), []
        for rows in _portions(len(self._own_lengths), paced=paced):
            begin = state.of(self._prompt_of(rows))
            outputs.append(through_rows(own.of(rows), begin, sizes, paced=paced)[0])
        return mx.concatenate([o, self._completions.collect(_joined(outputs))])[None]

    def back(self, inputs: DeltaInputs, sizes: DeltaSizes, o_grad: mx.array) -> DeltaInputs:
        """From the cotangent of what `through` gave (1, N, H, b) to those of its inputs; all is computed again, and
        when this returns it is there, but for what puts it together."""
        prompts, own = self._apart(inputs)
        of_prompts, of_own = mx.split(o_grad.squeeze(0), [self._prompts.count])
        firsts = []
        for rows in _portions(len(self._lengths), paced=True):
            empty = DeltaState.empty(rows.stop - rows.start, sizes)
            _, state, begun = through_rows(prompts.of(rows), empty, sizes, self._lengths[rows], paced=True)
            firsts.append((rows, empty, state, begun))
        left: DeltaState | None = None
        grads: list[DeltaInputs] = []
        kernel_grad = mx.zeros(inputs.kernel.shape, inputs.kernel.dtype)
        if self._completions.count:
            state = DeltaState(*map(_joined, zip(*(first[2] for first in firsts), strict=True)))
            left = DeltaState(*map(mx.zeros_like, state))
            spread = self._completions.spread(of_own)
            for rows in _portions(len(self._own_lengths), paced=True):
                members = self._prompt_of(rows)
                begin, part = state.of(members), own.of(rows)
                _, _, begun = through_rows(part, begin, sizes, paced=True)
                grad, of_begin = back_through_rows(
                    part, begin, sizes, begun, self._own_lengths[rows], spread[rows], None
                )
                left = DeltaState(*(a + self._by_prompt(b, rows) for a, b in zip(left, of_begin, strict=True)))
                kernel_grad = kernel_grad + grad.kernel
                mx.eval(left, kernel_grad)
                grads.append(grad)
        of_completions = _collected(self._completions, grads) if grads else None
        spread, grads = self._prompts.spread(of_prompts), []
        for rows, empty, _, begun in firsts:
            after = None if left is None else left.of(rows)
            grad, _ = back_through_rows(prompts.of(rows), empty, sizes, begun, self._lengths[rows], spread[rows], after)
            kernel_grad = kernel_grad + grad.kernel
            grads.append(grad)
        found = _collected(self._prompts, grads)
        if of_completions is not None:
            found = [mx.concatenate([a, b]) for a, b in zip(found, of_completions, strict=True)]
        mixed, decay, rate = (x[None] for x in found)
        return DeltaInputs(mixed, decay, rate, kernel_grad)

    def _apart(self, inputs: DeltaInputs) -> tuple[DeltaInputs, DeltaInputs]:
        """Of the prompts (Q, P, …), and of the completions (Q·G, T, …); 0 in the padding, where no token is."""
        parts = [mx.split(x.squeeze(0), [self._prompts.count]) for x in inputs[:3]]
        both = []
        for i, cells in enumerate((self._prompts, self._completions)):
            mixed, decay, rate = (cells.spread(part[i]) for part in parts)
            both.append(DeltaInputs(mixed, decay, rate, inputs.kernel))
        return both[0], both[1]

    def _prompt_of(self, rows: slice) -> mx.array:
        """The prompts of some completions."""
        each = len(self._own_lengths) // len(self._lengths)
        return mx.arange(rows.start, rows.stop) // each

    def _by_prompt(self, x: mx.array, rows: slice) -> mx.array:
        """(rows, …) of some completions, added up for each prompt, (Q, …), always in the same order."""
        is_of = self._prompt_of(rows) == mx.arange(len(self._lengths))[:, None]
        flat = x.reshape(x.shape[0], -1)
        return (is_of.astype(x.dtype) @ flat).reshape(-1, *x.shape[1:])


def _portions(rows: int, *, paced: bool) -> list[slice]:
    """What is computed at once: all, where nothing may be evaluated in between."""
    size = ROWS if paced else rows
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _joined(parts: Sequence[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


def _collected(cells: Cells, grads: Sequence[DeltaInputs]) -> list[mx.array]:
    """Cotangents of portions of rows → of the tokens (n, …) in them; not the kernel's."""
    return [cells.collect(_joined([grad[i] for grad in grads])) for i in range(3)]
