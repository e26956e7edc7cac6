"""How much memory the gated delta rule takes, forwards and back: functions of sizes and lengths alone.

No more than one span is computed at once, of `ROWS` rows at the most, so that what it makes does not grow with lengths;
what grows with them are inputs and results of the tokens, and a memory for every span. The factors are upper ends,
measured with MLX 0.32 on a CPU. Shapes as in `delta.py`.
"""

from troupe.policy.network.delta import ROWS, DeltaSizes, spans


def forward_bytes(sizes: DeltaSizes, rows: int, T: int) -> float:
    """What `through_rows` makes of so many rows, paced, `ROWS` at a time: their inputs and results in float32, and one
    span."""
    own, tokens = sizes.value_heads * sizes.value_dim, rows * T
    return 4.0 * (tokens * (3 * sizes.channels + 3 * own) + 4 * rows * sizes.state) + _span_bytes(sizes, rows, T, 0.8)


def backward_bytes(sizes: DeltaSizes, prompts: tuple[int, int], completions: tuple[int, int]) -> float:
    """What going back through the rule makes of so many rows of so many tokens each, all in float32: of each token its
    inputs, results and their cotangents, of each prompt the state at its end and the cotangent of that, the memories
    at the beginnings of spans, those of completions for `ROWS` at a time, and what one span makes."""
    (Q, P), (R, T) = prompts, completions
    own, some = sizes.value_heads * sizes.value_dim, min(R, ROWS)
    tokens = Q * P + R * T
    begun = Q * len(spans(min(Q, ROWS), P)[1]) + some * len(spans(some, max(1, T))[1])
    of_tokens = tokens * (6 * sizes.channels + 6 * own)
    memories = (begun + 4 * Q + 4 * some) * sizes.state
    span = max(_span_bytes(sizes, Q, P, 1.45), _span_bytes(sizes, R, T, 1.45))
    return 4.0 * (of_tokens + memories) + span


def _span_bytes(sizes: DeltaSizes, rows: int, T: int, ways: float) -> float:
    """What is made of one span; `ways` is more for both ways than for one."""
    rows = min(rows, ROWS)
    chunk, parts = spans(rows, max(1, T))
    tokens = rows * max(part.stop - part.start for part in parts)
    heads: int = sizes.value_heads * (6 * chunk + 5 * (sizes.key_dim + sizes.value_dim))
    numbers: int = tokens * (6 * sizes.channels + heads) + tokens // chunk * 3 * sizes.memory
    return 4.0 * ways * numbers
